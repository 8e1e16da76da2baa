"""Compare settings of the int8 ONNX file with the float32 file:

    python benchmarks/quantized.py --checkpoint CHECKPOINT --texts FILE [--rows 250]

FILE is JSON Lines with ``text``. A decision is whether a node reaches its threshold, or for single-path models the most probable
leaf. The last line counts the operators that ONNX Runtime's optimizer for transformers fuses in the float32 file.
"""

import json
import logging
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from harness import flag_parser
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from transformers import AutoTokenizer

from configuration_hierarchical import HierarchicalConfig
from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.checkpoint_files import ONNX_FILE
from hierarchical_clinicalbert.publishing.export import export_onnx

SETTINGS = {
    "defaults": {},
    "a scale for each column": {"per_channel": True},
    "7 bits": {"reduce_range": True},
    "a scale for each column, 7 bits": {"per_channel": True, "reduce_range": True},
}


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=250)
    arguments = parser.parse_args()
    with arguments.texts.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, arguments.rows)]
    texts.sort(key=len)
    config = HierarchicalConfig.from_pretrained(arguments.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    decisions = build_decisions(config.tree, config.problem_type)

    def probabilities(file: Path) -> np.ndarray:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names, rows = [one.name for one in session.get_inputs()], []
        for start in range(0, len(texts), 8):
            batch = tokenizer(texts[start : start + 8], padding=True, truncation=True, return_tensors="np")
            rows.append(session.run(["logits"], {name: batch[name] for name in names})[0])
        logits = np.concatenate(rows).astype(np.float64)
        return decisions.log_probs(torch.from_numpy(logits)).exp().numpy()

    def predicted(scores: np.ndarray) -> np.ndarray:
        return decisions.predict(torch.from_numpy(scores), config.calibration.thresholds)[0].numpy()

    with tempfile.TemporaryDirectory() as scratch:
        file = export_onnx(arguments.checkpoint, Path(scratch))[ONNX_FILE]
        expected = probabilities(file)
        logging.disable(logging.WARNING)
        print("settings | same decisions | texts with all the same | mean largest change of a probability")
        for name, settings in SETTINGS.items():
            quantize_dynamic(file, Path(scratch) / "int8.onnx", weight_type=QuantType.QInt8, **settings)
            scores = probabilities(Path(scratch) / "int8.onnx")
            same = predicted(scores) == predicted(expected)
            change = np.abs(scores - expected).max(1).mean()
            print(f"{name} | {same.mean():.1%} | {same.all(1).mean():.1%} | {change:.3f}", flush=True)
        fused = optimize_model(str(file), model_type="bert", opt_level=0).get_fused_operator_statistics()
        print("fused:", {name: count for name, count in fused.items() if count})


if __name__ == "__main__":
    main()

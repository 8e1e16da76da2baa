"""Measure the rounding error of an encoder in int8, for each way of quantization:

    pip install -r tests/optional.txt nncf
    python benchmarks/studies/rounding.py --encoder ENCODER [--texts ohsumed/train.csv]

- this project: a scale for each token (`prediction.int8`);
- OpenVINO, dynamic int8: a scale for each group of a token's numbers;
- OpenVINO, static int8: a scale for each layer, from the last texts of the file, by NNCF.

The error is ‖V - V₃₂‖ / ‖V₃₂ - mean‖. V are the mean token vectors of the first `NUM_TEXTS` texts, and V₃₂ the same in float32. A
classifier sees a text through its mean token vector, or through attention over its tokens.

Supports docs/experiments.md, "2026-11-28: OpenVINO for prediction".
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from inference import CALIBRATION_TEXTS, OPENVINO_INT8, openvino_encoder, read_column

from prediction.int8 import quantize

NUM_TEXTS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--texts", type=Path, default=ROOT / "examples" / "corpus" / "train.csv")
    arguments = parser.parse_args()
    texts = read_column(arguments.texts, "text")
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder, model_max_length=512)

    def load() -> nn.Module:
        return AutoModel.from_pretrained(arguments.encoder, dtype=torch.float32).eval()

    exact = mean_vectors(load(), tokenizer, texts[:NUM_TEXTS])
    spread = (exact - exact.mean(0)).norm()
    print("| int8 | rounding error |\n| --- | ---: |")
    for name in ("this project", *OPENVINO_INT8):
        encoder = load()
        if name == "this project":
            quantize(encoder)
        else:
            encoder = openvino_encoder(encoder, tokenizer, name, texts[-CALIBRATION_TEXTS:])
        error = (mean_vectors(encoder, tokenizer, texts[:NUM_TEXTS]) - exact).norm() / spread
        print(f"| {name} | {100 * error:.1f} % |", flush=True)


@torch.no_grad()
def mean_vectors(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Return each text's mean token vector, (num_texts, hidden_size)."""
    inputs = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
    return torch.stack([encoder(**one).last_hidden_state[0].mean(0) for one in inputs])


if __name__ == "__main__":
    main()

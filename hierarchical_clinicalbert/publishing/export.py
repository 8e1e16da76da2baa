"""Export a checkpoint: self-contained, with the adapter merged into the encoder, or as ONNX.

Optimum, text-embeddings-inference and transformers.js look for ``onnx/model.onnx`` beside
config.json. transformers.js also looks for ``onnx/model_quantized.onnx``. The inputs are the
tokenizer's, (batch, length) of any size up to the model's limit. The output is ``logits``,
(batch, num_leaves), whose softmax is the distribution over the leaves. For multi-label models, the
logits are (batch, num_nodes), and their sigmoids are the probabilities of the nodes.
"""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from checkpoint_hierarchical import check_self_test
from hierarchical_clinicalbert.checkpoint_files import (
    ADAPTER_FILES,
    EXPORTED_FILES,
    ONNX_FILE,
    QUANTIZED_ONNX_FILE,
    TRUNCATION_FILE,
    list_own_files,
)
from hierarchical_clinicalbert.errors import InputError, as_input_error, is_full_disk, one_line
from modeling_hierarchical import HierarchicalForSequenceClassification

# of a probability
ONNX_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 0.25
# text-embeddings-inference subtracts the logit of the largest absolute value before its softmax in
# float32, whose exp overflows above 88
MIN_LOGIT = -80.0
TEXTS = [
    "A study of ulcers.",
    "A longer study of ulcers of the stomach, and of what became of them.",
    "Epilepsy",
]


def export_merged(folder: Path, output: Path) -> None:
    """Write a checkpoint's self-contained form into ``output``: the adapter merged into the encoder
    in full precision.

    Raises:
        InputError: the encoder cannot be loaded, the adapter cannot be merged, or a link leads out
            of the folder.
    """
    names = list_own_files(folder)
    merged = load_merged(folder)
    if merged.has_adapter:
        raise InputError(
            f"--merge: the adapter of {folder} is not plain LoRA over floating-point weights"
        )
    if merged.config.self_test is not None:
        with as_input_error(f"--merge: cannot merge {folder}"):
            check_self_test(merged, AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
        merged.record_self_test()
    merged.save_pretrained(output)
    for name in set(names) - set(ADAPTER_FILES):
        if not (output / name).exists():
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, output / name)


def load_merged(folder: Path) -> HierarchicalForSequenceClassification:
    """Load a checkpoint in float32 with its adapter merged, or raise InputError."""
    with as_input_error(f"cannot load {folder}"):
        return HierarchicalForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


class Logits(nn.Module):
    """Wrap a model: take its inputs by position, and return its logits, clamped at `MIN_LOGIT`."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits.clamp(min=MIN_LOGIT)


def export_onnx(folder: Path, output: Path) -> dict[str, Path]:
    """Write a checkpoint as `ONNX_FILE` and, with int8 weights, as `QUANTIZED_ONNX_FILE` below a
    folder. An adapter is merged.

    `TRUNCATION_FILE` has the tokenizer's limit, in the format of sentence-transformers. Return the
    paths by these names.

    Raises:
        InputError: a package is missing, the encoder cannot be exported or is larger than the 2 GiB
        of an ONNX file, or probabilities
            change by more than 1e-3, or 0.25 in int8.
    """
    # ── Load the checkpoint ───────────────────────────────────────────────────────────────────────
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 (torch.onnx does not name a missing package)
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise InputError(
            f"--onnx needs pip install onnx onnxscript onnxruntime ({one_line(error)})"
        ) from error
    model = load_merged(folder).eval()
    # SDPA would export four more operations on the scores
    model.encoder.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    names = list(dict.fromkeys([*tokenizer.model_input_names, "attention_mask"]))
    tokenized = tokenizer(TEXTS, padding=True, return_attention_mask=True, return_tensors="pt")

    # ── Export, and quantize ──────────────────────────────────────────────────────────────────────
    file = output / ONNX_FILE
    quantized = output / QUANTIZED_ONNX_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    # torch's exporter and ONNX Runtime's quantizer log and warn a lot
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        try:
            program = torch.onnx.export(
                Logits(model, names).eval(),
                tuple(tokenized[name] for name in names),
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple({0: "batch", 1: "length"} for _ in names),),
            )
            onnx_ir.save(program.model, file)
            # With a scale for each column, decisions change a third as often as with one scale
            # (benchmarks/LOG.md). Without VNNI, sums of products with 8-bit weights overflow, and
            # sums of products with 7-bit weights do not.
            settings = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
            quantize_dynamic(
                file, quantized, **settings, nodes_to_exclude=stacked_products(program.model.graph)
            )
        # an encoder that cannot be traced, or is too large for one file, may raise anything
        except Exception as error:
            if is_full_disk(error):
                raise
            problem = f"{type(model.encoder).__name__} cannot be exported ({type(error).__name__})"
            raise InputError(f"--onnx: {problem}: publish without --onnx") from error
        finally:
            logging.disable(logging.NOTSET)

    for exported, tolerance in ((file, ONNX_TOLERANCE), (quantized, QUANTIZED_TOLERANCE)):
        gap = largest_gap(exported, model, tokenizer, names)
        if not gap <= tolerance:
            raise InputError(
                f"{exported.name} changes the probabilities by {gap:.1e}; publish without --onnx"
            )
    truncation = output / TRUNCATION_FILE
    truncation.write_text(json.dumps({"max_seq_length": tokenizer.model_max_length}))
    return {name: output / name for name in EXPORTED_FILES}


def stacked_products(graph: Any) -> list[str]:
    """Return the names of a graph's products with a constant of several matrices, for which ONNX
    Runtime has no int8 form.
    """
    return [
        node.name
        for node in graph
        if any(
            value is not None and value.const_value is not None and len(value.const_value.shape) > 2
            for value in node.inputs
        )
    ]


def largest_gap(
    file: Path, model: HierarchicalForSequenceClassification, tokenizer: Any, names: list[str]
) -> float:
    """Return the largest difference between a probability of an ONNX file and of the model, over
    batches of several shapes.
    """
    import onnxruntime

    decisions = model.heads.decisions
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    gaps = []
    # which a model with windows reads in several
    long = " ".join(TEXTS * (1 + tokenizer.model_max_length // 8))
    for batch in (TEXTS, TEXTS[:1], [long, *TEXTS]):
        inputs = tokenizer(
            batch, padding=True, truncation=True, return_attention_mask=True, return_tensors="pt"
        )
        with torch.inference_mode():
            expected = decisions.log_probs(model(**inputs).logits).exp()
        (logits,) = session.run(["logits"], {name: inputs[name].numpy() for name in names})
        gaps.append((decisions.log_probs(torch.from_numpy(logits)).exp() - expected).abs().max())
    return torch.stack(gaps).max().item()

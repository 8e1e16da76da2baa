"""Export a checkpoint: self-contained, with the adapter merged into the encoder, or as ONNX.

Optimum and transformers.js look for ``onnx/model.onnx`` beside config.json. The inputs are the tokenizer's, (batch, length) of
any size up to the model's limit. The output is ``logits``: (batch, num_leaves), whose softmax is the distribution over leaves, or
with several labels a text (batch, num_nodes), whose sigmoids are the nodes' probabilities.
"""

import logging
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from checkpoint_files import ADAPTER_FILES, ONNX_FILE, list_files
from errors import InputError, one_line
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing.hub import HUB_ERRORS

ONNX_TOLERANCE = 1e-3  # of a probability


def export_merged(folder: Path, output: Path) -> None:
    """Write a checkpoint's self-contained form into ``output``: the adapter merged into the encoder in full precision.

    Raises:
        InputError: the encoder cannot be loaded, or the adapter cannot be merged.
    """
    try:
        merged = HierarchicalForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    except (*HUB_ERRORS, ValueError) as error:
        raise InputError(f"cannot load {folder}: {one_line(error)}") from error
    if merged.has_adapter:
        raise InputError(f"--merge: the adapter of {folder} is not plain LoRA over floating-point weights")
    merged.save_pretrained(output)
    for name in set(list_files(folder)) - set(ADAPTER_FILES):
        if not (output / name).exists():
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, output / name)


class Logits(nn.Module):
    """Wrap a model: take its inputs by position, and return its logits."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export_onnx(folder: Path, output: Path) -> Path:
    """Write a checkpoint as ``onnx/model.onnx`` below a folder, with any adapter merged, and return the file's path.

    Raises:
        InputError: a package is missing, the encoder cannot be exported, or probabilities change by more than 1e-3.
    """
    # ── Load the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx does not name a missing package)
    except ImportError as error:
        raise InputError(f"--onnx needs pip install onnx onnxscript onnxruntime ({one_line(error)})") from error
    model = HierarchicalForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    names = list(dict.fromkeys([*tokenizer.model_input_names, "attention_mask"]))
    texts = ["A study of ulcers.", "A longer study of ulcers of the stomach, and of what became of them.", "Epilepsy"]
    tokenized = tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt")

    # ── Export, without the exporter's log lines ─────────────────────────────────────────────────────────────────────
    file = output / ONNX_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(
            Logits(model, names),
            tuple(tokenized[name] for name in names),
            file,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=(tuple({0: "batch", 1: "length"} for _ in names),),
        )
    except Exception as error:  # the exporter raises anything on an encoder that it cannot trace
        problem = f"{type(model.encoder).__name__} cannot be exported ({type(error).__name__})"
        raise InputError(f"--onnx: {problem}: publish without --onnx") from error
    finally:
        logging.disable(logging.NOTSET)

    # ── Compare with the model, also on shapes other than the example's ──────────────────────────────────────────────
    probabilities = torch.sigmoid if model.config.is_multi_label else partial(torch.softmax, dim=-1)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (texts, texts[:1], [" ".join(texts) * 4] * 5):
        inputs = tokenizer(batch, padding=True, truncation=True, return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            expected = probabilities(model(**inputs).logits)
        (logits,) = session.run(["logits"], {name: inputs[name].numpy() for name in names})
        gap = (probabilities(torch.from_numpy(logits)) - expected).abs().max().item()
        if not gap <= ONNX_TOLERANCE:
            raise InputError(f"the ONNX file changes the probabilities by {gap:.1e}; publish without --onnx")
    return file

"""A checkpoint as an ONNX file, where Optimum and transformers.js look for it: ``onnx/model.onnx`` beside config.json.

The inputs are those of the tokenizer, (batch, length) of any size up to the model's limit; the output is ``logits``, (batch,
num_leaves), whose softmax is the distribution of the leaves.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from checkpoint_files import ONNX_FILE
from errors import InputError, one_line
from modeling_hierarchical import HierarchicalForSequenceClassification

TOLERANCE = 1e-3  # of a leaf's probability


class Logits(nn.Module):
    """A model with tensors for inputs, by position, and its logits for an output."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export_onnx(folder: Path, output: Path) -> None:
    """Writes the ONNX file of a checkpoint, whose adapter is added to the encoder.

    Args:
        folder: of the checkpoint.
        output: the folder in which ``onnx/model.onnx`` is to stand.

    Raises:
        InputError: a package is not there, or the file does not answer as the model does, to 1e-3 of a probability.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx does not say what it lacks)
    except ImportError as error:
        raise InputError(f"--onnx needs pip install onnx onnxscript onnxruntime ({one_line(error)})") from error
    model = HierarchicalForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    names = list(dict.fromkeys([*tokenizer.model_input_names, "attention_mask"]))
    texts = ["A study of ulcers.", "A longer study of ulcers of the stomach, and of what became of them.", "Epilepsy"]
    tokenized = tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt")
    example = tuple(tokenized[name] for name in names)
    file = output / ONNX_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    dynamic = {0: "batch", 1: "length"}
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            Logits(model, names),
            example,
            file,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=(tuple(dynamic for _ in names),),
        )
    except Exception as error:  # whatever a library raises over an encoder that it cannot follow, pages of it
        kind = type(model.encoder).__name__
        raise InputError(
            f"--onnx: {kind} cannot be exported ({type(error).__name__}): publish without --onnx"
        ) from error
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for some in (texts, texts[:1], [" ".join(texts) * 4] * 5):  # also of other sizes than the example
        inputs = tokenizer(some, padding=True, truncation=True, return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).logits.softmax(-1)
        (logits,) = session.run(["logits"], {name: inputs[name].numpy() for name in names})
        gap = (torch.from_numpy(logits).softmax(-1) - expected).abs().max().item()
        if not gap <= TOLERANCE:
            raise InputError(
                f"the ONNX file's probabilities differ from the model's by {gap:.1e}; publish without --onnx"
            )

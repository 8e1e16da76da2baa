"""Export a checkpoint: self-contained, with the adapter merged into the encoder, or as ONNX.

Optimum and transformers.js look for ``onnx/model.onnx`` beside config.json. The inputs are the tokenizer's, (batch, length) of
any size up to the model's limit. The output is ``logits``, (batch, num_leaves), whose softmax is the distribution over leaves.
"""

import logging
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from checkpoint_files import ADAPTER_FILES, ONNX_FILE, list_files
from errors import InputError, one_line
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing.hub import HUB_ERRORS

MERGE_TOLERANCE = 1e-4  # of a logit
ONNX_TOLERANCE = 1e-3  # of a leaf's probability


def export_merged(folder: Path, output: Path) -> Path:
    """Write the self-contained form of a checkpoint: the adapter merged into the encoder in full precision.

    Returns:
        The folder ``output``.

    Raises:
        InputError: the encoder cannot be loaded, or merging changes the logits by more than 1e-4.
    """
    load = HierarchicalForSequenceClassification.from_pretrained
    try:
        checkpoint = load(folder, dtype=torch.float32, merge_adapter=False)
        merged = load(folder, dtype=torch.float32, merge_adapter=False)
        merged.merge_adapter()
    except (*HUB_ERRORS, ValueError) as error:
        raise InputError(f"cannot load {folder}: {one_line(error)}") from error
    # RoBERTa does not use two of its positions
    length = min(64, getattr(merged.config.text_config, "max_position_embeddings", 66) - 2)
    vocab_size, generator = merged.config.text_config.vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (4, length), generator=generator)
    with torch.inference_mode():
        gap = (checkpoint(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max().item()
    if not gap <= MERGE_TOLERANCE:
        raise InputError(
            f"the merged model's logits differ from the checkpoint's by {gap:.1e}; publish without --merge"
        )
    merged.save_pretrained(output)
    for name in set(list_files(folder)) - set(ADAPTER_FILES):
        if not (output / name).exists():
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, output / name)
    return output


class Logits(nn.Module):
    """Wrap a model: take its inputs by position, and return its logits."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export_onnx(folder: Path, output: Path) -> Path:
    """Write a checkpoint as ``onnx/model.onnx`` below a folder, with any adapter merged into the encoder.

    Returns:
        The path of the ONNX file.

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
    except Exception as error:  # the exporter raises anything on an encoder that it cannot trace
        kind = type(model.encoder).__name__
        raise InputError(
            f"--onnx: {kind} cannot be exported ({type(error).__name__}): publish without --onnx"
        ) from error
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)

    # ── Compare with the model, also on shapes other than the example's ──────────────────────────────────────────────
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (texts, texts[:1], [" ".join(texts) * 4] * 5):
        inputs = tokenizer(batch, padding=True, truncation=True, return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).logits.softmax(-1)
        (logits,) = session.run(["logits"], {name: inputs[name].numpy() for name in names})
        gap = (torch.from_numpy(logits).softmax(-1) - expected).abs().max().item()
        if not gap <= ONNX_TOLERANCE:
            raise InputError(
                f"the ONNX file's probabilities differ from the model's by {gap:.1e}; publish without --onnx"
            )
    return file

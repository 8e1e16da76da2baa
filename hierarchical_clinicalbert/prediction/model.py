"""Load a checkpoint to classify records, and describe what its predictions depend on."""

import hashlib
import importlib.util
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import Pipeline, pipeline
from transformers.utils import cached_file

from hierarchical_clinicalbert.checkpoint_files import MODEL_FILES, list_files
from hierarchical_clinicalbert.errors import InputError, as_input_error, describe_error, one_line
from hierarchical_clinicalbert.files import sha256
from hierarchical_clinicalbert.machine import give_back_memory, has_bf16, keep_memory
from hierarchical_clinicalbert.prediction.output import Block, OutputRows
from hierarchical_clinicalbert.prediction.rows import TASKS, RowFormat, output_kind
from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code
from hierarchical_clinicalbert.reading.results import check_version

DTYPES = ("fp32", "bf16", "int8")
# arguments of `keep_memory`, which saves a tenth of the time
KEPT_MEMORY = (32 * 2**20, 2**30, 64 * 2**20)


class Model:
    """A checkpoint that one process runs on the GPU or the CPU.

    Args:
        arguments: the flags of predict.py; ``revision`` is a commit, or None for a folder.
        gpu: whether to load the model on the GPU.

    Attributes:
        row_format: the columns and the writers of the output.
        description: what predictions depend on, except flags and texts: dtype, weights, device and
        torch.

    Raises:
        InputError: the checkpoint cannot be loaded.
    """

    def __init__(self, arguments: Namespace, gpu: bool):
        # the fastest dtype that loses no accuracy on this machine; int8 does
        # (`benchmarks/coverage.py`)
        fastest = "bf16" if has_bf16(cpu=not gpu) else "fp32"
        dtype = fastest if arguments.dtype == "auto" else arguments.dtype
        self._pipeline = load(arguments, dtype, gpu)
        self._needs_levels = arguments.probabilities or arguments.uncertainty
        device = self._pipeline.device
        config = self._pipeline.model.config
        encoder = None if config.adapter_subfolder is None else Path(config.encoder_name_or_path)
        weights = fingerprint(arguments.model, arguments.revision, encoder)
        kind = output_kind(arguments.output, arguments.output_format)
        self.row_format = RowFormat(
            arguments, self._pipeline.model, version=weights[:12] if kind == TASKS else None
        )
        self.description = {
            "result_version": self._pipeline.result_version,
            "dtype": dtype,
            "operation_dtype": str(operation_dtype(dtype)),
            "fingerprint": weights,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }
        if arguments.backend == "openvino":
            self.description["openvino"] = version("openvino")

    def estimate_prior(self, texts: list[str]) -> list[float]:
        """Estimate the class frequencies of texts. InputError: there are none."""
        with as_input_error(self._pipeline.model.name_or_path):
            return self._pipeline.estimate_prior(texts)

    def predict(self, block: Block, prior: list[float] | None = None) -> OutputRows:
        """Classify the readable records of a block, and return one output row for each."""
        numbered = enumerate(block.records, start=block.first)
        readable = [(number, record) for number, record in numbered if record.problem is None]
        texts = (record.text for _, record in readable)
        corrected = {} if prior is None else {"prior": prior}
        try:
            predictions = self._pipeline(texts, levels=self._needs_levels, **corrected)
            return [
                self.row_format.row(*one, result)
                for one, result in zip(readable, predictions, strict=True)
            ]
        except ValueError as error:
            raise InputError(f"{self._pipeline.model.name_or_path}: {one_line(error)}") from error
        finally:
            give_back_memory()

    def predict_blocks(
        self, blocks: Iterable[Block], prior: list[float] | None = None
    ) -> Iterator[tuple[Block, OutputRows]]:
        """Yield each block with its output rows."""
        for block in blocks:
            yield block, self.predict(block, prior)


def load(arguments: Namespace, dtype: str, gpu: bool) -> Pipeline:
    """Load the checkpoint as a pipeline, or raise InputError."""
    keep_memory(*KEPT_MEMORY)
    if arguments.backend == "openvino":
        flag, other = (
            ("--dtype int8", "bf16 or fp32") if dtype == "int8" else ("--backend openvino", "torch")
        )
        if gpu:
            raise InputError(f"{flag} is for CPUs: give {other}")
        if importlib.util.find_spec("openvino") is None:
            raise InputError(f"{flag} needs OpenVINO: pip install openvino")
    named = {name: getattr(arguments, name) for name in ("batch_size", "coverage", "recall")}
    # pipelines of older checkpoints lack newer arguments
    given = {name: value for name, value in named.items() if value is not None}
    try:
        refuse_foreign_code(arguments.model, arguments.revision)
        classifier = pipeline(
            "hierarchical-text-classification",
            model=arguments.model,
            revision=arguments.revision,
            code_revision=arguments.revision,
            trust_remote_code=True,
            dtype=torch.float32 if arguments.backend == "openvino" else operation_dtype(dtype),
            device=torch.accelerator.current_accelerator() if gpu else "cpu",
            **given,
        )
        if arguments.backend == "openvino":
            from hierarchical_clinicalbert.prediction.openvino import OpenVinoEncoder, convert

            # the pipeline always passes a mask
            names = [*{*classifier.tokenizer.model_input_names, "attention_mask"}]
            converted = convert(classifier.model.encoder, names, dtype == "int8")
            classifier.model.encoder = OpenVinoEncoder(converted, operation_dtype(dtype))
        check_version(classifier)
        # checks the arguments before an existing output is overwritten; in place of an estimated
        # prior, the stored one, or [], which is refused
        stored = getattr(getattr(classifier.model.config, "calibration", None), "prior", None) or []
        classifier("a", **({"prior": stored} if arguments.adapt_prior else {}))
    except Exception as error:  # loading runs the checkpoint's own code, which can raise anything
        problem = describe_load_error(error)
        # MRA mixes dtypes unless it runs in float32, and so does DeBERTa (version 1) of
        # transformers 5.24
        if "same dtype" in problem and dtype != "fp32":
            problem = "its encoder computes in float32 only: give --dtype fp32"
        raise InputError(f"cannot use the model {arguments.model}: {problem}") from error
    return classifier


def describe_load_error(error: Exception) -> str:
    """Describe in one line why a model cannot be loaded."""
    if "Unknown task" in str(error):
        return (
            "it is not a checkpoint of this project: its config.json names no hierarchical pipeline"
        )
    # this message of transformers holds tracebacks, and its last line is the cause
    if "See the original errors" in str(error):
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    return describe_error(error)


def operation_dtype(dtype: str) -> torch.dtype:
    """Return the dtype of the encoder's operations.

    With int8, all other operations use the faster dtype of this machine.
    """
    is_bf16 = has_bf16(cpu=True) if dtype == "int8" else dtype == "bf16"
    return torch.bfloat16 if is_bf16 else torch.float32


def fingerprint(model: str, revision: str | None, encoder: Path | None) -> str:
    """Return a hash of a checkpoint's model files, and of its encoder's files if the encoder is in
    a folder.
    """
    folder = Path(cached_file(model, "config.json", revision=revision)).parent
    # without card, scores and plots, which may be absent from the Hub's cache
    hashes = [sha256(folder / name for name in list_files(folder, MODEL_FILES))]
    # config.json pins an encoder on the Hub by its commit; an encoder in a folder needs hashes
    if encoder is not None and encoder.is_dir():
        hashes.append(
            sha256(
                file
                for kind in ("json", "safetensors", "bin")
                for file in encoder.glob(f"*.{kind}")
            )
        )
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

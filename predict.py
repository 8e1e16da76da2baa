"""Classifies files of texts: ``python predict.py --model FOLDER_OR_ID --input texts.csv --output predictions.jsonl``.

Worth knowing:

1. Texts are read, classified and written in parts, so memory does not grow with the file.
2. Killed at any moment and started again with the same arguments, the command goes on where it was, and ends with the same
   bytes (`prediction.output`). It refuses to go on with another model, other options or another input.
3. Rows that cannot be read stand in ``<output>.errors.jsonl``; all others are classified, and the exit code is 1 then.
4. The model is loaded as any user loads it, through `pipeline`.
"""

import argparse
import hashlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from transformers import Pipeline, pipeline
from transformers.utils import cached_file

from checkpoint_files import MODEL_FILES, list_files
from errors import InputError, asked_traceback, exit_with_error, is_full_disk, one_line
from prediction.input import Record, read_records
from prediction.output import RestartableOutput
from prediction.rows import OUTPUTS, RowFormat
from reading.rows import KINDS
from reading.sources import Source, find_sources
from training.files import check_writable
from training.memory import give_back_memory, keep_memory
from training.precision import has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # in which the encoder is loaded
KEPT_MEMORY = (32 * 2**20, 2**30, 64 * 2**20)  # of `keep_memory`, which saves a tenth of the time


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    sources = find_inputs(arguments)
    check_writable("--output", Path(arguments.output).parent)
    output = RestartableOutput(Path(arguments.output))
    output.refuse_inputs(source.path for source in sources)
    with output.lock():
        if not arguments.overwrite:
            output.refuse_finished()
        records = open_records(arguments, sources)
        classifier = load(arguments)
        if arguments.overwrite:
            output.delete()
        rows = row_format(arguments, classifier)
        predict = partial(predict_rows, arguments, classifier, rows)
        with ProgressBar() as bar:
            output.write_parts(records, options(arguments, classifier), predict, bar.advance)
            num_problems = output.put_together(rows.open)
    return conclude(output, num_problems)


def conclude(output: RestartableOutput, num_problems: int) -> int:
    """Say what was done.

    Returns:
        The exit code.
    """
    problems = f"; {num_problems:,} rows could not be read: {output.errors}" if num_problems else ""
    print(f"done: {output.path}{problems}", file=sys.stderr)
    return 1 if num_problems else 0


def find_inputs(arguments: argparse.Namespace) -> list[Source]:
    """Return the files that ``--input`` means.

    Raises:
        InputError: there is none, or its kind is not known.
    """
    if arguments.input == "-" and arguments.input_format is None:
        raise InputError(f"--input - needs --input_format, one of {', '.join(KINDS)}")
    try:
        return find_sources(arguments.input, arguments.input_format)
    except InputError as error:
        raise InputError(f"--input {error}") from error


def open_records(arguments: argparse.Namespace, sources: list[Source]) -> Iterator[Record]:
    """Return the rows of the inputs.

    Raises:
        InputError: there are none, or the first input cannot be read or lacks the columns.
    """
    records = read_records(sources, arguments.text_column, arguments.id_column)
    first = list(islice(records, 1))
    if not first:
        raise InputError(f"--input {arguments.input} has no rows")
    return chain(first, records)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a checkpoint's folder, or its id on the Hub")
    parser.add_argument("--revision", help="commit, tag or branch of that repository")
    parser.add_argument(
        "--input", required=True, help="a file, a quoted pattern such as 'part-*.csv', or - for standard input"
    )
    parser.add_argument("--input_format", choices=KINDS, help="by default what the name of the file says")
    parser.add_argument("--text_column", help="by default found by its name")
    parser.add_argument("--id_column", help="a column to be copied to the output")
    parser.add_argument("--output", required=True, help=f"a file, {', '.join(OUTPUTS)}")
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever is there already")
    parser.add_argument("--probabilities", action="store_true", help="write the probability of every leaf")
    parser.add_argument(
        "--coverage", type=float, help="also write the answer that holds the right leaf for this share of texts"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="by default bf16 where the machine has it, else int8 on a CPU that has its products and torchao, else fp32",
    )
    parser.add_argument("--batch_size", type=int, help="texts that go through the model together; by default by tokens")
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args(argv)
    if len(Path(arguments.output).name.encode()) > 200:  # it grows endings, and file systems take 255 bytes
        raise InputError(f"--output {arguments.output}: the name is too long")
    if Path(arguments.output).suffix not in OUTPUTS:
        raise InputError(f"--output {arguments.output}: its name must end in one of {', '.join(OUTPUTS)}")
    if arguments.revision is not None and Path(arguments.model).is_dir():
        raise InputError(f"--revision {arguments.revision} does not apply to the folder {arguments.model}")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {arguments.batch_size}")
    if arguments.coverage is not None and not 0 < arguments.coverage < 1:
        raise InputError(f"--coverage must be between 0 and 1, not {arguments.coverage}")
    return arguments


def refuse(message: str) -> NoReturn:
    raise InputError(message)


def load(arguments: argparse.Namespace) -> Pipeline:
    # before they are imported: the one asks for kernels from the Hub, whose code is not pinned, the other lists those that do
    # not fit
    for library in ("bitsandbytes", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    keep_memory(*KEPT_MEMORY)
    gpu = torch.cuda.is_available()
    arguments.dtype = choose_dtype(gpu) if arguments.dtype == "auto" else arguments.dtype
    if arguments.dtype == "int8" and gpu:
        raise InputError("--dtype int8 is for CPUs: give bf16 or fp32")
    try:
        classifier = pipeline(
            "hierarchical-text-classification",
            model=arguments.model,
            revision=arguments.revision,
            code_revision=arguments.revision,
            trust_remote_code=True,
            dtype=DTYPES[arguments.dtype],
            device=0 if gpu else "cpu",
        )
    except MemoryError:
        raise
    except Exception as error:  # loading runs transformers, and the checkpoint's own code
        raise InputError(f"cannot load the model {arguments.model}: {cause(error)}") from error
    if arguments.dtype == "int8":
        quantize(classifier.model.encoder)
    if arguments.coverage is not None and classifier.model.config.conformal_thresholds is None:
        raise InputError(f"--coverage needs a checkpoint that was calibrated, which {arguments.model} is not")
    return classifier


def cause(error: Exception) -> str:
    """Return in one line why a model cannot be loaded."""
    if "Unknown task" in str(error):
        return "it is not a checkpoint of this project: its config.json names no hierarchical pipeline"
    # transformers puts tracebacks into its message, which end with the cause
    if "See the original errors" in str(error):
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"


def choose_dtype(gpu: bool) -> str:
    """Return the name of the dtype that this machine multiplies fastest."""
    if has_bf16(cpu=not gpu):
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    products = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return "int8" if products and not gpu and importlib.util.find_spec("torchao") else "fp32"


def quantize(encoder: torch.nn.Module) -> None:
    """Quantize linear layers: weights with a scale for each row, inputs with a scale for each token, both in 8 bits."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise InputError(f"--dtype int8 needs torchao: pip install torchao ({one_line(error)})") from error
    quantize_(encoder, Int8DynamicActivationInt8WeightConfig())


def options(arguments: argparse.Namespace, classifier: Pipeline) -> dict[str, Any]:
    """Return all that the bytes of the output depend on, apart from the texts."""
    names = (
        "model",
        "input_format",
        "text_column",
        "id_column",
        "probabilities",
        "coverage",
        "dtype",
        "batch_size",
    )
    folder = Path(cached_file(arguments.model, "config.json", revision=arguments.revision)).parent
    # without card, scores and plots, which a folder of the Hub's cache may have or not
    names_of = {folder / name: name for name in list_files(folder, MODEL_FILES)}
    # an encoder on the Hub is pinned by its commit, which config.json holds; one in a folder is not
    encoder = Path(classifier.model.config.encoder_name_or_path)
    if encoder.is_dir():
        files = sorted(file for kind in ("json", "safetensors", "bin") for file in encoder.glob(f"*.{kind}"))
        names_of |= {file: f"encoder: {file.name}" for file in files}
    digest = hashlib.sha256()
    for file, name in names_of.items():
        digest.update(name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    device = (
        torch.cuda.get_device_name(classifier.device) if classifier.device.type == "cuda" else classifier.device.type
    )
    versions = {"torch": torch.__version__, "device": device}
    return {**{name: getattr(arguments, name) for name in names}, "fingerprint": digest.hexdigest(), **versions}


def row_format(arguments: argparse.Namespace, classifier: Pipeline) -> RowFormat:
    leaves = classifier.tree.labels[: classifier.tree.num_leaves] if arguments.probabilities else []
    suffix = Path(arguments.output).suffix
    return RowFormat(suffix, arguments.id_column is not None, arguments.coverage is not None, leaves)


def predict_rows(
    arguments: argparse.Namespace, classifier: Pipeline, rows: RowFormat, first: int, records: list[Record]
) -> list[dict[str, Any]]:
    """Return the output's rows of those records that can be read.

    Args:
        first: the number of the first record.
    """
    readable = [(number, record) for number, record in enumerate(records, first) if record.problem is None]
    coverage = {} if arguments.coverage is None else {"coverage": arguments.coverage}
    try:
        predictions = classifier((record.text for _, record in readable), batch_size=arguments.batch_size, **coverage)
        return [rows.row(*one, prediction) for one, prediction in zip(readable, predictions, strict=True)]
    except ValueError as error:
        raise InputError(f"{arguments.model}: {one_line(error)}") from error
    finally:
        give_back_memory()


class ProgressBar:
    """Progress on standard error: the share of the input, rows, rows a second, and the time that is left."""

    def __init__(self) -> None:
        self.rows, self.started = 0, time.monotonic()
        form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=100, bar_format=form, disable=None)

    def advance(self, rows: int, done: float | None) -> None:
        self.rows += rows
        self.bar.n = 100 * (done or 0.0)
        speed = self.rows / (time.monotonic() - self.started)
        self.bar.set_postfix_str(f"{self.rows:,} rows, {speed:.1f} rows/s")

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


if __name__ == "__main__":
    said, code, trace = None, 2, ""
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        said, trace = str(error), asked_traceback()
    except KeyboardInterrupt:
        said, code = "stopped; the same command goes on where it was", 130
    except OSError as error:
        if not is_full_disk(error) and error.filename is None:
            raise
        remedy = "make room" if is_full_disk(error) else "it can be neither written nor read"
        said, trace = f"{one_line(error)}: {remedy}; the same command goes on where it was", asked_traceback()
    if said is not None:
        exit_with_error("predict.py", said, code, trace)
    sys.exit(code)

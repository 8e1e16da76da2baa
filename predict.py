"""Classify files of texts: ``python predict.py --model FOLDER_OR_ID --input texts.csv --output predictions.jsonl``.

Worth knowing:

1. Texts are read, classified and written in parts, so memory does not grow with the file.
2. A killed run continues when the same command is given again, and writes the same bytes (`prediction.output`). A run with
   another model, another input or other options is refused.
3. Rows that cannot be read are written to ``<output>.errors.jsonl``, and the exit code is 1. All other rows are classified.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
from functools import partial
from itertools import chain
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
from reading.sources import find_sources
from training.files import check_writable, sha256
from training.memory import give_back_memory, keep_memory
from training.precision import has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # the encoder is loaded in these
KEPT_MEMORY = (32 * 2**20, 2**30, 64 * 2**20)  # arguments of `keep_memory`, which saves a tenth of the time


def main(argv: list[str]) -> int:
    """Run the command, and return its exit code."""
    arguments = parse(argv)
    try:
        sources = find_sources(arguments.input, arguments.input_format)
    except InputError as error:
        raise InputError(f"--input {error}") from error
    check_writable("--output", Path(arguments.output).parent)
    output = RestartableOutput(Path(arguments.output))
    with output.lock():
        output.check((source.path for source in sources), arguments.overwrite)
        records = read_records(sources, arguments.text_column, arguments.id_column)
        first = next(records, None)  # refuses an unusable input before the model is loaded
        if first is None:
            raise InputError(f"--input {arguments.input} has no rows")
        classifier = load(arguments)
        if arguments.overwrite:
            output.delete()
        config, by_id = classifier.model.config, arguments.id_column is not None
        classes = [*config.id2label.values()] if arguments.probabilities else []
        answers = (arguments.coverage, arguments.recall) != (None, None)
        rows = RowFormat(by_id, config.is_multi_label, answers, classes)
        predict = partial(predict_rows, classifier, rows)
        with tqdm(unit=" rows", disable=None) as bar:
            output.write_parts(chain([first], records), options(arguments, classifier), predict, partial(advance, bar))
        num_problems = output.join_parts(rows.open)
    problems = f"; {num_problems:,} rows could not be read: {output.errors}" if num_problems else ""
    print(f"done: {output.path}{problems}", file=sys.stderr)
    return 1 if num_problems else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.py", description="Classify files of texts.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint: a folder, or an id on the Hub")
    add("--revision", help="commit, tag or branch of the model on the Hub")
    add("--input", required=True, help="a file, a quoted pattern like 'part-*.csv', or - for stdin")
    add("--input_format", choices=KINDS, help="default: from the file name's suffix")
    add("--text_column", help="the column of texts; default: the column with a usual name, such as text")
    add("--id_column", help="a column of ids to copy to the output")
    add("--output", required=True, help=f"the file to write, ending in {', '.join(OUTPUTS)}")
    add("--overwrite", action="store_true", help="replace an existing output, and start from the beginning")
    add("--probabilities", action="store_true", help="write the probability of every class")
    add("--coverage", type=float, help="also write an answer that contains the correct leaf for this share of texts")
    add(
        "--recall", type=float, help="with several labels a text: an answer that contains this share of them on average"
    )
    dtypes = "bf16 if the machine supports it, int8 on a CPU with VNNI or AMX and torchao, else fp32"
    add("--dtype", choices=("auto", *DTYPES), default="auto", help=f"default: auto, which is {dtypes}")
    add("--batch_size", type=int, help="texts per batch; default: batches by number of tokens")
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args(argv)
    if len(Path(arguments.output).name.encode()) > 200:  # suffixes are added, and file systems allow 255 bytes
        refuse(f"--output {arguments.output}: the name is too long")
    if Path(arguments.output).suffix not in OUTPUTS:
        refuse(f"--output {arguments.output}: its name must end in one of {', '.join(OUTPUTS)}")
    if arguments.revision is not None and Path(arguments.model).is_dir():
        refuse(f"--revision {arguments.revision} does not apply to the folder {arguments.model}")
    for flag, share in (("coverage", arguments.coverage), ("recall", arguments.recall)):
        if share is not None and not 0 < share < 1:
            refuse(f"--{flag} must be between 0 and 1, not {share}")
    return arguments


def refuse(message: str) -> NoReturn:
    raise InputError(message)


def load(arguments: argparse.Namespace) -> Pipeline:
    """Load the checkpoint as a pipeline, and replace ``--dtype auto`` by the dtype that was chosen."""
    # before they are imported: bitsandbytes warns of kernels on the Hub, whose code is not pinned, torchao of kernels that
    # do not fit
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
            batch_size=arguments.batch_size,
            coverage=arguments.coverage,
            recall=arguments.recall,
        )
    except Exception as error:  # loading runs the checkpoint's own code, which can raise anything
        raise InputError(f"cannot load the model {arguments.model}: {cause(error)}") from error
    if arguments.dtype == "int8":
        quantize(classifier.model.encoder)
    return classifier


def cause(error: Exception) -> str:
    """Describe in one line why a model cannot be loaded."""
    if "Unknown task" in str(error):
        return "it is not a checkpoint of this project: its config.json names no hierarchical pipeline"
    # this message of transformers holds tracebacks, and its last line is the cause
    if "See the original errors" in str(error):
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    plain = isinstance(error, OSError | ValueError | ImportError)
    return one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"


def choose_dtype(gpu: bool) -> str:
    """Return the name of the fastest dtype on this machine."""
    if has_bf16(cpu=not gpu):
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    multiplies_int8 = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return "int8" if multiplies_int8 and not gpu and importlib.util.find_spec("torchao") else "fp32"


def quantize(encoder: torch.nn.Module) -> None:
    """Quantize linear layers to 8 bits, in place: weights with a scale per row, inputs with a scale per token."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise InputError(f"--dtype int8 needs torchao: pip install torchao ({one_line(error)})") from error
    quantize_(encoder, Int8DynamicActivationInt8WeightConfig())


def options(arguments: argparse.Namespace, classifier: Pipeline) -> dict[str, Any]:
    """Collect everything that the output's bytes depend on, except the texts: flags, weights, device, torch."""
    flags = (
        "model",
        "input_format",
        "text_column",
        "id_column",
        "probabilities",
        "coverage",
        "recall",
        "dtype",
        "batch_size",
    )
    folder = Path(cached_file(arguments.model, "config.json", revision=arguments.revision)).parent
    # without card, scores and plots, which may be absent from the Hub's cache
    hashes = [sha256(folder / name for name in list_files(folder, MODEL_FILES))]
    # config.json pins an encoder on the Hub by its commit; an encoder in a folder needs hashes
    encoder = Path(classifier.model.config.encoder_name_or_path)
    if encoder.is_dir():
        hashes.append(sha256(file for kind in ("json", "safetensors", "bin") for file in encoder.glob(f"*.{kind}")))
    return {
        **{flag: getattr(arguments, flag) for flag in flags},
        "fingerprint": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(classifier.device) if classifier.device.type == "cuda" else "cpu",
    }


def predict_rows(classifier: Pipeline, rows: RowFormat, first: int, records: list[Record]) -> list[dict[str, Any]]:
    """Classify the readable records, numbered from ``first``, and return one output row for each."""
    readable = [(number, record) for number, record in enumerate(records, first) if record.problem is None]
    try:
        predictions = classifier(record.text for _, record in readable)
        return [rows.row(*numbered, prediction) for numbered, prediction in zip(readable, predictions, strict=True)]
    except ValueError as error:
        raise InputError(f"{classifier.model.name_or_path}: {one_line(error)}") from error
    finally:
        give_back_memory()


def advance(bar: tqdm, rows: int, done: float | None) -> None:
    """Advance the progress bar, and estimate its total from the share of the input that was read."""
    bar.total = round((bar.n + rows) / done) if done else None
    bar.update(rows)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        exit_with_error("predict.py", str(error), trace=asked_traceback())
    except KeyboardInterrupt:
        exit_with_error("predict.py", "stopped; the same command continues from here", 130)
    except OSError as error:
        if not is_full_disk(error) and error.filename is None:
            raise
        remedy = "make room" if is_full_disk(error) else "it can be neither written nor read"
        message = f"{one_line(error)}: {remedy}; the same command continues from here"
        exit_with_error("predict.py", message, trace=asked_traceback())

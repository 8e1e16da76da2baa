"""Classify files of texts: ``python predict.py --model FOLDER_OR_ID --input texts.csv --output
predictions.jsonl``.

Worth knowing:

1. Texts are read, classified and written in blocks, so memory does not grow with the file.
2. A killed run continues when the same command is given again, and writes the same bytes
   (`prediction.output`). A run with another model, another input or other options is refused.
3. Rows that cannot be read are listed in an error file, and the exit code is 1. All other rows are
   classified.
4. ``--ray`` has the actors of a Ray cluster classify the blocks (`prediction.ray_job`). All else is
   the same.
"""

import argparse
import importlib.util
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hierarchical_clinicalbert.checkpoint_files import (
    find_snapshot,
    find_trained_texts,
    is_checkpoint,
    require_encoder,
)
from hierarchical_clinicalbert.errors import ArgumentParser, InputError, run_command
from hierarchical_clinicalbert.prediction.input import SAMPLED_TEXTS, read_records, sample_texts
from hierarchical_clinicalbert.prediction.model import DTYPES, Model
from hierarchical_clinicalbert.prediction.output import RestartableOutput
from hierarchical_clinicalbert.prediction.rows import OUTPUTS, file_name, output_kind
from hierarchical_clinicalbert.reading.rows import FOLDER, KINDS
from hierarchical_clinicalbert.reading.sources import find_all_sources

if TYPE_CHECKING:
    from hierarchical_clinicalbert.prediction.ray_job import RayJob

# flags that change no prediction for a text, or that the model's description covers
WITHOUT_EFFECT = {
    *("revision", "input", "encoding", "output", "overwrite"),
    *("ray", "ray_cpus_per_actor", "ray_gpus_per_actor"),
}


def main(argv: list[str]) -> int:
    """Run the command, and return its exit code."""
    arguments = parse(argv)
    try:
        sources = find_all_sources(arguments.input, arguments.input_format, arguments.encoding)
    except InputError as error:
        raise InputError(f"--input {error}") from error
    if arguments.id_column is None and all(source.kind == FOLDER for source in sources):
        arguments.id_column = "id"  # the name of a text's file
    output = RestartableOutput(
        arguments.output, output_kind(arguments.output, arguments.output_format)
    )
    with output.lock():
        sources = output.check(sources, arguments.overwrite)
        records = read_records(sources, arguments.text_column, arguments.id_column)
        first = next(records, None)  # refuses an unusable input before the model is loaded
        if first is None:
            raise InputError(f"--input {' '.join(arguments.input)} has no rows")
        if snapshot := find_snapshot(arguments.model, arguments.revision):
            arguments.revision = snapshot.name  # so that all processes load the same commit
        if is_checkpoint(folder := snapshot or Path(arguments.model)):
            require_encoder(folder)
        with open_model(arguments) as model:
            if arguments.overwrite:
                output.delete()
            flags = {
                flag: value for flag, value in vars(arguments).items() if flag not in WITHOUT_EFFECT
            }
            options = flags | {"output_format": output.kind} | model.description
            prior = None
            if arguments.adapt_prior:
                again = read_records(sources, arguments.text_column, arguments.id_column)
                prior = output.stored_option("prior") or model.estimate_prior(sample_texts(again))
                options |= {"prior": prior}
            output.write_blocks(
                chain([first], records), options, partial(model.predict_blocks, prior=prior)
            )
        files = [{"name": source.name, "bytes": source.size} for source in sources]
        manifest = {
            "model": arguments.model,
            "commit": arguments.revision,
            "options": options,
            "input": files,
        }
        # of a teacher: `train.py --teacher` then scores none of them
        trained_texts = find_trained_texts(arguments.model) if arguments.probabilities else None
        num_problems = output.join_blocks(model.row_format, manifest, trained_texts)
    problems = f"; {num_problems:,} rows could not be read: {output.errors}" if num_problems else ""
    print(f"done: {output.name}{problems}", file=sys.stderr)
    return 1 if num_problems else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="predict.py", description="Classify files of texts.")
    # ── Flags ─────────────────────────────────────────────────────────────────────────────────────
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint: a folder, or an id on the Hub")
    add("--revision", help="commit, tag or branch of the model on the Hub")
    places = (
        "files, quoted patterns like 'part-*.csv', folders, URLs like s3://bucket/folder/, or - "
        "for stdin"
    )
    add("--input", required=True, nargs="+", action="extend", help=places)
    add("--input_format", choices=KINDS, help="default: from the file name's suffix")
    add("--encoding", help="of text files, such as cp1252 or utf-16; default: UTF-8")
    add(
        "--text_column",
        help="the column of texts; default: the first usual name, such as abstract or text",
    )
    add("--id_column", help="a column of ids, in place of row numbers")
    suffixes = ", ".join(OUTPUTS)
    add(
        "--output",
        required=True,
        help=f"the file to write, ending in {suffixes}, or a folder, ending in /; or a URL",
    )
    add(
        "--output_format",
        choices=("parquet", "jsonl", "tasks.json"),
        help="format of the files in a folder; default: parquet",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing output, and start from the beginning",
    )
    add(
        "--probabilities",
        action="store_true",
        help="write the probability of every leaf; multi-label: of every node",
    )
    add(
        "--coverage",
        type=float,
        help=(
            "also write a set of nodes that holds the correct leaf, on average for this share "
            "of texts"
        ),
    )
    add(
        "--recall",
        type=float,
        help=(
            "multi-label: also write a set of nodes with this share of the correct ones, on average"
        ),
    )
    sample = f"estimated on at most {SAMPLED_TEXTS:,} of them"
    add(
        "--adapt_prior",
        action="store_true",
        help=f"correct probabilities for the texts' class frequencies, {sample}",
    )
    add(
        "--uncertainty",
        action="store_true",
        help="also write the entropy, and the level that contributes most to it",
    )
    dtypes = (
        "bf16 if the machine supports it, else fp32; int8, by OpenVINO on CPUs, is faster and "
        "less accurate"
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"default: auto, which is {dtypes}",
    )
    backends = (
        "openvino, which is faster on some CPUs, needs pip install openvino; default: torch, "
        "but openvino for int8"
    )
    add("--backend", choices=("torch", "openvino"), help=f"what runs the encoder; {backends}")
    add("--batch_size", type=int, help="texts per batch; default: batches by number of tokens")
    addresses = (
        "the cluster's address, auto, or local, which starts Ray on this machine; default: local"
    )
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help=f"classify on a Ray cluster: {addresses}",
    )
    add("--ray_cpus_per_actor", type=int, help="cores of each copy of the model; default: 1")
    gpu_help = (
        "GPUs of each copy of the model, possibly a fraction; default: 1 if the cluster has "
        "GPUs, else 0"
    )
    add("--ray_gpus_per_actor", type=float, help=gpu_help)
    arguments = parser.parse_args(argv)

    # ── Checks that argparse cannot make ──────────────────────────────────────────────────────────
    if output_kind(arguments.output, arguments.output_format) not in OUTPUTS:
        raise InputError(
            f"--output {arguments.output}: its name must end in one of {suffixes}, or in / "
            "for a folder"
        )
    if arguments.output_format and not file_name(arguments.output).endswith("/"):
        raise InputError(
            f"--output_format is for a folder: end --output {arguments.output} in /, or "
            "leave it out"
        )
    if arguments.output.startswith("hf://"):  # each block would be a commit
        raise InputError(
            f"--output {arguments.output}: write to a disk or an object store, and upload "
            "the result"
        )
    if arguments.revision is not None and Path(arguments.model).is_dir():
        raise InputError(
            f"--revision {arguments.revision} does not apply to the folder {arguments.model}"
        )
    if arguments.dtype == "int8" and arguments.backend == "torch":
        raise InputError(
            "--dtype int8 is OpenVINO's: leave out --backend torch, or give bf16 or fp32"
        )
    if arguments.backend is None:
        arguments.backend = "openvino" if arguments.dtype == "int8" else "torch"
    if arguments.adapt_prior and "-" in arguments.input:
        raise InputError(
            "--adapt_prior reads --input twice, and standard input can be read once: give a file"
        )
    cpus = arguments.ray_cpus_per_actor
    gpus = arguments.ray_gpus_per_actor
    if arguments.ray is None and (cpus, gpus) != (None, None):
        raise InputError("--ray_cpus_per_actor and --ray_gpus_per_actor need --ray")
    if cpus is not None and cpus < 1:
        raise InputError(f"--ray_cpus_per_actor must be at least 1, not {cpus}")
    if gpus is not None and not (0 <= gpus < 1 or (gpus.is_integer() and gpus > 0)):
        raise InputError(
            f"--ray_gpus_per_actor must be a number of GPUs, or a fraction of one, not {gpus:g}"
        )
    return arguments


def open_model(arguments: argparse.Namespace) -> "AbstractContextManager[Model | RayJob]":
    """Load the model in this process, or on a Ray cluster."""
    if arguments.ray is None:
        needs_cpu = arguments.backend == "openvino"
        return nullcontext(Model(arguments, gpu=torch.accelerator.is_available() and not needs_cpu))
    if importlib.util.find_spec("ray") is None:
        raise InputError('--ray needs Ray: pip install "ray[default]"')
    from hierarchical_clinicalbert.prediction.ray_job import RayJob

    return closing(RayJob(arguments))


if __name__ == "__main__":
    without = " without --overwrite" if "--overwrite" in sys.argv else ""
    advice = {"resume": f"the same command{without} continues from here"}
    advice |= {
        "disk": f"make room; {advice['resume']}",
        "memory": "start over with a smaller --batch_size",
    }
    run_command("predict.py", main, advice, code_of_bugs=3)  # 1 says that rows could not be read

"""Classifies a file of texts: ``python predict.py --model FOLDER_OR_ID --input texts.csv --output predictions.jsonl``.

Worth knowing:

1. Texts are read, classified and written `ROWS` at a time, so memory does not grow with the file.
2. What is finished lies in ``<output>.partial``, and ``<output>.state.json`` says how much of it is whole. Killed at any moment
   and started again with the same arguments, the command goes on there, and ends with the same bytes as an unbroken run.
3. It goes on only where model, options and the texts that were read already are the same, by their fingerprints.
4. Rows that cannot be read stand in ``<output>.errors.jsonl``; all others are classified, and the exit code is 1 then.
5. The model is loaded as any user loads it, through `pipeline`.
"""

import argparse
import csv
import hashlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

# before it is imported: it asks for kernels from the Hub, whose code is not pinned
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import pyarrow
import pyarrow.parquet
import torch
from tqdm import tqdm
from transformers import Pipeline, pipeline
from transformers.utils import cached_file

from training import InputError, asked_traceback, leave, one_line
from training.arguments import has_bf16
from training.files import check_writable
from training.records import KINDS, Record, find_inputs, read_records
from training.resume import is_full_disk

ROWS = 1024  # read ahead, sorted by length, and written together
OUTPUTS = (".jsonl", ".csv", ".parquet")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIGITS = 6


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    output = Path(arguments.output)
    inputs = find_inputs(arguments.input, arguments.input_format)
    check_writable("--output", output.parent)
    if output.exists() and not arguments.overwrite:
        raise InputError(f"--output {output} is there already: give another name, or --overwrite")
    records = read_records(inputs, arguments.text_column, arguments.id_column)
    first = next(records, None)  # what is wrong with the files is said before the model is loaded
    if first is None:
        raise InputError(f"--input {arguments.input} has no rows")
    classify = load(arguments)
    leaves = classify.tree.labels[: classify.tree.num_leaves]
    output.parent.mkdir(parents=True, exist_ok=True)
    run = Run(output, options(arguments, classify), arguments.overwrite)
    records = chain([first], records)
    run.skip(records)
    wanted = {} if arguments.coverage is None else {"coverage": arguments.coverage}
    with run, Bar(run.rows) as bar:
        while chunk := list(islice(records, ROWS)):
            readable = [record for record in chunk if record.problem is None]
            try:
                results = classify([record.text for record in readable], batch_size=arguments.batch_size, **wanted)
            except ValueError as error:
                raise InputError(f"{arguments.model}: {one_line(error)}") from error
            found = dict(zip(map(id, readable), results, strict=True))
            rows = [
                line(run.rows + i, record, found[id(record)], arguments, leaves)
                for i, record in enumerate(chunk)
                if record.problem is None
            ]
            problems = [
                {"row": run.rows + i, "source": record.source, "line": record.line, "problem": record.problem}
                for i, record in enumerate(chunk)
                if record.problem is not None
            ]
            run.write(chunk, rows, problems)
            bar.move(len(chunk), chunk[-1].done)
        run.finish()
    said = f"{run.rows - run.problems:,} rows classified: {output}"
    if run.problems:
        said += f"; {run.problems:,} could not be read: {run.errors}"
    print(said, file=sys.stderr)
    return 1 if run.problems else 0


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
    parser.add_argument("--output", required=True, help=f"a file of one of the kinds {', '.join(OUTPUTS)}")
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever is there already")
    parser.add_argument("--probabilities", action="store_true", help="write the probability of every leaf")
    parser.add_argument(
        "--coverage", type=float, help="also write the answer that holds the right leaf for this share of texts"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="default: bf16 where the machine has it"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="texts that go through the model together")
    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args(argv)
    if Path(arguments.output).suffix not in OUTPUTS:
        raise InputError(f"--output {arguments.output}: its name must end in one of {', '.join(OUTPUTS)}")
    if len(Path(arguments.output).name.encode()) > 200:  # it grows endings, and file systems take 255 bytes
        raise InputError(f"--output {arguments.output}: the name is too long")
    if arguments.revision is not None and Path(arguments.model).is_dir():
        raise InputError(f"--revision {arguments.revision} does not apply to the folder {arguments.model}")
    if Path(arguments.output).is_dir():
        raise InputError(f"--output {arguments.output} is a folder")
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {arguments.batch_size}")
    if arguments.coverage is not None and not 0 < arguments.coverage < 1:
        raise InputError(f"--coverage must be between 0 and 1, not {arguments.coverage}")
    return arguments


def refuse(message: str) -> NoReturn:
    raise InputError(message)


def load(arguments: argparse.Namespace) -> Pipeline:
    gpu = torch.cuda.is_available()
    dtype = arguments.dtype if arguments.dtype != "auto" else "bf16" if has_bf16(cpu=not gpu) else "fp32"
    arguments.dtype = dtype  # what it came to is part of the options that a broken-off run must share
    try:
        classify = pipeline(
            "hierarchical-text-classification",
            model=arguments.model,
            revision=arguments.revision,
            trust_remote_code=True,
            dtype=DTYPES[dtype],
            device=0 if gpu else "cpu",
        )
    except MemoryError:
        raise
    except Exception as error:  # loading runs transformers, and the checkpoint's own code
        raise InputError(f"cannot load the model {arguments.model}: {cause(error)}") from error
    if arguments.coverage is not None and classify.model.config.conformal_thresholds is None:
        raise InputError(f"--coverage needs a checkpoint that was calibrated, which {arguments.model} is not")
    return classify


def cause(error: Exception) -> str:
    """Why a model cannot be loaded, in one line."""
    if "Unknown task" in str(error):
        return "it is not a checkpoint of this project: its config.json names no hierarchical pipeline"
    if "See the original errors" in str(
        error
    ):  # transformers puts tracebacks into its message, which end with the cause
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"


def options(arguments: argparse.Namespace, classify: Pipeline) -> dict[str, Any]:
    """What the bytes of the output depend on, apart from the texts."""
    names = (
        "model",
        "input",
        "input_format",
        "text_column",
        "id_column",
        "probabilities",
        "coverage",
        "dtype",
        "batch_size",
    )
    folder = Path(cached_file(arguments.model, "config.json", revision=arguments.revision)).parent
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.py"), *folder.rglob("*.safetensors")]):
        if "checkpoint-" not in file.relative_to(folder).as_posix():
            digest.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    versions = {"torch": torch.__version__, "device": classify.device.type, "threads": torch.get_num_threads()}
    return {**{name: getattr(arguments, name) for name in names}, "fingerprint": digest.hexdigest(), **versions}


def line(
    row: int, record: Record, result: dict[str, Any], arguments: argparse.Namespace, leaves: list[str]
) -> dict[str, Any]:
    """A row of the output."""
    found: dict[str, Any] = {"row": row} if arguments.id_column is None else {"id": record.id}
    found |= {
        "label": result["label"],
        "score": round(result["score"], DIGITS),
        "path": [node["label"] for node in result["path"]],
        "truncated": result["truncated"],
    }
    if arguments.coverage is not None:
        found["answer"] = [node["label"] for node in result["answer"]]
    if arguments.probabilities:
        every = {label: probability for level in result["levels"] for label, probability in level.items()}
        found["probabilities"] = {label: round(every[label], DIGITS) for label in leaves}
    return found


class Run:
    """The output while it grows, and what is needed to go on after a kill.

    Args:
        output: the file that is wanted.
        options: what a run that was broken off must share.
        overwrite: forget what is there.

    Raises:
        InputError: an unfinished run of other options is there.
    """

    def __init__(self, output: Path, options: dict[str, Any], overwrite: bool):
        self.output, self.options = output, options
        self.partial, self.state = Path(f"{output}.partial"), Path(f"{output}.state.json")
        self.errors, self.partial_errors = Path(f"{output}.errors.jsonl"), Path(f"{output}.errors.partial")
        self.rows = self.problems = 0
        self.sizes = [0, 0]  # whole bytes of the output and of the errors
        self.digest = hashlib.sha256()  # of all that was read
        self.expected: str | None = None
        self.files: list[BinaryIO] = []
        if overwrite:
            for file in (output, self.partial, self.state, self.errors, self.partial_errors):
                file.unlink(missing_ok=True)
        elif self.state.exists():
            try:
                known = json.loads(self.state.read_text(encoding="utf-8"))
                other = [name for name, value in options.items() if known["options"].get(name) != value]
                self.rows, self.problems, self.sizes = known["rows"], known["problems"], known["sizes"]
                self.expected = known["digest"]
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise InputError(f"{self.state} is damaged: --overwrite starts anew") from error
            if other:
                raise InputError(
                    f"{self.partial} was begun with another {', '.join(other)}: give the same, or --overwrite to start anew"
                )

    def skip(self, records: Iterator[Record]) -> None:
        """Reads what an earlier run has classified.

        Raises:
            InputError: it is not what the earlier run had read.
        """
        if self.expected is None:
            return
        for record in islice(records, self.rows):
            self.count(record)
        if self.digest.hexdigest() != self.expected:
            raise InputError(f"the input is another one than {self.partial} was begun with: --overwrite starts anew")
        print(f"going on after {self.rows:,} rows", file=sys.stderr)

    def count(self, record: Record) -> None:
        self.digest.update(repr((record.source, record.line, record.id, record.text, record.problem)).encode())

    def __enter__(self) -> "Run":
        for file, size in zip((self.partial, self.partial_errors), self.sizes, strict=True):
            stream = file.open("r+b" if file.exists() else "w+b")
            stream.truncate(size)
            stream.seek(size)
            self.files.append(stream)
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.close()
        if not self.state.exists():  # nothing in them is whole
            self.partial.unlink(missing_ok=True)
            self.partial_errors.unlink(missing_ok=True)

    def write(self, chunk: list[Record], rows: list[dict], problems: list[dict]) -> None:
        """Appends what came of some records, and then says that it is whole."""
        as_csv = self.output.suffix == ".csv"
        lines = to_csv(rows, header=self.sizes[0] == 0) if as_csv else to_json_lines(rows)
        for i, text in enumerate((lines, to_json_lines(problems))):
            self.files[i].write(text.encode())
            self.files[i].flush()
            os.fsync(self.files[i].fileno())
            self.sizes[i] = self.files[i].tell()
        for record in chunk:
            self.count(record)
        self.rows += len(chunk)
        self.problems += len(problems)
        state = {"options": self.options, "rows": self.rows, "problems": self.problems, "sizes": self.sizes}
        written = self.state.with_suffix(".new")
        with written.open("w", encoding="utf-8") as stream:
            json.dump({**state, "digest": self.digest.hexdigest()}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        written.replace(self.state)

    def finish(self) -> None:
        """Gives the files their names."""
        for file in self.files:
            file.close()
        if self.problems:
            self.partial_errors.replace(self.errors)
        else:
            self.partial_errors.unlink()
        if self.output.suffix == ".parquet":
            written = Path(f"{self.output}.new")
            to_parquet(self.partial, written)
            written.replace(self.output)
            self.partial.unlink()
        else:
            self.partial.replace(self.output)
        self.state.unlink()


def to_json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_csv(rows: list[dict], header: bool) -> str:
    """Paths and answers as text, probabilities in columns of their own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for row in rows:
        probabilities = row.pop("probabilities", {})
        row = {**row, "path": " > ".join(row["path"])} | {f"probability of {k}": v for k, v in probabilities.items()}
        if "answer" in row:
            row["answer"] = " | ".join(row["answer"])
        if header:
            writer.writerow(row)
            header = False
        writer.writerow(row.values())
    return stream.getvalue()


def to_parquet(lines: Path, target: Path) -> None:
    """A Parquet file of JSON lines, `ROWS` at a time."""
    writer = None
    try:
        with lines.open(encoding="utf-8") as stream:
            while rows := [json.loads(line) for line in islice(stream, ROWS)]:
                if writer is None:
                    schema = parquet_schema(rows[0])
                    writer = pyarrow.parquet.ParquetWriter(target, schema)
                if "id" in rows[0]:
                    rows = [{**row, "id": None if row["id"] is None else str(row["id"])} for row in rows]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        if writer is None:  # no row could be read
            pyarrow.parquet.write_table(pyarrow.table({}), target)
    finally:
        if writer is not None:
            writer.close()


def parquet_schema(row: dict) -> pyarrow.Schema:
    names = pyarrow.list_(pyarrow.string())
    types = {"row": pyarrow.int64(), "id": pyarrow.string(), "label": pyarrow.string(), "score": pyarrow.float64()}
    types |= {"path": names, "answer": names, "truncated": pyarrow.bool_()}
    if "probabilities" in row:
        types["probabilities"] = pyarrow.struct([(label, pyarrow.float64()) for label in row["probabilities"]])
    return pyarrow.schema([(name, types[name]) for name in row])


class Bar:
    """Progress on standard error: the share of the input, rows, rows a second, and the time that is left."""

    def __init__(self, rows: int):
        self.rows, self.since, self.started = rows, 0, time.monotonic()
        form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=100, bar_format=form, disable=None)

    def move(self, rows: int, done: float | None) -> None:
        self.rows, self.since = self.rows + rows, self.since + rows
        self.bar.n = 100 * (done or 0.0)
        speed = self.since / (time.monotonic() - self.started)
        self.bar.set_postfix_str(f"{self.rows:,} rows, {speed:.1f} rows/s")

    def __enter__(self) -> "Bar":
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
        leave("predict.py", said, code, trace)
    sys.exit(code)

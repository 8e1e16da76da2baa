"""Classifies files of texts: ``python predict.py --model FOLDER_OR_ID --input texts.csv --output predictions.jsonl``.

Worth knowing:

1. Texts are read, classified and written `ROWS` at a time, so memory does not grow with the file.
2. Each part that is finished is a file in ``<output>.parts``; at the end they become the output. Killed at any moment and
   started again with the same arguments, the command does the parts that are not there, and ends with the same bytes.
3. It goes on only where model, options and the texts that were read already are the same, by their fingerprints. An output
   folder keeps that of the input and the options of each finished file, in ``.inputs``: one that was made of others is an error.
4. Under ``accelerate launch`` every process does each n-th part, or with an output folder each n-th file. They meet in the
   file system alone: none waits for another, and the last to finish puts the parts together.
5. Rows that cannot be read stand in ``<output>.errors.jsonl``; all others are classified, and the exit code is 1 then.
6. The model is loaded as any user loads it, through `pipeline`.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NoReturn, TextIO

# before they are imported: the one asks for kernels from the Hub, whose code is not pinned, the other lists those that do not fit
for library in ("bitsandbytes", "torchao"):
    logging.getLogger(library).setLevel(logging.ERROR)

import pyarrow
import pyarrow.parquet
import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import Pipeline, pipeline
from transformers.utils import cached_file

from errors import InputError, asked_traceback, exit_with_error, one_line
from publishing.hub import ONNX_FILE, checkpoint_files
from training.arguments import has_bf16
from training.files import check_writable
from training.memory import give_back_memory, keep_memory
from training.records import KINDS, Record, find_inputs, read_records
from training.resume import is_full_disk

ROWS = 1024  # of a part: read, classified and written together
OPTIONS = ".options.json"
OUTPUTS = (".jsonl", ".csv", ".parquet")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # in which the encoder is loaded
DIGITS = 6
KEPT_MEMORY = (32 * 2**20, 2**30, 64 * 2**20)  # of `keep_memory`, which saves a tenth of the time


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    process = Process()
    jobs = find_jobs(arguments, process)
    pipe = load(arguments)
    in_folder = is_folder(arguments.output)
    folder = Path(arguments.output) if in_folder else Path(f"{arguments.output}.parts")
    if arguments.overwrite:
        for job in jobs:
            Run(job.output, in_folder).forget()
        (folder / OPTIONS).unlink(missing_ok=True)  # last: killed before, no output is taken for one of these options
    chosen = options(arguments, pipe)
    check_options(folder / OPTIONS, chosen)
    leaves = pipe.tree.labels[: pipe.tree.num_leaves] if arguments.probabilities else []
    form = Form(arguments.id_column is not None, arguments.coverage is not None, leaves)
    wanted = {} if arguments.coverage is None else {"coverage": arguments.coverage}

    def answer(number: int, chunk: list[Record]) -> list[dict]:
        readable = [(number + i, record) for i, record in enumerate(chunk) if record.problem is None]
        try:
            results = pipe((record.text for _, record in readable), batch_size=arguments.batch_size, **wanted)
            return [form.row(i, record, result) for (i, record), result in zip(readable, results, strict=True)]
        except ValueError as error:
            raise InputError(f"{arguments.model}: {one_line(error)}") from error

    mine, share = jobs, process
    if len(jobs) > 1:
        mine, share = jobs[process.index :: process.count], Process(0, 1)
    finished = True
    with Bar(show=process.index == 0) as bar:
        for i, job in enumerate(mine):
            bar.place = (i, len(mine))
            run = Run(job.output, in_folder, chosen)
            run.classify(job.records, answer, share, bar)
            finished = run.finish(form) and finished
    return conclude(jobs, finished, process)


def conclude(jobs: list["Job"], finished: bool, process: "Process") -> int:
    """What is said at the end, and the exit code. Of several processes the last one says it: a launcher takes a code that is
    not 0 for the failure of all.
    """
    if not finished or not all(job.output.exists() for job in jobs):
        print(f"process {process.index}: its share is done; the others' are not there yet", file=sys.stderr)
        return 0
    errors = [path for job in jobs if (path := errors_of(job.output)).exists()]
    said = ", ".join(str(job.output) for job in jobs[:3]) + (f" … {len(jobs)} files" if len(jobs) > 3 else "")
    if errors:
        problems = sum(1 for path in errors for _ in path.open("rb"))
        said += f"; {problems:,} rows could not be read: {errors[0]}" + (" …" if len(errors) > 1 else "")
    print(f"done: {said}", file=sys.stderr)
    return 1 if errors else 0


@dataclass(frozen=True)
class Process:
    """Which of the processes of a launcher this is."""

    index: int = int(os.environ.get("RANK", 0))
    count: int = int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Job:
    """Inputs, as from `find_inputs`, with their records, and the output that they become."""

    inputs: list[tuple[str, str]]
    records: Iterator[Record]
    output: Path


def find_jobs(arguments: argparse.Namespace, process: Process) -> list[Job]:
    """What there is to do: one output, or one for each file where the output is a folder.

    Raises:
        InputError: of anything that is wrong with the inputs, before the model is loaded.
    """
    inputs = find_inputs(arguments.input, arguments.input_format)
    check_writable("--output", Path(arguments.output) if is_folder(arguments.output) else Path(arguments.output).parent)
    stream = any(path == "-" for path, _ in inputs)
    if process.count > 1 and (stream or arguments.overwrite):
        raise InputError(
            "--input - cannot be shared out among processes: give a file"
            if stream
            else "--overwrite is not for several processes: delete the output first"
        )
    if not is_folder(arguments.output):
        wanted = [(inputs, Path(arguments.output))]
    elif stream:
        raise InputError("--input - needs an --output that is a file")
    else:
        wanted = [([one], Path(arguments.output) / output_name(*one)) for one in inputs]
    outputs = [output for _, output in wanted]
    twice = next((output for output in outputs if outputs.count(output) > 1), None)
    if twice is not None:
        raise InputError(f"two inputs would be written to {twice}: give files of different names")
    refuse_inputs(inputs, outputs)
    jobs = []
    for some, output in wanted:
        # where the parts are there too, a run was broken off while it cleared up; of several processes another may be quicker
        anew = arguments.overwrite or is_folder(arguments.output) or process.index > 0
        if output.exists() and not anew and not Run(output, in_folder=False).parts.exists():
            raise InputError(f"--output {output} is there already: give another name, or --overwrite")
        columns = (arguments.text_column, arguments.id_column)
        reader = read_records(some, *columns)
        first = list(islice(reader, 1))
        if not first and not is_folder(arguments.output):
            raise InputError(f"--input {arguments.input} has no rows")
        # standard input is read once; of many files none is kept open
        records = chain(first, reader) if stream else read_records(some, *columns)
        jobs.append(Job(some, records, output))
    return jobs


def refuse_inputs(inputs: list[tuple[str, str]], outputs: list[Path]) -> None:
    """Raises InputError where an output, or the file of its errors, is an input, by whatever name."""

    def place(file: str | Path | int) -> tuple[int, int]:  # what os.path.samefile compares
        found = os.stat(file)
        return found.st_dev, found.st_ino

    given = {place(0 if path == "-" else path) for path, _ in inputs}
    for output in outputs:
        for file in (output, errors_of(output)):
            if file.exists() and place(file) in given:
                said = output if file == output else f"{output}: {file}"
                raise InputError(f"--output {said} is also an input: give another name")


def is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir()


def output_name(path: str, kind: str) -> str:
    stem = Path(path.removesuffix(".gz")).stem
    return stem + {"csv": ".csv", "tsv": ".csv", "parquet": ".parquet"}.get(kind, ".jsonl")


def errors_of(output: Path) -> Path:
    return Path(f"{output}.errors.jsonl")


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
    parser.add_argument(
        "--output",
        required=True,
        help=f"a file, {', '.join(OUTPUTS)}; or, with / at its end, a folder: a file for each input",
    )
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
    if not is_folder(arguments.output) and Path(arguments.output).suffix not in OUTPUTS:
        raise InputError(f"--output {arguments.output}: its name must end in one of {', '.join(OUTPUTS)}, or in /")
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
    keep_memory(*KEPT_MEMORY)
    gpu = torch.cuda.is_available()
    arguments.dtype = choose_dtype(gpu) if arguments.dtype == "auto" else arguments.dtype
    if arguments.dtype == "int8" and gpu:
        raise InputError("--dtype int8 is for CPUs: give bf16 or fp32")
    try:
        classify = pipeline(
            "hierarchical-text-classification",
            model=arguments.model,
            revision=arguments.revision,
            code_revision=arguments.revision,
            trust_remote_code=True,
            dtype=DTYPES[arguments.dtype],
            device=int(os.environ.get("LOCAL_RANK", 0)) if gpu else "cpu",
        )
    except MemoryError:
        raise
    except Exception as error:  # loading runs transformers, and the checkpoint's own code
        raise InputError(f"cannot load the model {arguments.model}: {cause(error)}") from error
    if arguments.dtype == "int8":
        quantize(classify.model.encoder)
    if arguments.coverage is not None and classify.model.config.conformal_thresholds is None:
        raise InputError(f"--coverage needs a checkpoint that was calibrated, which {arguments.model} is not")
    return classify


def cause(error: Exception) -> str:
    """Why a model cannot be loaded, in one line."""
    if "Unknown task" in str(error):
        return "it is not a checkpoint of this project: its config.json names no hierarchical pipeline"
    # transformers puts tracebacks into its message, which end with the cause
    if "See the original errors" in str(error):
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"


def choose_dtype(gpu: bool) -> str:
    """What this machine multiplies fastest."""
    if has_bf16(cpu=not gpu):
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    products = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return "int8" if products and not gpu and importlib.util.find_spec("torchao") else "fp32"


def quantize(encoder: torch.nn.Module) -> None:
    """Linear layers with weights in 8 bits, a scale for each row, and inputs quantized as they come, a scale for each token."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise InputError(f"--dtype int8 needs torchao: pip install torchao ({one_line(error)})") from error
    quantize_(encoder, Int8DynamicActivationInt8WeightConfig())


def options(arguments: argparse.Namespace, classify: Pipeline) -> dict[str, Any]:
    """What the bytes of the output depend on, apart from the texts."""
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
    others = ("README.md", "metrics.json", "plots/", ONNX_FILE)  # which a folder of the Hub's cache may have or not
    names_of = {folder / name: name for name in checkpoint_files(folder) if not name.startswith(others)}
    # an encoder on the Hub is pinned by its commit, which config.json holds; one in a folder is not
    encoder = Path(classify.model.config.encoder_name_or_path)
    if encoder.is_dir():
        files = sorted(file for kind in ("json", "safetensors", "bin") for file in encoder.glob(f"*.{kind}"))
        names_of |= {file: f"encoder: {file.name}" for file in files}
    digest = hashlib.sha256()
    for file, name in names_of.items():
        digest.update(name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    device = torch.cuda.get_device_name(classify.device) if classify.device.type == "cuda" else classify.device.type
    versions = {"torch": torch.__version__, "device": device}
    return {**{name: getattr(arguments, name) for name in names}, "fingerprint": digest.hexdigest(), **versions}


class Run:
    """An output, the parts of it that are there, and the rest.

    Attributes:
        output: the file that is wanted.
        parts: the folder of the parts.
        found: how many parts the input makes, once it is read.
        fingerprint: where in an output folder that of the finished output's input and options is kept; else None.
        options: as text.
        input: the fingerprint of the input and the options, once it is read.
    """

    def __init__(self, output: Path, in_folder: bool, options: dict[str, Any] | None = None):
        self.output, self.parts, self.found = output, Path(f"{output}.parts"), 0
        self.fingerprint = output.parent / ".inputs" / output.name if in_folder else None
        self.options = json.dumps(options, sort_keys=True)
        self.input = hashlib.sha256()

    def forget(self) -> None:
        """Deletes all that is there."""
        # the fingerprint last: an output without one is taken for another's
        for file in (self.output, errors_of(self.output), self.fingerprint):
            if file is not None:
                file.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def part(self, index: int) -> Path:
        return self.parts / f"{index:09}.jsonl"

    def header(self, index: int) -> dict[str, Any]:
        """What a part says of itself in its first line."""
        try:
            with self.part(index).open(encoding="utf-8") as stream:
                found = json.loads(next(stream))
                return {name: found[name] for name in ("digest", "rows", "problems")}
        except (StopIteration, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{self.part(index)} is damaged: delete it, and the same command goes on") from error

    def classify(
        self, records: Iterator[Record], answer: Callable[[int, list[Record]], list[dict]], process: Process, bar: "Bar"
    ) -> None:
        """Writes this process's parts that are not there yet.

        Args:
            answer: of the number of the first row of a part, and its records, the rows of the output.

        Raises:
            InputError: input or options are not what the parts that are there, or the output, were made of.
        """
        if self.output.exists():
            self.check_input(records)
            return
        self.parts.mkdir(exist_ok=True)
        try:
            self._classify(records, answer, process, bar)
        except BaseException:
            if process.count == 1 and not any(self.parts.glob("0*.jsonl")):
                shutil.rmtree(self.parts)  # nothing is whole
            raise

    def check_input(self, records: Iterator[Record]) -> None:
        """Raises InputError where the output was made of another input, or with other options: as its fingerprint says, or
        what is left of its parts.
        """
        if self.fingerprint is None:
            chunks = iter(lambda: list(islice(records, ROWS)), [])
            for index, chunk in enumerate(chunks if self.parts.exists() else ()):
                self.check_part(index, digest_of(chunk, self.options))
            return
        while chunk := list(islice(records, ROWS)):
            self.input.update(digest_of(chunk, self.options).encode())
        known = self.fingerprint.read_text(encoding="utf-8") if self.fingerprint.exists() else None
        if known != self.input.hexdigest():
            raise InputError(
                f"{self.output} was made of another input, or with other options: give another folder, or --overwrite to "
                "start anew"
            )

    def check_part(self, index: int, digest: str) -> bool:
        """Whether a part is there.

        Raises:
            InputError: it was made of another input, or with other options.
        """
        try:
            known = self.header(index)["digest"]
        except FileNotFoundError:
            return False
        if known != digest:
            raise InputError(
                f"the input, or an option, is another one than {self.parts} was begun with: --overwrite starts anew"
            )
        return True

    def _classify(
        self, records: Iterator[Record], answer: Callable[[int, list[Record]], list[dict]], process: Process, bar: "Bar"
    ) -> None:
        skipped = 0
        for index in count():
            chunk = list(islice(records, ROWS))
            if not chunk:
                break
            self.found = index + 1
            digest = digest_of(chunk, self.options)
            self.input.update(digest.encode())
            if self.check_part(index, digest):
                skipped += len(chunk)
            elif index % process.count == process.index:
                self.write(index, digest, chunk, answer(index * ROWS, chunk))
                give_back_memory()
                bar.move(len(chunk), chunk[-1].done)
        if skipped and process.count == 1:
            print(f"went on after {skipped:,} rows", file=sys.stderr)

    def write(self, index: int, digest: str, chunk: list[Record], rows: list[dict]) -> None:
        problems = [
            {"row": index * ROWS + i, "source": record.source, "line": record.line, "problem": record.problem}
            for i, record in enumerate(chunk)
            if record.problem is not None
        ]
        header = {"digest": digest, "rows": len(rows), "problems": len(problems)}
        write_whole(self.part(index), to_json_lines([header, *rows, *problems]))

    def finish(self, form: "Form") -> bool:
        """Puts the parts together, if they are all there.

        Returns:
            Whether the output is there.
        """
        try:
            with FileLock(self.parts / "lock"):
                if not self.output.exists():
                    if not all(self.part(index).exists() for index in range(self.found)):
                        return False
                    self.put_together(form)
        except FileNotFoundError:  # another process has put them together, and cleared up
            if not self.output.exists():
                raise
        shutil.rmtree(self.parts, ignore_errors=True)
        return True

    def put_together(self, form: "Form") -> None:
        new = Path(f"{self.output}.new")
        problems = Path(f"{errors_of(self.output)}.new")
        with problems.open("w", encoding="utf-8", newline="") as errors, form.open(new, self.output.suffix) as write:
            for index in range(self.found):
                count_of_rows = self.header(index)["rows"]
                with self.part(index).open(encoding="utf-8") as stream:
                    next(stream)
                    write(list(islice(stream, count_of_rows)))
                    errors.writelines(stream)
            flush(errors)
        if problems.stat().st_size:
            problems.replace(errors_of(self.output))
        else:
            problems.unlink()
            errors_of(self.output).unlink(missing_ok=True)  # of a former run
        if self.fingerprint is not None:
            self.fingerprint.parent.mkdir(exist_ok=True)
            write_whole(self.fingerprint, self.input.hexdigest())
        new.replace(self.output)


@dataclass(frozen=True)
class Form:
    """What a row of the output holds, and how it is written.

    Attributes:
        by_id: rows are known by the column of ids, not by their number.
        answers: rows have an answer with coverage.
        leaves: whose probabilities rows have, if any.
    """

    by_id: bool
    answers: bool
    leaves: list[str]

    def row(self, number: int, record: Record, result: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"id": record.id} if self.by_id else {"row": number}
        found |= {
            "label": result["label"],
            "score": round(result["score"], DIGITS),
            "path": [node["label"] for node in result["path"]],
            "truncated": result["truncated"],
        }
        if self.answers:
            found["answer"] = [node["label"] for node in result["answer"]]
        if self.leaves:
            every = {label: probability for level in result["levels"] for label, probability in level.items()}
            found["probabilities"] = {label: round(every[label], DIGITS) for label in self.leaves}
        return found

    @contextmanager
    def open(self, file: Path, suffix: str) -> Iterator[Callable[[list[str]], None]]:
        """A function that takes rows as lines of JSON, and writes them into a new file of a kind."""
        if suffix == ".parquet":
            schema = self.schema()
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                yield lambda lines: writer.write_table(pyarrow.Table.from_pylist(self.typed(lines), schema=schema))
            return
        with file.open("w", encoding="utf-8", newline="") as stream:
            if suffix == ".csv":
                plain = csv.writer(stream, lineterminator="\n")
                quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)

                def write(rows: Iterable[list[Any]]) -> None:
                    for row in rows:
                        # Python 3.11 leaves a lone carriage return unquoted, which ends the row for those who read it
                        broken = any("\r" in cell for cell in row if isinstance(cell, str))
                        (quoted if broken else plain).writerow(row)

                write([[*self.names(), *(f"probability of {leaf}" for leaf in self.leaves)]])
                yield lambda lines: write(self.cells(json.loads(line)) for line in lines)
            else:
                yield stream.writelines
            flush(stream)

    def names(self) -> list[str]:
        return ["id" if self.by_id else "row", "label", "score", "path", "truncated", *["answer"][: self.answers]]

    def cells(self, row: dict[str, Any]) -> list[Any]:
        """Paths and answers as text, probabilities in columns of their own."""
        flat = {**row, "path": " > ".join(row["path"]), "answer": " | ".join(row.get("answer", []))}
        return [*(flat[name] for name in self.names()), *row.get("probabilities", {}).values()]

    def schema(self) -> pyarrow.Schema:
        names = pyarrow.list_(pyarrow.string())
        types = {"row": pyarrow.int64(), "id": pyarrow.string(), "label": pyarrow.string(), "score": pyarrow.float64()}
        types |= {"path": names, "answer": names, "truncated": pyarrow.bool_()}
        fields = [(name, types[name]) for name in self.names()]
        if self.leaves:
            fields.append(("probabilities", pyarrow.struct([(leaf, pyarrow.float64()) for leaf in self.leaves])))
        return pyarrow.schema(fields)

    def typed(self, lines: list[str]) -> list[dict[str, Any]]:
        """Rows whose ids, numbers or texts in JSON, are all texts."""
        rows = [json.loads(line) for line in lines]
        return [row | {"id": str(row["id"])} if row.get("id") is not None else row for row in rows]


def digest_of(chunk: list[Record], options: str) -> str:
    """A fingerprint of what was read, and of the options."""
    digest = hashlib.sha256(options.encode())
    for record in chunk:
        digest.update(repr((record.source, record.line, record.id, record.text, record.problem)).encode())
    return digest.hexdigest()


def check_options(file: Path, options: dict[str, Any]) -> None:
    """Keeps the options of a run in a file.

    Raises:
        InputError: it holds those of a run with others.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(options))
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in options.items() if known.get(name) != value]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} is damaged: --overwrite starts anew") from error
    if other:
        raise InputError(
            f"{file.parent} was begun with another {', '.join(other)}: give the same, or --overwrite to start anew"
        )


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    new = Path(f"{file}.{os.getpid()}.new")
    try:
        with new.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            flush(stream)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def flush(stream: TextIO) -> None:
    """Has all that was written on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def to_json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Bar:
    """Progress on standard error: the share of the input, rows, rows a second, and the time that is left.

    Attributes:
        place: of the present file among all of this process, and their number.
    """

    def __init__(self, show: bool):
        self.rows, self.started = 0, time.monotonic()
        self.place = (0, 1)
        form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=100, bar_format=form, disable=None if show else True)

    def move(self, rows: int, done: float | None) -> None:
        self.rows += rows
        before, files = self.place
        self.bar.n = 100 * (before + (done or 0.0)) / files
        speed = self.rows / (time.monotonic() - self.started)
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
        exit_with_error("predict.py", said, code, trace)
    sys.exit(code)

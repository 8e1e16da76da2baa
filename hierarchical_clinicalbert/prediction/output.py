"""Write an output in blocks, so that a killed run can be resumed.

Worth knowing:

1. Each finished block of rows is a file in the folder ``<output>.parts``. For an output folder, ``.parts`` is inside it, because
   the folder may be a disk of its own. At the end the blocks are joined into the output, and deleted. A block's name follows from
   its rows, so a block that is classified twice is in the output once.
2. The file of a block holds the options, a digest of its input rows, and a checksum of its content. All three are checked when
   it is read.
3. The output is one file, or a folder of files with about 100,000 rows each. The folder's manifest is written last: an output
   is complete once its `marker` exists, which is the file or the manifest.
4. On a disk a lock, which ends with its process, lets one process at a time write an output.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.files import write_json
from hierarchical_clinicalbert.prediction.input import InputRow
from hierarchical_clinicalbert.prediction.rows import file_name
from hierarchical_clinicalbert.prediction.storage import Bucket, Disk
from hierarchical_clinicalbert.prediction.summary import Summary
from hierarchical_clinicalbert.reading.sources import Source
from hierarchical_clinicalbert.reading.stores import connect, is_url

SECONDS_A_LINE = 60  # of progress in a log file
ROWS = 1024  # per block: read, classified and written together
BLOCKS_PER_FILE = 97  # in a folder: 99,328 rows
OWN_PARTS = r"\d{9}\.jsonl|part\.new|output\..+|errors\.jsonl|summary\.json.*"  # names of files in the folder of blocks
OutputRows = list[dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """At most `ROWS` consecutive records of the input."""

    index: int
    records: list[InputRow]

    @property
    def first(self) -> int:
        """The number of the first record."""
        return self.index * ROWS

    def digest(self) -> str:
        """Return a hash of the records, by which a resumed run detects that its input has changed."""
        content = repr([(r.source, r.line, r.id, r.text, r.problem) for r in self.records])
        return hashlib.sha256(content.encode()).hexdigest()


class Progress:
    """Show on stderr how many rows are done and how long the others will take: on one line of a terminal, else a line a minute.

    Attributes:
        total: the estimated number of all rows, or None.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.kept = self.done = 0  # rows of an earlier run, which say nothing about this run's speed, and of this one
        self.started = self.shown = 0.0  # seconds; 0 before the first row that this run classifies
        self.is_terminal = sys.stderr.isatty()

    def start(self) -> None:
        """Note the time, at the first row that this run classifies."""
        if not self.started:
            self.started = self.shown = time.monotonic()
            if self.kept:
                print(f"continuing at row {self.kept:,}", file=sys.stderr)

    def add(self, rows: int) -> None:
        self.done += rows
        if time.monotonic() - self.shown >= (0.1 if self.is_terminal else SECONDS_A_LINE):
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        counted = (self.kept + self.done, self.total, self.shown - self.started)
        line = tqdm.format_meter(*counted, unit=" rows", initial=self.kept)
        print(
            f"\r{line}" if self.is_terminal else line, end="" if self.is_terminal else "\n", file=sys.stderr, flush=True
        )

    def close(self) -> None:
        self.start()  # if an earlier run has classified all rows
        if self.is_terminal:
            self.show()
            print(file=sys.stderr)


class RestartableOutput:
    """Write an output, a file that lists its unreadable rows, and a folder of finished blocks.

    Args:
        name: a file or, with a slash at its end, a folder; a path or URL.
        kind: suffix of the file, or of the files in the folder.
    """

    def __init__(self, name: str, kind: str):
        self.is_folder, self.kind = file_name(name).endswith("/"), kind
        name = name.removeprefix("file://")
        if is_url(name):
            filesystem, name = connect(name)
            self.store: Bucket | Disk = Bucket(filesystem)
        else:
            self.store = Disk()
        self.name = name.rstrip("/")
        self._stem = f"{self.name}/" if self.is_folder else self.name
        self.parts = f"{self._stem}.parts"
        self.marker = f"{self.name}/manifest.json" if self.is_folder else self.name
        self.errors = f"{self.name}/errors.jsonl" if self.is_folder else f"{self.name}.errors.jsonl"
        self.summary = self.marker if self.is_folder else f"{self.name}.summary.json"  # a folder's is in its manifest
        self.headers: list[dict[str, Any]] = []  # of the blocks: options, and digest of the input rows
        self.num_rows = 0  # in the blocks, without those that could not be read

    def lock(self) -> AbstractContextManager[None]:
        """Lock the output for this process. Raise InputError if it cannot be written."""
        return self.store.lock(self._stem)

    def without_own(self, sources: Sequence[Source]) -> list[Source]:
        """Return the sources except the files of this output that a killed run left: its blocks and all that it made of them."""
        if not self.store.names(self.parts):
            return list(sources)
        files = (self.name, self.errors, self.summary, self.marker, *self._files())

        def is_own(source: Source) -> bool:
            is_local = source.filesystem is None
            path, parts = map(os.path.realpath, (source.path, self.parts)) if is_local else (source.path, self.parts)
            return path.startswith(f"{parts}/") or any(self.store.is_input(file, [source]) for file in files)

        return [source for source in sources if not is_own(source)]

    def check(self, sources: Sequence[Source], overwrite: bool) -> None:
        """Raise InputError if the output is finished, or if one of its files is also an input, under any name."""
        for file in (self.name, self.errors, self.summary, *self._files()):
            if self.store.is_input(file, sources):
                others = "" if file == self.name else f": {file}"
                raise InputError(f"--output {self.name}{others} is also an input: give another name")
        if foreign := self._files(ours=False):
            raise InputError(
                f"--output {self.name}/ holds {foreign[0]}, which another program wrote: give another folder"
            )
        parts = self.store.names(self.parts)
        if foreign_parts := sorted(name for name in parts if not re.fullmatch(OWN_PARTS, name)):
            raise InputError(f"{self.parts}/{foreign_parts[0]} was written by another program: give another --output")
        # files and blocks together: the run was killed while it wrote a folder's files or deleted the blocks
        if not parts and not overwrite:
            if self.store.exists(self.marker) or self._files():
                raise self._exists_error()
            for file in (self.errors, self.summary):
                if self.store.exists(file):
                    raise InputError(f"{file} already exists: give another --output, or --overwrite")

    def delete(self) -> None:
        """Delete the output, its error file, its summary and its blocks."""
        for file in (self.marker, self.errors, self.summary, *self._files()):
            self.store.delete(file)
        self.store.delete_folder(self.parts)

    def stored_option(self, name: str) -> Any:
        """Return an option with which the blocks of a killed run were written; None without a block."""
        blocks = sorted(block for block in self.store.names(self.parts) if re.fullmatch(r"\d{9}\.jsonl", block))
        return self._read_lines(int(blocks[0][:9]))[0]["options"].get(name) if blocks else None

    def write_blocks(
        self,
        records: Iterator[InputRow],
        options: dict[str, Any],
        predict_blocks: Callable[[Iterator[Block]], Iterable[tuple[Block, OutputRows]]],
    ) -> None:
        """Predict and write the blocks that are missing.

        Args:
            options: everything that the predictions depend on, except the texts.
            predict_blocks: takes blocks; yields them, in any order, with their output rows.

        Raises:
            InputError: a finished block is damaged, or was written with other options or for another input.
        """
        existing, is_finished = self.store.names(self.parts), self.store.exists(self.marker)
        num_read, progress = 0, Progress()

        def missing() -> Iterator[Block]:
            nonlocal num_read
            blocks = iter(lambda: list(islice(records, ROWS)), [])
            for block in (Block(index, chunk) for index, chunk in enumerate(blocks)):
                num_read, done = num_read + len(block.records), block.records[-1].done
                progress.total = round(num_read / done) if done else None
                self.headers.append({"options": options, "digest": block.digest()})
                if block_name(block.index) in existing:
                    self.num_rows += len(self._read_block(block.index)[0])
                    progress.kept += len(block.records)
                elif is_finished:  # killed while it deleted its blocks
                    self.store.delete_folder(self.parts)
                    raise self._exists_error()
                else:
                    progress.start()
                    yield block

        for block, rows in predict_blocks(missing()):
            self._write_block(block, rows)
            self.num_rows += len(rows)
            progress.add(len(block.records))
        progress.close()

    def join_blocks(
        self,
        open_rows: Callable[[Path], AbstractContextManager[Callable[[list[str]], None]]],
        manifest: dict[str, Any],
        summary: Summary,
    ) -> int:
        """Join the blocks into the output, delete them once it is stored, and return the number of unreadable rows.

        Args:
            open_rows: `prediction.rows.RowFormat.open`.
            manifest: the entries of a folder's manifest about input and model.
            summary: an empty one.

        Raises:
            InputError: no row could be read. The error file is kept, and there is no output.
        """
        folder, size = self.store.new_folder(self.parts), BLOCKS_PER_FILE if self.is_folder else len(self.headers)
        new, new_errors, new_summary = (
            folder / name for name in (f"output{self.kind}", "errors.jsonl", "summary.json")
        )
        num_problems, first_problem, files = 0, "", list[dict[str, Any]]()
        with new_errors.open("w", encoding="utf-8", newline="") as errors:
            for number, first in enumerate(range(0, len(self.headers), size)):
                num_rows = 0
                with open_rows(new) as write:
                    for index in range(first, min(first + size, len(self.headers))):
                        rows, problems = self._read_block(index)
                        write(rows)
                        summary.add(rows)
                        errors.writelines(problems)
                        first_problem = first_problem or "".join(problems[:1])
                        num_rows, num_problems = num_rows + len(rows), num_problems + len(problems)
                if self.is_folder and self.num_rows:
                    files.append({"name": f"part-{number:05}{self.kind}", "rows": num_rows})
                    self.store.put(new, f"{self.name}/{files[-1]['name']}")
        if self.is_folder:
            counts = {"rows": sum(file["rows"] for file in files), "problems": num_problems, "parts": files}
            write_json(new, manifest | counts | {"summary": summary.content()})
        if num_problems:
            self.store.put(new_errors, self.errors)
        if not self.num_rows:
            self.store.delete_folder(self.parts)
            problem = json.loads(first_problem)["problem"]
            remedy = "correct the encoding" if "UTF-8" in problem else "correct it, or give another --text_column"
            counted = f"none of the {num_problems:,} rows of --input can be read"
            raise InputError(f"{counted} (the first: {problem}; all: {self.errors}): {remedy}; then --overwrite")
        if not self.is_folder:
            write_json(new_summary, summary.content())
            self.store.put(new_summary, self.summary)
        self.store.put(new, self.marker)  # the output itself, or the manifest of a folder
        self.store.delete_folder(self.parts)
        return num_problems

    def _files(self, ours: bool = True) -> list[str]:
        """Return the part files of an output folder: ours, or those of other programs, which readers would mix with ours."""
        names = sorted(self.store.names(self.name)) if self.is_folder else []
        rows = [name for name in names if name.startswith("part-")]
        return [f"{self.name}/{name}" for name in rows if ours == bool(re.fullmatch(r"part-\d{5,}\.[a-z.]+", name))]

    def _exists_error(self) -> InputError:
        return InputError(f"--output {self.name} already exists: give another name, or --overwrite")

    def _block_file(self, index: int) -> str:
        return f"{self.parts}/{block_name(index)}"

    def _write_block(self, block: Block, rows: OutputRows) -> None:
        problems = [
            {"row": block.first + i, "source": record.source, "line": record.line, "problem": record.problem}
            for i, record in enumerate(block.records)
            if record.problem is not None
        ]
        header = {**self.headers[block.index], "rows": len(rows), "problems": len(problems)}
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows, *problems)).encode()
        new = self.store.new_folder(self.parts) / "part.new"
        new.write_bytes(f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)
        self.store.put(new, self._block_file(block.index))

    def _read_block(self, index: int) -> tuple[list[str], list[str]]:
        """Return the lines of a block's rows, and of its problems. Raise InputError as `write_blocks`."""
        (header, lines), expected = self._read_lines(index), self.headers[index]
        changed = [name for name, value in expected["options"].items() if header["options"].get(name) != value]
        if changed:
            raise InputError(
                f"{self.parts} was started with another {', '.join(changed)}: give the same, or --overwrite"
            )
        if header["digest"] != expected["digest"]:
            raise InputError(f"the input changed since {self.parts} was started: give --overwrite to start again")
        return lines[: header["rows"]], lines[header["rows"] :]

    def _read_lines(self, index: int) -> tuple[dict[str, Any], list[str]]:
        """Return a block's header and its other lines. InputError: it is damaged."""
        checksum, _, content = self.store.read(self._block_file(index)).partition(b"\n")
        if checksum.decode(errors="replace") != hashlib.sha256(content).hexdigest():
            raise InputError(f"{self._block_file(index)} is damaged: delete it, and run the same command again")
        first, *lines = content.decode().split("\n")[:-1]  # splitlines also splits at line ends of Unicode in names
        return json.loads(first), [f"{line}\n" for line in lines]


def block_name(index: int) -> str:
    return f"{index:09}.jsonl"

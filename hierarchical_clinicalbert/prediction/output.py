"""Write an output in blocks, so that a killed run can be resumed.

Worth knowing:

1. Each finished block of rows is a file in the folder ``<output>.parts``. For an output folder,
   ``.parts`` is inside it, because the folder may be a disk of its own. At the end the blocks are
   joined into the output, and deleted. A block's name follows from its rows, so a block that is
   classified twice is in the output once.
2. The file of a block holds the options, a digest of its input rows, and a checksum of its content.
   All three are checked when it is read.
3. The output is one file, or a folder of files with about 100,000 rows each. The folder's manifest
   is written last: an output is complete once its `marker` exists, which is the file or the
   manifest.
4. On a disk a lock, which ends with its process, lets one process at a time write an output.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hierarchical_clinicalbert.checkpoint_files import TRAINED_TEXTS
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.files import write_json
from hierarchical_clinicalbert.prediction.input import InputRow
from hierarchical_clinicalbert.prediction.rows import RowFormat, file_name
from hierarchical_clinicalbert.prediction.storage import Storage
from hierarchical_clinicalbert.reading.sources import Source
from hierarchical_clinicalbert.reading.stores import connect, is_url

ROWS = 1024  # per block: read, classified and written together
BLOCKS_PER_FILE = 97  # in a folder: 99,328 rows
# between two updates of the progress on a terminal, and in a log
PROGRESS_SECONDS = {True: 0.1, False: 60}
BLOCK_NAME = r"\d{9}\.jsonl"
# names of files in the folder of blocks
OWN_PARTS = rf"{BLOCK_NAME}|part\.new|output\..+|(errors|summary|trained_texts)\.json.*"
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
        """Return a hash of the records, by which a resumed run detects that its input has
        changed.
        """
        content = repr([(r.source, r.line, r.id, r.text, r.problem) for r in self.records])
        return hashlib.sha256(content.encode()).hexdigest()


class Progress(tqdm):
    """A progress bar on a terminal; in a log, each update is a line."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        return tqdm.status_printer(file) if file.isatty() else partial(print, file=file, flush=True)


class RestartableOutput:
    """Write an output, a file that lists its unreadable rows, and a folder of finished blocks.

    Args:
        name: a file or, with a slash at its end, a folder; a path or URL.
        kind: suffix of the file, or of the files in the folder.
    """

    def __init__(self, name: str, kind: str):
        self.is_folder = file_name(name).endswith("/")
        self.kind = kind
        name = name.removeprefix("file://")
        filesystem, name = connect(name) if is_url(name) else (None, name)
        self.store = Storage(filesystem)
        self.name = name.rstrip("/")
        self._stem = f"{self.name}/" if self.is_folder else self.name
        self.parts = f"{self._stem}.parts"
        self.marker = f"{self.name}/manifest.json" if self.is_folder else self.name
        self.errors = f"{self.name}/errors.jsonl" if self.is_folder else f"{self.name}.errors.jsonl"
        # a folder's is in its manifest
        self.summary = self.marker if self.is_folder else f"{self.name}.summary.json"
        self.trained_texts = f"{self._stem}{'' if self.is_folder else '.'}{TRAINED_TEXTS}"
        # of the blocks: options, and digest of the input rows
        self.headers: list[dict[str, Any]] = []
        # records in the blocks, and those of them that could be read
        self.num_read = self.num_rows = 0

    def lock(self) -> AbstractContextManager[None]:
        """Lock the output for this process. Raise InputError if it cannot be written."""
        return self.store.lock(self._stem)

    def check(self, sources: Sequence[Source], overwrite: bool) -> list[Source]:
        """Return the sources without the files that a killed run of this output left: ``--input``
        may match them.

        Raises:
            InputError: the output exists, one of its files is an input, or another program wrote
            into its folders.
        """
        parts = self.store.names(self.parts)
        ours = self._files()
        own_paths = [real_path(file) for file in ours]
        blocks = real_path(self.parts) + "/"
        own = [
            s
            for s in sources
            if real_path(s.path) in own_paths or real_path(s.path).startswith(blocks)
        ]
        if own and not parts:
            raise InputError(
                f"--output {self.name}: {own[0].name} is also an input: give another name"
            )
        # files of other programs: readers would mix them with ours, and the folder of blocks is
        # deleted
        theirs = [f"{self.parts}/{name}" for name in parts if not re.fullmatch(OWN_PARTS, name)]
        names = self.store.names(self.name) if self.is_folder else set()
        theirs += {f"{self.name}/{name}" for name in names if name.startswith("part-")} - {*ours}
        if theirs:
            raise InputError(
                f"--output {self.name}: another program wrote {min(theirs)}: give another name"
            )
        existing = next((file for file in ours if self.store.exists(file)), None)
        is_complete = self.store.exists(self.marker) or not parts
        if existing and is_complete and not overwrite:
            self.store.delete_folder(self.parts)  # the run was killed while it deleted them
            raise InputError(f"{existing} already exists: give another --output, or --overwrite")
        return [source for source in sources if source not in own]

    def delete(self) -> None:
        """Delete the output, the files beside it, and its blocks."""
        for file in self._files():
            self.store.delete(file)
        self.store.delete_folder(self.parts)

    def stored_option(self, name: str) -> Any:
        """Return an option with which the blocks of a killed run were written; None without a
        block.
        """
        blocks = self._blocks()
        return self._read_lines(int(min(blocks)[:9]))[0]["options"].get(name) if blocks else None

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
            InputError: a finished block is damaged, or was written with other options or for
            another input.
        """
        existing = self._blocks()
        interval = PROGRESS_SECONDS[sys.stderr.isatty()]
        if existing:
            first = next(index for index in count() if block_name(index) not in existing)
            print(f"continuing at row {first * ROWS:,}", file=sys.stderr)

        def missing() -> Iterator[Block]:
            blocks = iter(lambda: list(islice(records, ROWS)), [])
            for block in (Block(index, chunk) for index, chunk in enumerate(blocks)):
                self.num_read = self.num_read + len(block.records)
                done = block.records[-1].done
                progress.total = round(self.num_read / done) if done else None
                self.headers.append({"options": options, "digest": block.digest()})
                if block_name(block.index) in existing:
                    self.num_rows += len(self._read_block(block.index)[0])
                    # which say nothing about this run's speed
                    progress.initial += len(block.records)
                    progress.n += len(block.records)
                    continue
                if progress.n == progress.initial:
                    progress.unpause()  # the time starts with the first block that is classified
                yield block

        with Progress(
            unit=" rows", delay=0.1, mininterval=interval, miniters=1, smoothing=0
        ) as progress:
            for block, rows in predict_blocks(missing()):
                self._write_block(block, rows)
                self.num_rows += len(rows)
                progress.update(len(block.records))

    def join_blocks(
        self,
        row_format: RowFormat,
        manifest: dict[str, Any],
        trained_texts: Path | None,
    ) -> int:
        """Join the blocks into the output, delete them once it is stored, and return the number of
        unreadable rows.

        Args:
            manifest: what is written with the summary: entries about input and model.
            trained_texts: a file to copy beside the output.
        """
        folder = self.store.new_folder(self.parts)
        size = BLOCKS_PER_FILE if self.is_folder else len(self.headers)
        new, new_errors, new_summary = (
            folder / name for name in (f"output{self.kind}", "errors.jsonl", "summary.json")
        )
        summary = row_format.summary
        num_problems = self.num_read - self.num_rows
        files = list[dict[str, Any]]()
        with new_errors.open("w", encoding="utf-8", newline="") as errors:

            def rows_of(indices: Iterable[int]) -> Iterator[list[str]]:
                for index in indices:
                    rows, problems = self._read_block(index)
                    summary.add(rows)
                    errors.writelines(problems)
                    yield rows

            for number, first in enumerate(range(0, len(self.headers), size)):
                before = summary.num_rows
                row_format.write(new, rows_of(range(first, min(first + size, len(self.headers)))))
                if self.is_folder:
                    files.append(
                        {"name": f"part-{number:05}{self.kind}", "rows": summary.num_rows - before}
                    )
                    self.store.put(new, f"{self.name}/{files[-1]['name']}")
        if num_problems:
            self.store.put(new_errors, self.errors)
        if trained_texts is not None:
            self.store.put(Path(shutil.copy(trained_texts, folder)), self.trained_texts)
        if self.is_folder:
            counts = {"rows": self.num_rows, "problems": num_problems, "parts": files}
            write_json(new, manifest | counts | {"summary": summary.content()})
        else:
            write_json(new_summary, manifest | summary.content())
            self.store.put(new_summary, self.summary)
        self.store.put(new, self.marker)  # the output itself, or the manifest of a folder
        self.store.delete_folder(self.parts)
        return num_problems

    def _files(self) -> list[str]:
        """Return the names that this output's files have or will have, without its blocks."""
        names = self.store.names(self.name) if self.is_folder else set()
        rows = sorted(
            f"{self.name}/{name}" for name in names if re.fullmatch(r"part-\d{5,}\.[a-z.]+", name)
        )
        return [self.marker, self.errors, self.summary, self.trained_texts, *rows]

    def _blocks(self) -> set[str]:
        """Return the names of the blocks that are written."""
        return {name for name in self.store.names(self.parts) if re.fullmatch(BLOCK_NAME, name)}

    def _block_file(self, index: int) -> str:
        return f"{self.parts}/{block_name(index)}"

    def _write_block(self, block: Block, rows: OutputRows) -> None:
        problems = [
            {
                "row": block.first + i,
                "source": record.source,
                "line": record.line,
                "problem": record.problem,
            }
            for i, record in enumerate(block.records)
            if record.problem is not None
        ]
        header = {**self.headers[block.index], "rows": len(rows), "problems": len(problems)}
        content = "".join(
            json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows, *problems)
        ).encode()
        new = self.store.new_folder(self.parts) / "part.new"
        new.write_bytes(f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)
        self.store.put(new, self._block_file(block.index))

    def _read_block(self, index: int) -> tuple[list[str], list[str]]:
        """Return the lines of a block's rows, and of its problems.

        Raise InputError as `write_blocks`.
        """
        header, lines = self._read_lines(index)
        expected = self.headers[index]
        changed = [
            name
            for name, value in expected["options"].items()
            if header["options"].get(name) != value
        ]
        if changed:
            problem = f"{self.parts} was started with another {', '.join(changed)}"
            raise InputError(f"{problem}: give the same, or --overwrite")
        if header["digest"] != expected["digest"]:
            raise InputError(
                f"the input changed since {self.parts} was started: give --overwrite to start again"
            )
        return lines[: header["rows"]], lines[header["rows"] :]

    def _read_lines(self, index: int) -> tuple[dict[str, Any], list[str]]:
        """Return a block's header and its other lines. InputError: it is damaged."""
        checksum, _, content = self.store.read(self._block_file(index)).partition(b"\n")
        if checksum.decode(errors="replace") != hashlib.sha256(content).hexdigest():
            raise InputError(
                f"{self._block_file(index)} is damaged: delete it, and run the same command again"
            )
        # splitlines also splits at line ends of Unicode in names
        first, *lines = content.decode().split("\n")[:-1]
        return json.loads(first), [f"{line}\n" for line in lines]


def block_name(index: int) -> str:
    return f"{index:09}.jsonl"


def real_path(name: str) -> str:
    """Return the path of a file without links, or a URL as it is."""
    return name if is_url(name) else os.path.realpath(name)

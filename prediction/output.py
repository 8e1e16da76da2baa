"""Write an output file in parts, so that a killed process can continue.

Worth knowing:

1. Each finished part is a file in ``<output>.parts``. At the end the parts are joined, renamed to the output, and deleted.
2. A part holds the options, a digest of its input rows, and a checksum of its own content. Every part is checked when a run
   continues, and again when the parts are joined.
3. A lock, which ends with its process, lets one process at a time write an output.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors import InputError
from prediction.input import Record

ROWS = 1024  # per part: read, classified and written together


class RestartableOutput:
    """An output file, the file that lists its unreadable rows, and the folder of its finished parts."""

    def __init__(self, path: Path):
        self.path, self.errors, self.parts = path, Path(f"{path}.errors.jsonl"), Path(f"{path}.parts")
        self.headers: list[dict[str, Any]] = []  # of the parts: options, and digest of the input rows

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the output for this process. Raise InputError if another process holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = Path(f"{self.path}.lock")
        try:
            with FileLock(file, timeout=0):
                try:
                    yield
                finally:
                    file.unlink(missing_ok=True)  # before the release: later it may belong to another process
        except Timeout as error:
            busy = f"--output {self.path}: another process is writing it; wait for it, or give another name"
            raise InputError(busy) from error

    def check(self, inputs: Iterable[str], overwrite: bool) -> None:
        """Raise InputError if the output is finished, or if it or its error file is also an input, under any name."""
        files = [0 if path == "-" else path for path in inputs]
        for file, name in ((self.path, self.path), (self.errors, f"{self.path}: {self.errors}")):
            if file.exists() and any(os.path.samefile(file, other) for other in files):
                raise InputError(f"--output {name} is also an input: give another name")
        # an output beside its parts was killed while it deleted them
        if self.path.exists() and not self.parts.exists() and not overwrite:
            raise self._exists_error()

    def delete(self) -> None:
        """Delete the output, its error file and its parts."""
        self.path.unlink(missing_ok=True)
        self.errors.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def write_parts(
        self,
        records: Iterator[Record],
        options: dict[str, Any],
        predict: Callable[[int, list[Record]], list[dict[str, Any]]],
        progress: Callable[[int, float | None], None],
    ) -> None:
        """Write the missing parts.

        Args:
            options: everything that the predictions depend on, except the texts.
            predict: takes the number of a part's first row and the part's records; returns output rows.
            progress: takes the number of rows of a part, and the share of the input read so far.

        Raises:
            InputError: a part is damaged, or was written with other options or for another input.
        """
        num_kept = 0
        for index, chunk in enumerate(iter(lambda: list(islice(records, ROWS)), [])):
            digest = hashlib.sha256(repr([(r.source, r.line, r.id, r.text, r.problem) for r in chunk]).encode())
            self.headers.append({"options": options, "digest": digest.hexdigest()})
            if self._part(index).exists():
                self._read_part(index)
                num_kept += len(chunk)
            elif self.path.exists():  # killed while it deleted its parts: the missing part's input is unknown
                raise self._exists_error()
            else:
                self._write_part(index, chunk, predict(index * ROWS, chunk))
            progress(len(chunk), chunk[-1].done)
        if num_kept:
            print(f"continued after {num_kept:,} rows", file=sys.stderr)

    def join_parts(self, open_rows: Callable[[Path], AbstractContextManager[Callable[[list[str]], None]]]) -> int:
        """Join the parts into the output, delete them once it is on disk, and return the number of unreadable rows.

        Args:
            open_rows: opens a new file, of the format that its suffix names, and yields a function that writes rows, given as lines of JSON.

        Raises:
            InputError: a part is damaged.
        """
        new, new_errors = self.parts / f"output{self.path.suffix}", self.parts / "errors.jsonl"
        num_problems = 0
        with new_errors.open("w", encoding="utf-8", newline="") as errors, open_rows(new) as write:
            for index in range(len(self.headers)):
                rows, problems = self._read_part(index)
                write(rows)
                errors.writelines(problems)
                num_problems += len(problems)
        replace(new_errors, self.errors)
        if not num_problems:
            self.errors.unlink()
        replace(new, self.path)
        sync(self.path.parent)
        shutil.rmtree(self.parts, ignore_errors=True)
        return num_problems

    def _exists_error(self) -> InputError:
        return InputError(f"--output {self.path} already exists: give another name, or --overwrite")

    def _part(self, index: int) -> Path:
        return self.parts / f"{index:09}.jsonl"

    def _write_part(self, index: int, chunk: list[Record], rows: list[dict[str, Any]]) -> None:
        problems = [
            {"row": index * ROWS + i, "source": record.source, "line": record.line, "problem": record.problem}
            for i, record in enumerate(chunk)
            if record.problem is not None
        ]
        header = {**self.headers[index], "rows": len(rows), "problems": len(problems)}
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows, *problems)).encode()
        self.parts.mkdir(exist_ok=True)
        new = self.parts / "part.new"
        new.write_bytes(f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)
        replace(new, self._part(index))

    def _read_part(self, index: int) -> tuple[list[str], list[str]]:
        """Return the lines of a part's rows, and of its problems. Raise InputError as `write_parts`."""
        checksum, _, content = self._part(index).read_bytes().partition(b"\n")
        if checksum.decode(errors="replace") != hashlib.sha256(content).hexdigest():
            raise InputError(f"{self._part(index)} is damaged: delete it, and run the same command again")
        first, *lines = content.decode().split("\n")[:-1]  # splitlines also splits at line ends of Unicode in names
        header, expected = json.loads(first), self.headers[index]
        changed = [name for name, value in expected["options"].items() if header["options"].get(name) != value]
        if changed:
            raise InputError(
                f"{self.parts} was begun with another {', '.join(changed)}: give the same, or --overwrite to replace it"
            )
        if header["digest"] != expected["digest"]:
            raise InputError(f"the input changed since {self.parts} was begun: --overwrite starts from the beginning")
        lines = [f"{line}\n" for line in lines]
        return lines[: header["rows"]], lines[header["rows"] :]


def replace(new: Path, file: Path) -> None:
    """Rename a file that is complete, once it is on disk."""
    sync(new)
    new.replace(file)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

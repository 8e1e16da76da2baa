"""Write an output file in parts, so that a killed process can continue.

Worth knowing:

1. Each finished part is a file in ``<output>.parts``. At the end the parts are joined, renamed to the output, and deleted.
2. A part holds a digest of its input rows, the model and the options, and a checksum of its own content. Every part is
   checked when a run continues, and again when the parts are joined.
3. A lock lets one process at a time write an output. The operating system releases the lock when the process ends.
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

from errors import InputError, one_line
from prediction.input import Record

ROWS = 1024  # per part: read, classified and written together
OPTIONS = ".options.json"


class RestartableOutput:
    """An output file and its parts.

    Attributes:
        path: the output file.
        errors: the file that lists unreadable rows; absent if there are none.
        parts: the folder of finished parts.
    """

    def __init__(self, path: Path):
        self.path, self.errors, self.parts = path, Path(f"{path}.errors.jsonl"), Path(f"{path}.parts")
        self.options = ""
        self.digests: list[str] = []  # one per part, see `digest_of`

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the output for this process.

        Raises:
            InputError: another process holds the lock, or the lock file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"--output {self.path}: another process is writing it; wait for it, or give another name"
            ) from error
        except OSError as error:
            raise InputError(f"--output {self.path} cannot be locked: {error.strerror or one_line(error)}") from error
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # before the release: later it may belong to another process
            lock.release()

    def refuse_inputs(self, paths: Iterable[str]) -> None:
        """Raise InputError if the output or its error file is also an input, under any name."""
        inputs = {file_id(0 if path == "-" else path) for path in paths}
        for file in (self.path, self.errors):
            if file.exists() and file_id(file) in inputs:
                name = self.path if file == self.path else f"{self.path}: {file}"
                raise InputError(f"--output {name} is also an input: give another name")

    def refuse_finished(self) -> None:
        """Raise InputError if the output is finished. An output beside its parts was killed while it deleted them."""
        if self.path.exists() and not self.parts.exists():
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
            progress: takes the number of rows of a new part, and the share of the input read so far.

        Raises:
            InputError: a part is damaged, or was written with other options or for another input.
        """
        self.parts.mkdir(exist_ok=True)
        try:
            self._check_options(options)
            num_kept = 0
            for index, chunk in enumerate(iter(lambda: list(islice(records, ROWS)), [])):
                self.digests.append(digest_of(chunk, self.options))
                if self._part(index).exists():
                    self._read_part(index)
                    num_kept += len(chunk)
                    continue
                if self.path.exists():  # killed while it deleted its parts: the missing part's input is unknown
                    raise self._exists_error()
                self._write_part(index, chunk, predict(index * ROWS, chunk))
                progress(len(chunk), chunk[-1].done)
        except BaseException:
            if not any(self.parts.glob("0*.jsonl")):
                shutil.rmtree(self.parts)  # no part is finished
            raise
        if num_kept:
            print(f"continued after {num_kept:,} rows", file=sys.stderr)

    def join_parts(self, open_rows: Callable[[Path], AbstractContextManager[Callable[[list[str]], None]]]) -> int:
        """Join the parts into the output, and delete them once the output is on disk.

        Args:
            open_rows: opens a new file, and yields a function that writes rows, given as lines of JSON.

        Returns:
            The number of unreadable rows.

        Raises:
            InputError: a part is damaged.
        """
        new, new_errors = self.parts / "output.new", self.parts / "errors.new"
        num_problems = 0
        with new_errors.open("w", encoding="utf-8", newline="") as errors, open_rows(new) as write:
            for index in range(len(self.digests)):
                rows, problems = self._read_part(index)
                write(rows)
                errors.writelines(problems)
                num_problems += len(problems)
        if num_problems:
            sync(new_errors)
            new_errors.replace(self.errors)
        else:
            self.errors.unlink(missing_ok=True)  # left by an earlier run
        sync(new)
        new.replace(self.path)
        sync(self.path.parent)
        shutil.rmtree(self.parts, ignore_errors=True)
        return num_problems

    def _check_options(self, options: dict[str, Any]) -> None:
        """Write the options beside the parts, or compare them with those already there.

        Raises:
            InputError: the parts were begun with other options.
        """
        self.options = json.dumps(options, sort_keys=True)
        file = self.parts / OPTIONS
        if not file.exists():
            write_whole(file, self.options.encode())
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            changed = [name for name, value in options.items() if stored.get(name) != value]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} is damaged: --overwrite starts from the beginning") from error
        if changed:
            raise InputError(
                f"{self.parts} was begun with another {', '.join(changed)}: give the same, or --overwrite to replace it"
            )

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
        header = {"digest": self.digests[index], "rows": len(rows), "problems": len(problems)}
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows, *problems)).encode()
        write_whole(self._part(index), f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)

    def _read_part(self, index: int) -> tuple[list[str], list[str]]:
        """Read the lines of a part's rows, and the lines of its problems.

        Raises:
            InputError: the part is damaged, or was written for another input.
        """
        checksum, _, content = self._part(index).read_bytes().partition(b"\n")
        if checksum.decode(errors="replace") != hashlib.sha256(content).hexdigest():
            raise InputError(f"{self._part(index)} is damaged: delete it, and run the same command again")
        first, *lines = content.decode().split("\n")  # splitlines would also split at line ends of Unicode in names
        header = json.loads(first)
        if header["digest"] != self.digests[index]:
            raise InputError(
                f"the input or an option changed since {self.parts} was begun: --overwrite starts from the beginning"
            )
        end = header["rows"] + header["problems"]
        lines = [f"{line}\n" for line in lines[:end]]
        return lines[: header["rows"]], lines[header["rows"] :]


def file_id(file: str | Path | int) -> tuple[int, int]:
    """Return the device and inode, which `os.path.samefile` compares."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def digest_of(chunk: list[Record], options: str) -> str:
    """Return the SHA-256 of input rows and options, as hexadecimal digits."""
    digest = hashlib.sha256(options.encode())
    for record in chunk:
        digest.update(repr((record.source, record.line, record.id, record.text, record.problem)).encode())
    return digest.hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write a file atomically: complete or not at all."""
    new = Path(f"{file}.new")
    try:
        new.write_bytes(content)
        sync(new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""An output file that is written in parts, so that a process that is killed goes on where it was.

Worth knowing:

1. Each finished part is a file in ``<output>.parts``. Together they become the output, by one rename, and are then deleted.
2. A part names the input rows, the model and the options that it was made from, and holds a checksum of its own content.
   Every part is checked when a run goes on, and again when the parts are put together.
3. One process at a time has an output. It holds a lock from its first read to its last write, which ends with the process.
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

ROWS = 1024  # of a part: read, classified and written together
OPTIONS = ".options.json"


class RestartableOutput:
    """An output file and its parts.

    Attributes:
        path: the file that is wanted.
        errors: the file of the rows that could not be read, if there are any.
        parts: the folder of the finished parts.
    """

    def __init__(self, path: Path):
        self.path, self.errors, self.parts = path, Path(f"{path}.errors.jsonl"), Path(f"{path}.parts")
        self.options = ""
        self.digests: list[str] = []  # of the input rows and the options of each part

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output for this process alone.

        Raises:
            InputError: another process holds it.
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
            Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: afterwards it may be another process's
            lock.release()

    def refuse_inputs(self, paths: Iterable[str]) -> None:
        """Raise InputError where the output, or the file of its errors, is an input, by whatever name."""
        inputs = {file_id(0 if path == "-" else path) for path in paths}
        for file in (self.path, self.errors):
            if file.exists() and file_id(file) in inputs:
                name = self.path if file == self.path else f"{self.path}: {file}"
                raise InputError(f"--output {name} is also an input: give another name")

    def refuse_finished(self) -> None:
        """Raise InputError where the output is there. With its parts, a run was killed before it deleted them."""
        if self.path.exists() and not self.parts.exists():
            raise self._already_there()

    def delete(self) -> None:
        """Delete the output and all that belongs to it."""
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
        """Write the parts that are not there yet.

        Args:
            options: all that the predictions depend on, apart from the texts.
            predict: of the number of the first row of a part and its records, the rows of the output.
            progress: told the number of rows of a new part, and the share of the input that was read.

        Raises:
            InputError: a part is damaged, or was made with other options or of another input.
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
                if self.path.exists():  # killed while it deleted its parts, so that nothing tells of which input it is
                    raise self._already_there()
                self._write_part(index, chunk, predict(index * ROWS, chunk))
                progress(len(chunk), chunk[-1].done)
        except BaseException:
            if not any(self.parts.glob("0*.jsonl")):
                shutil.rmtree(self.parts)  # nothing is whole
            raise
        if num_kept:
            print(f"went on after {num_kept:,} rows", file=sys.stderr)

    def put_together(self, open_rows: Callable[[Path], AbstractContextManager[Callable[[list[str]], None]]]) -> int:
        """Make the output of its parts, and delete these once it is on the disk.

        Args:
            open_rows: of a new file, a function that writes rows, which are lines of JSON, into it.

        Returns:
            The number of rows that could not be read.

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
            self.errors.unlink(missing_ok=True)  # of a former run
        sync(new)
        new.replace(self.path)
        sync(self.path.parent)
        shutil.rmtree(self.parts, ignore_errors=True)
        return num_problems

    def _check_options(self, options: dict[str, Any]) -> None:
        """Keep the options beside the parts.

        Raises:
            InputError: these were begun with others.
        """
        self.options = json.dumps(options, sort_keys=True)
        file = self.parts / OPTIONS
        if not file.exists():
            write_whole(file, self.options.encode())
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            others = [name for name, value in options.items() if known.get(name) != value]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} is damaged: --overwrite starts anew") from error
        if others:
            raise InputError(
                f"{self.parts} was begun with another {', '.join(others)}: give the same, or --overwrite to start anew"
            )

    def _already_there(self) -> InputError:
        return InputError(f"--output {self.path} is there already: give another name, or --overwrite")

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
        """Lines of the rows and of the problems of a part.

        Raises:
            InputError: it is damaged, or was made of another input.
        """
        checksum, _, content = self._part(index).read_bytes().partition(b"\n")
        if checksum.decode(errors="replace") != hashlib.sha256(content).hexdigest():
            raise InputError(f"{self._part(index)} is damaged: delete it, and the same command goes on")
        first, *lines = content.decode().split("\n")  # not splitlines: names may hold other ends of lines
        header = json.loads(first)
        if header["digest"] != self.digests[index]:
            raise InputError(
                f"the input, or an option, is another one than {self.parts} was begun with: --overwrite starts anew"
            )
        end = header["rows"] + header["problems"]
        lines = [f"{line}\n" for line in lines[:end]]
        return lines[: header["rows"]], lines[header["rows"] :]


def file_id(file: str | Path | int) -> tuple[int, int]:
    """What os.path.samefile compares."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def digest_of(chunk: list[Record], options: str) -> str:
    """A fingerprint of input rows, and of the options."""
    digest = hashlib.sha256(options.encode())
    for record in chunk:
        digest.update(repr((record.source, record.line, record.id, record.text, record.problem)).encode())
    return digest.hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    new = Path(f"{file}.new")
    try:
        new.write_bytes(content)
        sync(new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

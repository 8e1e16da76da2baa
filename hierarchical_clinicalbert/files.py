"""Check, lock, write and hash files."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hierarchical_clinicalbert.errors import InputError


def check_writable(flag: str, path: Path) -> None:
    """Raise InputError unless a folder can be created and written to. Do not create it. ``flag`` is for the message."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "is not writable" if existing.is_dir() else "is not a folder"
        raise InputError(f"{flag} {path}: {existing} {problem}")


@contextmanager
def lock(flag: str, name: str | Path, file: Path) -> Iterator[None]:
    """Lock the output ``name`` of a ``flag`` for this process, by a lock on ``file``. A killed process holds no lock.

    InputError: the folder of ``file`` cannot be written to, or another process has the lock.
    """
    check_writable(flag, file.parent)
    existed = file.parent.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {file.parent}: {error.strerror}") from error
    try:
        held = FileLock(file).acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{flag} {name}: another process is writing it; give another name") from error
    with held:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # before the release: later it may belong to another process
            if not existed and not any(file.parent.iterdir()):
                file.parent.rmdir()


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by file name."""
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically, so that nobody reads a partial one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)

"""Check, write and hash files."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from errors import InputError


def check_writable(flag: str, path: Path) -> None:
    """Raise InputError unless a folder can be created and written to. Do not create it. ``flag`` is for the message."""
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "is not writable" if existing.is_dir() else "is not a folder"
        raise InputError(f"{flag} {path}: {existing} {problem}")


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

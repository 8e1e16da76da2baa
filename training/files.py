"""Folders that can be written to, and fingerprints of files."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from errors import InputError


def check_writable(flag: str, path: Path) -> None:
    """Refuse a folder that cannot be made or written to, as far as can be told without making it.

    Raises:
        InputError: it or a folder above it is a file, or may not be written to, or its name is too long.
    """
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error
    if not there.is_dir():
        raise InputError(f"{flag} {path}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: {there} may not be written to")


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """Return the fingerprints of files, by name."""
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found

"""Open files, patterns, folders, URLs, ``.gz`` files and standard input.

The kind of a file follows from its name. For other sources, such as ``io.BytesIO``, `rows.RowReader` reads any binary stream.
"""

import glob
import gzip
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hierarchical_clinicalbert.reading.rows import KINDS, InputError, Raw, RowReader
from hierarchical_clinicalbert.reading.stores import find_files, is_url, open_stream, without_query

SUFFIXES = tuple(f".{kind}{gz}" for kind in KINDS for gz in ("", ".gz") if (kind, gz) != ("parquet", ".gz"))
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """A file of one of the `KINDS`, or standard input if the path is ``-``."""

    path: str  # or URL
    kind: str
    filesystem: Any = field(default=None, compare=False)  # of pyarrow, for a URL
    size: int = field(default=0, compare=False)  # in bytes; 0 if unknown

    @property
    def name(self) -> str:
        """The name for messages and outputs. Bytes of a path that are not UTF-8 are escaped."""
        path = without_query(self.path)
        return "standard input" if path == "-" else os.fsencode(path).decode(errors="backslashreplace")


def find_sources(pattern: str, kind: str | None = None) -> list[Source]:
    """Return the files of a path, URL, pattern or folder, in sorted order. ``-`` is standard input.

    A pattern is, for example, ``part-*.csv`` or ``**/*.csv``. A folder stands for its files of all `KINDS`, except hidden ones
    and those that begin with ``_``. A given ``kind`` overrides the kinds that the file names imply.

    Raises:
        InputError: no file matches, or the kind is unknown.
    """
    pattern = pattern.removeprefix("file://")
    if pattern == "-":
        if kind is None:
            raise InputError(f"- has no file name: give --input_format, one of {', '.join(KINDS)}")
        return [Source("-", kind)]
    filesystem, is_folder = None, os.path.isdir(pattern)
    if is_url(pattern):
        filesystem, files, is_folder = find_files(pattern)
    else:
        names = glob.glob(os.path.join(glob.escape(pattern), "*") if is_folder else pattern, recursive=True)
        if broken := next((name for name in names if os.path.islink(name) and not os.path.exists(name)), None):
            raise InputError(f"{broken}: this link points to no file")
        names = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, names))
        files = [(name, os.path.getsize(name)) for name in names]
    if is_folder:
        if any(path.rpartition("/")[2] in SAVED_BY_DATASETS for path, _ in files):
            raise InputError(f"{without_query(pattern)} was saved by `datasets`: write it as Parquet, with to_parquet")
        files = [(path, size) for path, size in files if not path.rpartition("/")[2].startswith((".", "_"))]
        files = [(path, size) for path, size in files if kind or path.lower().endswith(SUFFIXES)]
    if not files:
        problem = "it contains no file of a known format" if is_folder else "there is no such file"
        if not is_folder and os.path.exists(pattern):  # such as <(command)
            problem = "it is not a regular file; pipe its content to standard input (-)"
        raise InputError(f"{without_query(pattern)}: {problem}")
    return [Source(path, kind or kind_of(path), filesystem, size) for path, size in files]


def find_all_sources(patterns: Iterable[str], kind: str | None = None) -> list[Source]:
    """Return the files of several patterns. A file that links give several names is returned once."""
    unique: dict[str, Source] = {}
    for source in (source for pattern in patterns for source in find_sources(pattern, kind)):
        unique.setdefault(os.path.realpath(source.path) if source.filesystem is None else source.path, source)
    return list(unique.values())


def kind_of(path: str) -> str:
    """Return the kind of a file from its name, or raise InputError."""
    path = without_query(path)
    name = path.lower()
    kind = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    if kind not in KINDS:
        endings = ", ".join(f".{kind}" for kind in KINDS)
        raise InputError(f"{path}: unknown format: the name must end in one of {endings}")
    if kind == "parquet" and name.endswith(".gz"):
        raise InputError(f"{path}: a Parquet file is read from its end, so unpack it first")
    return kind


@contextmanager
def open_rows(source: Source) -> Iterator[RowReader]:
    """Open the rows of a source, and close the source at the end. Raise InputError if it cannot be read."""
    if source.path == "-":
        yield RowReader(sys.stdin.buffer, source.kind, source.name)
        return
    is_packed = without_query(source.path).lower().endswith(".gz")
    if source.filesystem is not None:
        opened: Any = open_stream(source.filesystem, source.path, seekable=source.kind == "parquet")
    else:
        try:
            opened = open(source.path, "rb")  # noqa: SIM115 - closed below; errors of the block are not errors of opening
        except OSError as error:
            raise InputError(f"cannot read {source.name}: {error.strerror}") from error
    with opened as file:
        raw = Raw(file, source.name)
        stream = gzip.GzipFile(fileobj=raw) if is_packed else raw
        yield RowReader(stream, source.kind, source.name, progress=lambda: raw.count / max(source.size, 1))

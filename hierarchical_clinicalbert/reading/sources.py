"""Open files, patterns, folders, URLs, ``.gz`` files and standard input.

The kind of a file follows from its name. For other sources, such as ``io.BytesIO``,
`rows.RowReader` reads any binary stream.
"""

import glob
import gzip
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hierarchical_clinicalbert.reading.rows import (
    FOLDER,
    KINDS,
    SEEKABLE,
    InputError,
    Raw,
    RowReader,
)
from hierarchical_clinicalbert.reading.stores import find_files, is_url, open_stream

SUFFIXES = tuple(
    f".{kind}{gz}" for kind in KINDS for gz in ("", ".gz") if not (gz and kind in SEEKABLE)
)
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """A file of one of the `KINDS`, standard input if the path is ``-``, or a `FOLDER` of texts."""

    path: str  # or URL
    kind: str
    filesystem: Any = field(default=None, compare=False)  # of pyarrow, for a URL
    size: int = field(default=0, compare=False)  # in bytes; 0 if unknown
    encoding: str | None = field(default=None, compare=False)  # see `RowReader`
    # paths or URLs of the files of a folder
    files: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """The name for messages and outputs. Bytes of a path that are not UTF-8 are escaped."""
        return (
            "standard input"
            if self.path == "-"
            else os.fsencode(self.path).decode(errors="backslashreplace")
        )

    def name_of(self, file: str) -> str:
        """Return the name of a file in the folder, with its path below the folder."""
        name = file.removeprefix(f"{self.path.rstrip('/')}/")
        return os.fsencode(name).decode(errors="backslashreplace")


def find_sources(
    pattern: str, kind: str | None = None, encoding: str | None = None
) -> list[Source]:
    """Return the files of a path, URL, pattern or folder, in sorted order. ``-`` is standard input.

    A pattern is, for example, ``part-*.csv`` or ``**/*.csv``. A folder stands for its files of all
    `KINDS`, except hidden ones and those that begin with ``_``. If it has no file of another kind
    than ``.txt``, the folder is one source: it has a text in each of these files, also in its
    subfolders. A given ``kind`` overrides the kinds that the file names imply, and ``encoding`` is
    that of text files, by default UTF-8.

    Raises:
        InputError: no file matches, or the kind is unknown.
    """
    encoding = encoding or "utf-8"
    if pattern == "-":
        if kind is None:
            raise InputError(f"- has no file name: give --input_format, one of {', '.join(KINDS)}")
        return [Source("-", kind, encoding=encoding)]
    filesystem, files, is_folder = _list_files(pattern)
    if is_folder:
        names = {path.rpartition("/")[2] for path, _ in files}
        if not names.isdisjoint(SAVED_BY_DATASETS):
            raise InputError(
                f"{pattern} was saved by `datasets`: write it as Parquet, with to_parquet"
            )
        files = [
            (path, size)
            for path, size in files
            if not path.rpartition("/")[2].startswith((".", "_"))
        ]
        files = [(path, size) for path, size in files if kind or path.lower().endswith(SUFFIXES)]
        if kind is None and all(path.lower().endswith(".txt") for path, _ in files):
            folder = pattern.rstrip("/") if filesystem else glob.escape(pattern.rstrip("/"))
            source = Source(pattern, FOLDER, filesystem, encoding=encoding)
            texts = _list_files(f"{folder}/**/*.txt")[1]
            texts = [
                (path, size)
                for path, size in texts
                if not re.search("(^|/)[._]", source.name_of(path))
            ]
            if texts:
                paths, sizes = zip(*texts, strict=True)
                return [replace(source, size=sum(sizes), files=paths)]
    if not files:
        problem = "it contains no file of a known format" if is_folder else "there is no such file"
        if not is_folder and os.path.exists(pattern):  # such as <(command)
            problem = "it is not a regular file; pipe its content to standard input (-)"
        raise InputError(f"{pattern}: {problem}")
    return [Source(path, kind or kind_of(path), filesystem, size, encoding) for path, size in files]


def _list_files(pattern: str) -> tuple[Any, list[tuple[str, int]], bool]:
    """Return what `find_files` returns, also for a path or pattern on a disk, whose file system is
    None.
    """
    if is_url(pattern):
        return find_files(pattern)
    is_folder = os.path.isdir(pattern)
    names = glob.glob(
        os.path.join(glob.escape(pattern), "*") if is_folder else pattern, recursive=True
    )
    if broken := next(
        (name for name in names if os.path.islink(name) and not os.path.exists(name)), None
    ):
        raise InputError(f"{broken}: this link points to no file")
    names = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, names))
    return None, [(name, os.path.getsize(name)) for name in names], is_folder


def find_all_sources(
    patterns: Iterable[str], kind: str | None = None, encoding: str | None = None
) -> list[Source]:
    """Return the files of several patterns, each file once."""
    return list(
        dict.fromkeys(
            source for pattern in patterns for source in find_sources(pattern, kind, encoding)
        )
    )


def kind_of(path: str) -> str:
    """Return the kind of a file from its name, or raise InputError."""
    name = path.lower()
    kind = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    if kind not in KINDS:
        endings = ", ".join(f".{kind}" for kind in KINDS)
        raise InputError(f"{path}: unknown format: the name must end in one of {endings}")
    if kind in SEEKABLE and name.endswith(".gz"):
        raise InputError(f"{path}: .{kind} is read from its end, so unpack the file first")
    return kind


@contextmanager
def open_rows(source: Source) -> Iterator[RowReader]:
    """Open the rows of a source, and close the source at the end.

    Raise InputError if it cannot be read.
    """
    if source.path == "-":
        yield RowReader(sys.stdin.buffer, source.kind, source.name, encoding=source.encoding)
        return
    if source.kind == FOLDER:
        yield _open_folder(source)
        return
    with _open_file(source, source.path) as file:
        raw = Raw(file, source.name)

        def progress() -> float:
            # parts of a file that can seek may be read twice
            return min(1.0, raw.count / max(source.size, 1))

        stream = gzip.GzipFile(fileobj=raw) if source.path.lower().endswith(".gz") else raw
        yield RowReader(
            stream, source.kind, source.name, progress=progress, encoding=source.encoding
        )


def _open_file(source: Source, path: str) -> Any:
    """Open a source's file."""
    if source.filesystem is not None:
        return open_stream(source.filesystem, path, seekable=source.kind in SEEKABLE)
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(
            f"cannot read {replace(source, path=path).name}: {error.strerror}"
        ) from error


def _open_folder(source: Source) -> RowReader:
    """Return a reader of a folder of texts, which are opened one after another."""
    count = 0

    def read(path: str) -> bytes:
        nonlocal count
        count += 1
        with _open_file(source, path) as file:
            return io.BufferedReader(Raw(file, path)).read()

    files = [(source.name_of(path), partial(read, path)) for path in source.files]
    return RowReader(
        files, FOLDER, source.name, progress=lambda: count / len(files), encoding=source.encoding
    )

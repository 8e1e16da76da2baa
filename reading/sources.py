"""Open files, patterns, ``.gz`` files and standard input, and read whole tables.

The kind of a file follows from its name, and ``.gz`` files are decompressed while they are read. For other sources, such as
an object store or ``io.BytesIO``, `rows.Rows` reads any binary stream.
"""

import glob
import gzip
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import KINDS, InputError, Rows


@dataclass(frozen=True)
class Source:
    """A file of one of the `KINDS`, or standard input if the path is ``-``."""

    path: str
    kind: str

    @property
    def name(self) -> str:
        return "standard input" if self.path == "-" else self.path


def find_sources(pattern: str, kind: str | None = None) -> list[Source]:
    """Return the files that match a path or a pattern such as ``part-*.csv``, in sorted order.

    Args:
        pattern: ``-`` for standard input.
        kind: overrides the kind that the file names imply.

    Raises:
        InputError: no file matches, or the kind is unknown.
    """
    if pattern == "-":
        if kind is None:
            raise InputError(f"- has no name that tells its kind: give --input_format, one of {', '.join(KINDS)}")
        return [Source("-", kind)]
    paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not paths and os.path.isdir(pattern):
        raise InputError(f"{pattern} is a folder: give a pattern such as '{pattern}/*.csv'")
    if not paths:
        raise InputError(f"{pattern}: there is no such file")
    return [Source(path, kind or kind_of(path)) for path in paths]


def kind_of(path: str) -> str:
    """Return the kind of a file from its name, or raise InputError."""
    name = path.lower()
    kind = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    if kind not in KINDS:
        raise InputError(f"{path}: its name does not tell its kind, one of {', '.join(f'.{kind}' for kind in KINDS)}")
    if kind == "parquet" and name.endswith(".gz"):
        raise InputError(f"{path}: a Parquet file is read from its end, so unpack it first")
    return kind


@contextmanager
def open_rows(source: Source) -> Iterator[Rows]:
    """Open the rows of a source, and close the source at the end. Raise InputError if it cannot be read."""
    if source.path == "-":
        yield Rows(sys.stdin.buffer, source.kind, source.name)
        return
    try:
        file = open(source.path, "rb")  # noqa: SIM115 - closed below; errors of the block are not errors of opening
    except OSError as error:
        raise InputError(f"cannot read {source.name}: {error.strerror}") from error
    with file, gzip.GzipFile(fileobj=file) if source.path.lower().endswith(".gz") else nullcontext(file) as stream:
        size = max(os.fstat(file.fileno()).st_size, 1)
        yield Rows(stream, source.kind, source.name, progress=lambda: file.tell() / size)


@dataclass(frozen=True)
class Table:
    """All rows of a source."""

    name: str
    columns: dict[str, list[Any]]  # the values by column name; None where a JSON row lacks the name
    lines: list[int]  # `Row.line` of each row
    unit: str = "line"  # see `Rows`

    def place(self, row: int) -> str:
        """Return the position of a row, counted from 0, for a message."""
        return f"{self.name}, {self.unit} {self.lines[row]}"


def read_table(source: Source, requested: Sequence[str] | None = None) -> Table:
    """Read columns of a source, by default all, into memory.

    Raises:
        InputError: the source is damaged or has no rows, or a row cannot be read.
    """
    lines: list[int] = []
    with open_rows(source) as rows:
        columns: dict[str, list[Any]] = {name: [] for name in (rows.columns if requested is None else requested)}
        for row in rows.read(list(columns)):
            if row.problem is not None:
                raise InputError(f"{rows.place(row)}: {row.problem}")
            lines.append(row.line)
            for name, values in columns.items():
                values.append(row.values.get(name))
    if not lines:
        raise InputError(f"{source.name} has no rows")
    return Table(source.name, columns, lines, rows.unit)

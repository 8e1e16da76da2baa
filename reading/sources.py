"""Open files, patterns, ``.gz`` files and standard input, and read whole tables.

Worth knowing:

1. A file's name tells its kind. A pattern such as ``part-*.csv`` means its files in sorted order, ``-`` standard input.
2. ``.gz`` files are unpacked as they are read.
3. `rows.Rows` needs no file: an object store's stream, or ``io.BytesIO``, is read in the same way.
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

from .rows import KINDS, InputError, Limits, Rows


@dataclass(frozen=True)
class Source:
    """A file of one of the `KINDS`, or standard input if the path is ``-``."""

    path: str
    kind: str

    @property
    def name(self) -> str:
        return "standard input" if self.path == "-" else self.path


def find_sources(pattern: str, kind: str | None = None) -> list[Source]:
    """Return the files that a path or a pattern means, in sorted order.

    Args:
        pattern: ``-`` for standard input.
        kind: by default what the files' names say.

    Raises:
        InputError: there is no such file, or its name does not tell its kind.
    """
    if pattern == "-":
        if kind is None:
            raise InputError(f"standard input has no name that tells its kind: give one of {', '.join(KINDS)}")
        if kind == "parquet":
            raise InputError("a Parquet file is read from its end: it cannot come by standard input")
        return [Source("-", kind)]
    paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not paths and os.path.isdir(pattern):
        raise InputError(f"{pattern} is a folder: give a pattern such as '{pattern}/*.csv'")
    if not paths:
        raise InputError(f"{pattern}: there is no such file")
    return [Source(path, kind or kind_of(path)) for path in paths]


def kind_of(path: str) -> str:
    """Return the kind of a file by its name.

    Raises:
        InputError: the name does not tell it.
    """
    name = path.lower()
    kind = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    if kind not in KINDS:
        raise InputError(f"{path}: its name does not tell its kind, one of {', '.join(f'.{kind}' for kind in KINDS)}")
    if kind == "parquet" and name.endswith(".gz"):
        raise InputError(f"{path}: a Parquet file is read from its end, so unpack it first")
    return kind


@contextmanager
def open_rows(source: Source, limits: Limits | None = None) -> Iterator[Rows]:
    """Open the rows of a source, and close it at the end.

    Raises:
        InputError: it cannot be read.
    """
    if source.path == "-":
        yield Rows(sys.stdin.buffer, source.kind, source.name, limits)
        return
    try:
        file = open(source.path, "rb")  # noqa: SIM115 - closed below, where other errors mean other things
    except OSError as error:
        raise InputError(f"cannot read {source.name}: {error.strerror}") from error
    with file, gzip.GzipFile(fileobj=file) if source.path.lower().endswith(".gz") else nullcontext(file) as stream:
        size = max(os.fstat(file.fileno()).st_size, 1)
        yield Rows(stream, source.kind, source.name, limits, lambda: file.tell() / size)


@dataclass(frozen=True)
class Table:
    """All rows of a source.

    Attributes:
        columns: the values of each, by name; None where a row of JSON lacks the name.
        lines: of the rows, see `Row`.
        unit: what they count, see `Rows`.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: list[int]
    unit: str = "line"

    def place(self, row: int) -> str:
        """Return where a row is, for a message.

        Args:
            row: its number, from 0.
        """
        return f"{self.name}, {self.unit} {self.lines[row]}"


def read_table(source: Source, wanted: Sequence[str] | None = None, limits: Limits | None = None) -> Table:
    """Read columns of a source into memory, by default all.

    Raises:
        InputError: a row, the first one is named, or the source cannot be read, or it has no rows.
    """
    lines: list[int] = []
    with open_rows(source, limits) as rows:
        columns: dict[str, list[Any]] = {name: [] for name in (rows.columns if wanted is None else wanted)}
        for row in rows.read(list(columns)):
            if row.problem is not None:
                raise InputError(f"{rows.place(row)}: {row.problem}")
            lines.append(row.line)
            for name, values in columns.items():
                values.append(row.values.get(name))
    if not lines:
        raise InputError(f"{source.name} has no rows")
    return Table(source.name, columns, lines, rows.unit)

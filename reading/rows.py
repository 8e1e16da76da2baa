"""Read the rows of one source, one at a time, each with the line where it begins.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem. The rows before and after it are still read.
2. A source raises `InputError` if its columns cannot be known, if it is damaged, or if it exceeds its `Limits`.
3. Values are never guessed. A CSV cell "NA" or "007" is that text, and an empty cell is an empty text. In JSON and Parquet
   an integer beside nulls stays one, NaN is a float, and a dictionary (category) becomes its value.
4. Text is UTF-8, with or without a byte order mark. Lines end with \\n, \\r\\n or \\r, and blank ones are not rows. Bytes
   that are not UTF-8 are their row's problem; in a header or a JSON file they are an error. U+0000 is a character.
5. CSV and TSV rows have as many fields as the header, and quotation marks as RFC 4180 has them. A stray mark costs the
   rows that the csv module takes in with it; the problem names their lines.
6. Memory holds one row, 16 rows of Parquet, or the first 1,024 rows of JSON Lines. Only ``json`` is read whole.
7. No message shows a value. It shows the name of a column only if that looks like a name.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

KINDS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "txt")
FIRST_ROWS = 1024  # of JSON Lines: their names are the columns
NOT_UTF8 = "is not UTF-8 text: save it as UTF-8"
TOO_DEEP = "nested too deeply"


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, and what to do."""


@dataclass(frozen=True)
class Row:
    """A row of a source.

    Attributes:
        line: where the row begins, from 1. In Parquet and JSON, whose rows are not lines, the number of the row.
        values: by column name; empty if there is a problem. A row of JSON has only the names that it spells out.
        problem: why the row cannot be read, as a short phrase; None if it can.
    """

    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Limits:
    """The most that is read of a source, None for any amount. More is an `InputError`, except for ``characters``.

    Attributes:
        bytes: of the file, unpacked. For Parquet, of the wanted columns, decoded.
        rows: those with a problem included.
        columns: for JSON Lines, all names of the first 1,024 rows.
        characters: of a row with its line ends; a longer one is a problem. Not for JSON and Parquet.
    """

    bytes: int | None = None
    rows: int | None = None
    columns: int | None = None
    characters: int = 2**24


class Rows:
    """The rows of one source, to be read once.

    Args:
        stream: binary, at its beginning. Only its read() is called, for Parquet also seek() and tell(). It stays open.
        kind: one of `KINDS`.
        name: what messages call the source.
        progress: returns the share of the stream that was read. A Parquet file knows its own.

    Attributes:
        columns: the names in order, each with the share of rows that have it: 1, except for JSON. For JSON Lines the
            first 1,024 rows count, and a name that occurs only later is not a column.
        texts: those of the columns that can hold texts: for Parquet, by their type.
        unit: what `Row.line` counts: "line", or "row" for JSON and Parquet.
        done: returns the share of the source that was read so far, None if it is not known.

    Raises:
        InputError: the columns cannot be known. `read` raises it for damage, or a limit, further on.
    """

    def __init__(
        self,
        stream: Any,
        kind: str,
        name: str,
        limits: Limits | None = None,
        progress: Callable[[], float | None] = lambda: None,
    ):
        self.kind, self.name, self.limits, self.done = kind, name, limits or Limits(), progress
        self.unit = "row" if kind in ("json", "parquet") else "line"
        self.columns: dict[str, float] = {}
        self.texts: list[str] = []
        self._read: Callable[[list[str]], Iterator[Row]]
        self._foreign: tuple[type[Exception], ...] = (OSError,)
        with self._explained():
            if kind == "parquet":
                from . import parquet  # pyarrow takes a while to import

                self._foreign = parquet.FOREIGN
                self._read = parquet.open_file(self, stream)
            else:
                rows = self._open_text(stream)
                self._read = lambda wanted: rows

    def read(self, wanted: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows.

        Args:
            wanted: columns that `Row.values` must hold, by default all. Other columns of a Parquet file are not decoded.
        """
        with self._explained():
            for count, row in enumerate(self._read(list(self.columns if wanted is None else wanted)), start=1):
                self.check("rows", count)
                yield row

    def place(self, row: Row) -> str:
        """Return where a row is, for a message."""
        return f"{self.name}, {self.unit} {row.line}"

    def check(self, limit: str, count: int) -> None:
        """Raise InputError if there is more than a limit."""
        most = getattr(self.limits, limit)
        if most is not None and count > most:
            raise InputError(f"{self.name} has more than {most:,} {limit}, the most that is accepted")

    def set_columns(self, names: Sequence[str], shares: Iterable[float] | None = None) -> None:
        """Raise InputError if a name occurs twice or there are too many."""
        self.check("columns", len(names))
        self.columns = dict(zip(names, shares or [1.0] * len(names), strict=True))
        self.texts = list(self.columns)
        if len(self.columns) < len(names):
            raise InputError(f"{self.name} has two columns called {_first_twice(names)}: rename or remove one")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what libraries raise over a damaged source into an `InputError`."""
        try:
            yield
        except InputError:
            raise
        except MemoryError as error:
            raise InputError(f"{self.name} takes more memory than there is, or is damaged: split it") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self.name} is damaged or incomplete: copy or download it again") from error
        except self._foreign as error:
            reason = getattr(error, "strerror", None)
            if reason is None and self.kind == "parquet":
                raise InputError(f"{self.name} is not a Parquet file, or is damaged: write or copy it again") from error
            raise InputError(f"cannot read {self.name}: {reason or type(error).__name__}") from error

    def _open_text(self, stream: Any) -> Iterator[Row]:
        buffered = io.BufferedReader(Raw(stream, lambda count: self.check("bytes", count)), 2**16)
        start = buffered.peek(4)[:4]
        # UTF-16 and UTF-32: a byte order mark, or else a zero byte of the first ASCII character
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
            raise InputError(f"{self.name} {NOT_UTF8}")
        # bytes that are not UTF-8 become unpaired surrogates
        text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _lines(text, self.limits.characters)
        if self.kind in ("csv", "tsv"):
            return self._open_delimited(RowLines(lines, self.limits.characters), "\t" if self.kind == "tsv" else ",")
        if self.kind == "json":
            return self._open_json(text.read())
        filled = (line for line in lines if line[2] or line[1].strip())
        if self.kind != "txt":
            return self._open_objects((_parsed(*line) for line in filled), FIRST_ROWS)
        self.set_columns(["text"])
        return (Row(at, {} if bad else {"text": line.rstrip("\r\n")}, bad) for at, line, bad in filled)

    def _open_delimited(self, lines: "RowLines", separator: str) -> Iterator[Row]:
        # pyarrow.csv is faster, but its invalid_row_handler counts rows, not lines. It also accepts stray quotation
        # marks without a word, takes all rows in below one that is not closed, and ends at a cell that is not UTF-8.
        reader = csv.reader(lines, delimiter=separator, strict=True)
        # The limit of the csv module is the whole process's. It is only ever raised, as other threads read too.
        csv.field_size_limit(max(csv.field_size_limit(), self.limits.characters))
        try:
            header = next((fields for fields in reader if not lines.end_blank(fields)), None)
        except csv.Error as error:
            said = lines.explain(str(error))
            raise InputError(f"{self.name}: the first line, which names the columns, cannot be read: {said}") from error
        if header is None:
            raise InputError(f"{self.name} is empty")
        if lines.problem:
            raise InputError(f"{self.name} {NOT_UTF8}")
        self.set_columns(header)
        return _delimited(reader, lines, header, tabs=separator == "\t")

    def _open_json(self, text: str) -> Iterator[Row]:
        if has_surrogate(text):
            raise InputError(f"{self.name} {NOT_UTF8}")
        try:
            records = JSON.decode(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{self.name}, line {error.lineno}, is not JSON: {error.msg}") from error
        except RecursionError as error:
            raise InputError(f"{self.name} is {TOO_DEEP}: give a flat object for each row") from error
        records = records.get("data") if isinstance(records, dict) else records
        if not isinstance(records, list):
            raise InputError(f'{self.name}: a JSON file must hold a list of objects, or {{"data": [...]}}')
        return self._open_objects((_object_row(i, record) for i, record in enumerate(records, start=1)), None)

    def _open_objects(self, rows: Iterator[Row], most: int | None) -> Iterator[Row]:
        # the first rows together: many writers leave nulls out, so that one row alone may lack a column
        first: list[Row] = []
        counts: Counter[str] = Counter()
        for row in islice(rows, most):
            first.append(row)
            counts.update(row.values.keys())
            self.check("rows", len(first))
            self.check("columns", len(counts))
        readable = sum(row.problem is None for row in first)
        if first and not readable:
            others = "" if len(first) == 1 else f", and none of the first {len(first):,} rows can be read"
            raise InputError(f"{self.place(first[0])}: {first[0].problem}{others}")
        self.set_columns(list(counts), [count / readable for count in counts.values()])
        return chain(first, rows)


class Raw(io.RawIOBase):
    """A stream of the caller's in the form that io and pyarrow expect, which close what they are given."""

    def __init__(self, stream: Any, check: Callable[[int], None] = lambda count: None):
        self._stream, self._check, self._count = stream, check, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        seekable = getattr(self._stream, "seekable", None)
        return hasattr(self._stream, "seek") if seekable is None else seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._stream.seek(offset, whence)
        return self._stream.tell()

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._count += len(content)
        self._check(self._count)
        return len(content)


Line = tuple[int, str, str | None]  # its number from 1, the line with its end, and what is wrong with it


def _lines(stream: io.TextIOWrapper, limit: int) -> Iterator[Line]:
    number = 0
    while text := stream.readline(limit):
        number += 1
        if len(text) < limit or text.endswith("\n"):
            yield number, text, "not UTF-8" if has_surrogate(text) else None
            continue
        while len(text) == limit and not text.endswith("\n"):
            text = stream.readline(limit)
        yield number, "", f"{limit:,} characters or more"


def has_surrogate(text: str) -> bool:
    """Return whether a text has an unpaired surrogate: no character, but JSON can escape it."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


# ── CSV and TSV ──────────────────────────────────────────────────────────────────────────────────────────────────────


class RowLines:
    """The lines that the csv module reads, and what is known of those of the present row.

    Attributes:
        begin: the line where the row begins.
        number, last: the line that was read last.
        problem: of any line of the row.
    """

    def __init__(self, lines: Iterator[Line], limit: int):
        self._lines, self._limit, self.number, self.last = lines, limit, 0, ""
        self.begin_row()

    def begin_row(self) -> None:
        self.begin, self._characters = self.number + 1, 0
        self.problem: str | None = None

    def __iter__(self) -> "RowLines":
        return self

    def __next__(self) -> str:
        self.number, self.last, problem = next(self._lines)
        self._characters += len(self.last)
        if not self.last or self._characters > self._limit:
            raise csv.Error(f"{self._limit:,} characters or more")
        self.problem = self.problem or problem
        return self.last  # also a line that is not UTF-8: its quotation marks say where the row ends

    def end_blank(self, fields: list[str]) -> bool:
        """Return whether a row was a blank line, and if so begin the next one."""
        blank = len(fields) < 2 and not self.last.strip()
        if blank:
            self.begin_row()
        return blank

    def explain(self, problem: str) -> str:
        if "expected after" in problem:
            problem = "a quotation mark is stray or not doubled"
        elif problem == "unexpected end of data":
            problem = "a quotation mark is not closed"
        return f"{problem} (lines {self.begin} to {self.number})" if self.number > self.begin else problem


def _delimited(reader: Iterator[list[str]], lines: RowLines, header: list[str], tabs: bool) -> Iterator[Row]:
    while True:
        lines.begin_row()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(lines.begin, {}, lines.explain(str(error)))
            continue
        if lines.end_blank(fields):
            continue
        problem = lines.problem
        if not problem and tabs and any(takes_in_rows(cell, i, len(header)) for i, cell in enumerate(fields)):
            problem = "a stray quotation mark takes in the rows below it"
        if not problem and len(fields) != len(header):
            problem = f"{len(fields)} fields, where the header has {len(header)}"
        if problem:
            yield Row(lines.begin, {}, lines.explain(problem))
        else:
            yield Row(lines.begin, dict(zip(header, fields, strict=True)))


def takes_in_rows(cell: str, place: int, fields: int) -> bool:
    """Return whether a TSV cell began with a stray quotation mark and holds the rows below, by the tabs in its lines.

    Args:
        place: of the cell's column, from 0.
        fields: of a row.
    """
    if fields < 2 or ("\n" not in cell and "\r" not in cell):
        return False
    first, *others = (line.count("\t") for line in re.split("\r\n|\r|\n", cell))
    rest = fields - 1 - place  # the fields of its own row that the cell took in first
    return first == rest if rest else all(tabs == fields - 1 for tabs in others)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Fault(str):
    """What is wrong, in place of a value that cannot be had."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    found = dict(pairs)
    return (
        found
        if len(found) == len(pairs)
        else Fault(f"the name {_first_twice([name for name, _ in pairs])} occurs twice")
    )


def _integer(digits: str) -> int | Fault:
    try:
        return int(digits)
    except ValueError:  # Python's own limit, since the time grows with the square
        return Fault("a number has too many digits")


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _parsed(number: int, line: str, problem: str | None) -> Row:
    if problem:
        return Row(number, {}, problem)
    try:
        return _object_row(number, JSON.decode(line))
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON: {error.msg}")
    except RecursionError:
        return Row(number, {}, TOO_DEEP)


def _object_row(number: int, found: Any) -> Row:
    try:
        problem = _fault(found) or (None if isinstance(found, dict) else "not a JSON object")
    except RecursionError:
        problem = TOO_DEEP
    return Row(number, {} if problem else found, problem)


def _fault(value: Any) -> str | None:
    """Return what is wrong with a JSON value, or with any name or value in it."""
    if isinstance(value, str):
        return (
            value
            if isinstance(value, Fault)
            else "half of a surrogate pair, which is not a character"
            if has_surrogate(value)
            else None
        )
    inner = chain(value, value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_fault, inner)), None)


# ── names in messages ────────────────────────────────────────────────────────────────────────────────────────────────


def looks_like_name(text: str) -> bool:
    """Return whether a text can be the name of a column: at most 60 characters and 5 words, no end of a sentence, and
    more than 4 digits only if other characters are as many. The first row of a file without a header rarely is that.
    """
    digits = sum(map(str.isdigit, text))
    short = len(text) <= 60 and len(text.split()) <= 5
    return short and digits <= max(4, len(text) // 2) and re.search(r"[.?!](\s|$)|[。！？]", text) is None


def quote_name(name: str) -> str:
    """Return the name of a column for a message, or how long it is if it does not look like a name."""
    return repr(name) if looks_like_name(name) else f"(a value of {len(name):,} characters)"


def _first_twice(names: Sequence[str]) -> str:
    return quote_name(next(name for name, count in Counter(names).items() if count > 1))

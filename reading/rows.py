"""Read the rows of one source, one at a time, each with the line where it begins.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem. The rows before and after it are still read.
2. A source raises `InputError` if its columns are unknown, if it is damaged, or if it exceeds its `Limits`.
3. Types are never inferred. A CSV cell "NA" or "007" is that text, and an empty cell is an empty text. In JSON and Parquet
   an integer beside nulls stays an integer, NaN is a float, and a Parquet dictionary is decoded to its values.
4. Text is UTF-8, with or without a byte order mark. Lines end with \\n, \\r\\n or \\r. Blank lines are not rows. Bytes that
   are not UTF-8 are a problem of their row; in a header or a JSON file they are an error. U+0000 is a character.
5. CSV and TSV rows have as many fields as the header, and are quoted as in RFC 4180. A stray quotation mark swallows rows
   in the csv module; the problem names their lines.
6. Memory holds one row, 16 rows of Parquet, or the first 1,024 rows of JSON Lines. Only ``json`` is read whole.
7. Messages show no values. They show the name of a column only if it looks like a name.
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
FIRST_ROWS = 1024  # of JSON Lines, whose names become the columns
NOT_UTF8 = "is not UTF-8 text: save it as UTF-8"
TOO_DEEP = "nested too deeply"


class InputError(ValueError):
    """Input of the user that cannot be used. The message is one line: what, where, and what to do."""


@dataclass(frozen=True)
class Row:
    """A row of a source.

    Attributes:
        line: the line where the row begins, from 1. For Parquet and JSON, the number of the row.
        values: by column name; empty if there is a problem. A JSON row has only the names that occur in it.
        problem: why the row cannot be read, as a short phrase, or None.
    """

    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Limits:
    """The limits of a source; None means unlimited. Exceeding one raises `InputError`, except for ``characters``.

    Attributes:
        bytes: size of the file, decompressed. For Parquet, size of the requested columns, decoded.
        rows: number of rows, including rows with a problem.
        columns: number of columns. For JSON Lines, of distinct names in the first 1,024 rows.
        characters: length of a row with its line ends. A longer row is a problem. Ignored for JSON and Parquet.
    """

    bytes: int | None = None
    rows: int | None = None
    columns: int | None = None
    characters: int = 2**24


class Rows:
    """The rows of one source. They can be read once.

    Args:
        stream: a binary stream, at its beginning. Only read() is called; for Parquet also seek() and tell(). The caller
            closes it.
        kind: one of `KINDS`.
        name: name of the source in messages.
        progress: returns the share of the stream that was read. Ignored for Parquet.

    Attributes:
        columns: column names in order, each with the share of rows that have it: 1, except for JSON. For JSON Lines the
            first 1,024 rows count, and a name that occurs only later is not a column.
        texts: the columns that can hold texts: all of them, or for Parquet those of a string type.
        unit: what `Row.line` counts: "line", or "row" for JSON and Parquet.
        done: returns the share of the source that was read so far, or None if it is unknown.

    Raises:
        InputError: the columns are unknown. `read` raises it for damage, or a limit, further on.
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
                from . import parquet  # lazily, because pyarrow is slow to import

                self._foreign = parquet.FOREIGN
                self._read = parquet.open_file(self, stream)
            else:
                rows = self._open_text(stream)
                self._read = lambda requested: rows

    def read(self, requested: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows.

        Args:
            requested: columns that `Row.values` must hold; by default all. Other columns of a Parquet file are skipped.
        """
        with self._explained():
            for count, row in enumerate(self._read(list(self.columns if requested is None else requested)), start=1):
                self.check("rows", count)
                yield row

    def place(self, row: Row) -> str:
        """Return the position of a row, for a message."""
        return f"{self.name}, {self.unit} {row.line}"

    def check(self, limit: str, count: int) -> None:
        """Raise InputError if a count exceeds one of the `Limits`."""
        most = getattr(self.limits, limit)
        if most is not None and count > most:
            raise InputError(f"{self.name} has more than {most:,} {limit}, the most that is accepted")

    def set_columns(self, names: Sequence[str], shares: Iterable[float] | None = None) -> None:
        """Set the columns. Raise InputError if a name occurs twice or there are too many."""
        self.check("columns", len(names))
        self.columns = dict(zip(names, shares or [1.0] * len(names), strict=True))
        self.texts = list(self.columns)
        if len(self.columns) < len(names):
            raise InputError(f"{self.name} has two columns called {_first_twice(names)}: rename or remove one")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Convert the exceptions that libraries raise for a damaged source into an `InputError`."""
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
        # UTF-16 or UTF-32: a byte order mark, or a zero byte beside the first ASCII character
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
        return (Row(n, {} if problem else {"text": line.rstrip("\r\n")}, problem) for n, line, problem in filled)

    def _open_delimited(self, lines: "RowLines", separator: str) -> Iterator[Row]:
        # pyarrow.csv is faster, but its invalid_row_handler counts rows, not lines. It also accepts stray quotation marks,
        # swallows all rows below an unclosed one, and stops at a cell that is not UTF-8.
        reader = csv.reader(lines, delimiter=separator, strict=True)
        # The csv module's limit is global to the process. It is only raised, never lowered, because other threads read too.
        csv.field_size_limit(max(csv.field_size_limit(), self.limits.characters))
        try:
            header = next((fields for fields in reader if not lines.end_blank(fields)), None)
        except csv.Error as error:
            problem = lines.explain(str(error))
            raise InputError(
                f"{self.name}: the first line, which names the columns, cannot be read: {problem}"
            ) from error
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
        # many writers omit nulls, so the columns are the names of several rows
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
    """Wrap the caller's stream for io and pyarrow, which would close the stream itself."""

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


Line = tuple[int, str, str | None]  # number from 1, content with its line end, problem


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
    """Return whether a text has an unpaired surrogate, which JSON can escape but UTF-8 cannot encode."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


# ── CSV and TSV ──────────────────────────────────────────────────────────────────────────────────────────────────────


class RowLines:
    """The lines that the csv module reads, with the state of the current row.

    Attributes:
        begin: number of the line where the row begins.
        number, last: number and content of the line that was read last.
        problem: the first problem of a line of the row, or None.
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
        return self.last  # even if it is not UTF-8, because its quotation marks determine where the row ends

    def end_blank(self, fields: list[str]) -> bool:
        """Return whether a row was a blank line. If it was, begin the next row."""
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
    """Return whether a TSV cell began with a stray quotation mark and swallowed the rows below it.

    The tabs in the lines of the cell tell: a swallowed row has as many as any other row.

    Args:
        place: index of the cell's column, from 0.
        fields: number of fields of a row.
    """
    if fields < 2 or ("\n" not in cell and "\r" not in cell):
        return False
    first, *others = (line.count("\t") for line in re.split("\r\n|\r|\n", cell))
    rest = fields - 1 - place  # fields of its own row that the cell swallowed first
    return first == rest if rest else all(tabs == fields - 1 for tabs in others)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Fault(str):
    """A problem, in place of a value that cannot be read."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    values = dict(pairs)
    if len(values) < len(pairs):
        return Fault(f"the name {_first_twice([name for name, _ in pairs])} occurs twice")
    return values


def _integer(digits: str) -> int | Fault:
    try:
        return int(digits)
    except ValueError:  # Python limits the digits, because the time is quadratic in them
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


def _object_row(number: int, value: Any) -> Row:
    try:
        problem = _fault(value) or (None if isinstance(value, dict) else "not a JSON object")
    except RecursionError:
        problem = TOO_DEEP
    return Row(number, {} if problem else value, problem)


def _fault(value: Any) -> str | None:
    """Return the problem of a JSON value, or of a name or value inside it, or None."""
    if isinstance(value, Fault):
        return value
    if isinstance(value, str):
        return "half of a surrogate pair, which is not a character" if has_surrogate(value) else None
    inner = chain(value, value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_fault, inner)), None)


# ── Names in messages ────────────────────────────────────────────────────────────────────────────────────────────────


def looks_like_name(text: str) -> bool:
    """Return whether a text can be the name of a column, which the first row of a file without a header rarely is.

    A name has at most 60 characters and 5 words, and no end of a sentence. At most 4 of its characters, or half of them, are digits.
    """
    digits = sum(map(str.isdigit, text))
    short = len(text) <= 60 and len(text.split()) <= 5
    return short and digits <= max(4, len(text) // 2) and re.search(r"[.?!](\s|$)|[。！？]", text) is None


def quote_name(name: str) -> str:
    """Quote the name of a column for a message, or give its length if it does not look like a name."""
    return repr(name) if looks_like_name(name) else f"(a value of {len(name):,} characters)"


def _first_twice(names: Sequence[str]) -> str:
    return quote_name(next(name for name, count in Counter(names).items() if count > 1))

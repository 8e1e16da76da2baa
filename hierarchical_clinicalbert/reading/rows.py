"""Read the rows of one source, one at a time, each with the line where it begins.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem. The rows before and after it are still read.
2. `Rows` and its `read` raise `InputError` if the columns are unknown, or the source is damaged or exceeds its `Limits`.
3. Types are never inferred. A CSV cell "NA" or "007" is that text, and an empty cell is an empty text. In JSON and Parquet
   an integer beside nulls stays an integer.
4. Text is UTF-8, with or without a byte order mark. Lines end with \\n, \\r\\n or \\r. Blank lines are not rows.
5. CSV and TSV rows are quoted as in RFC 4180. A stray quotation mark swallows rows; the problem names their lines. Many TSV
   files are not quoted at all. So a TSV row of several lines that may as well be several rows is a problem, unless the
   header is quoted, or other rows prove that cells are (`refuse_swallowed_rows`).
6. Memory holds a few rows, or up to 1,024 of JSON Lines and TSV. Only a ``json`` file is loaded completely.
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
from typing import Any, NoReturn

KINDS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "txt")
FIRST_ROWS = 1024  # of JSON Lines, whose names become the columns
ROWS_AHEAD = 1024  # of TSV, read to decide whether a row is quoted
TOO_DEEP = "nested too deeply"


class InputError(ValueError):
    """User input that cannot be used. The message is one line: what, where, and what to do."""


@dataclass(frozen=True)
class Row:
    """A row of a source."""

    line: int  # where the row begins, from 1. For Parquet and JSON, the number of the row.
    values: dict[str, Any]  # by column name; empty if there is a problem. A JSON row has only the names in it.
    problem: str | None = None  # why the row cannot be read, as a short phrase


@dataclass(frozen=True)
class Limits:
    """The limits of a source. None means no limit."""

    bytes: int | None = None  # of the file, decompressed; for Parquet, of the requested columns, decoded
    rows: int | None = None
    columns: int | None = None
    characters: int = 2**24  # of a row with its line ends; a longer row is a problem. Ignored for JSON and Parquet.


class Rows:
    """The rows of one source. They can be read once.

    Args:
        stream: a binary stream, which the caller closes. Only read() is called; for Parquet also seekable() and seek().
        kind: one of `KINDS`.
        name: name of the source in messages.
        progress: returns the share of the stream that was read, or None if it is unknown. Ignored for Parquet.

    Attributes:
        columns: column names in order, each with the share of rows that have it: 1, except for JSON. For JSON Lines, the
            names of the first 1,024 rows.
        unit: what `Row.line` counts: "line", or "row" for JSON and Parquet.
        done: returns the share of the source that was read so far, or None.
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
        self._read: Callable[[list[str]], Iterator[Row]]
        self._foreign: tuple[type[Exception], ...] = (OSError,)
        with self._as_input_error():
            if kind == "parquet":
                from . import parquet  # lazily, because pyarrow is slow to import

                self._foreign = parquet.FOREIGN
                self._read = parquet.open_file(self, stream)
            else:
                rows = self._open_text(stream)
                self._read = lambda requested: rows

    def read(self, requested: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows, with the requested columns, by default all. Other columns of a Parquet file are skipped."""
        with self._as_input_error():
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
        """Set ``columns``, or raise InputError if there are too many, or two have the same name."""
        self.check("columns", len(names))
        self.columns = dict(zip(names, shares or [1.0] * len(names), strict=True))
        named = [name for name in names if name]  # spreadsheets leave empty names at the end
        if len({*named}) < len(named):
            raise InputError(f"{self.name} has two columns called {_first_twice(named)}: rename or remove one")

    @contextmanager
    def _as_input_error(self) -> Iterator[None]:
        """Convert the exceptions that libraries raise for a damaged source into an `InputError`."""
        try:
            yield
        except MemoryError as error:
            raise InputError(f"{self.name} does not fit in memory, or is damaged: split it") from error
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
            self._refuse_encoding()
        # bytes that are not UTF-8 become unpaired surrogates
        text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")
        if self.kind == "json":
            return self._open_json(text.read())
        lines = _lines(text, self.limits.characters)
        if self.kind in ("csv", "tsv"):
            return self._open_delimited(RowLines(lines, self.limits.characters))
        filled = (line for line in lines if line[2] or line[1].strip())
        if self.kind != "txt":
            return self._open_objects((_parsed(*line) for line in filled), FIRST_ROWS)
        self.set_columns(["text"])
        return (Row(n, {} if problem else {"text": line.rstrip("\r\n")}, problem) for n, line, problem in filled)

    def _open_delimited(self, lines: "RowLines") -> Iterator[Row]:
        # The csv module's limit is global to the process. It is only raised, never lowered, because other threads read too.
        csv.field_size_limit(max(csv.field_size_limit(), self.limits.characters))
        rows: Iterator[Fields] = _delimited(lines, "\t" if self.kind == "tsv" else ",")
        _, header, problem = next(rows, (0, [], None))
        if lines.problem:
            self._refuse_encoding()
        if problem:
            raise InputError(f"{self.name}: the first line, which names the columns, cannot be read: {problem}")
        others = {";": "semicolons", "|": "pipes", **({"\t": "tabs"} if self.kind == "csv" else {",": "commas"})}
        mark = next((mark for mark in others if mark in header[0]), None) if len(header) == 1 else None
        if mark and all(map(looks_like_name, header[0].split(mark))):
            expected = "commas" if self.kind == "csv" else "tabs"
            raise InputError(f"{self.name} is separated by {others[mark]}: a .{self.kind} file needs {expected}")
        self.set_columns(header)
        if self.kind == "tsv" and len(header) > 1:
            rows = refuse_swallowed_rows(rows, lines)
        return (Row(n, {} if bad else dict(zip(header, fields, strict=True)), bad) for n, fields, bad in rows)

    def _open_json(self, text: str) -> Iterator[Row]:
        if has_surrogate(text):
            self._refuse_encoding()
        try:
            records = JSON.decode(text)
        except json.JSONDecodeError as error:
            lines = error.msg == "Extra data" and error.lineno == 2  # where a second object begins
            problem = "JSON Lines, an object a line: name it .jsonl" if lines else f"not JSON: {error.msg}"
            raise InputError(f"{self.name}, line {error.lineno}, is {problem}") from error
        except RecursionError as error:
            raise InputError(f"{self.name} is {TOO_DEEP}: give a flat object for each row") from error
        records = records.get("data") if isinstance(records, dict) else records
        if not isinstance(records, list):
            raise InputError(f'{self.name}: a JSON file must hold a list of objects, or {{"data": [...]}}')
        return self._open_objects((_object_row(i, record) for i, record in enumerate(records, start=1)), None)

    def _open_objects(self, rows: Iterator[Row], most: int | None) -> Iterator[Row]:
        # many writers omit nulls, so the columns are the names of several rows
        first = list(islice(rows, most))
        counts = Counter(name for row in first for name in row.values)
        readable = sum(row.problem is None for row in first)
        if first and not readable:
            others = "" if len(first) == 1 else f", and none of the first {len(first):,} rows can be read"
            raise InputError(f"{self.place(first[0])}: {first[0].problem}{others}")
        self.set_columns(list(counts), [count / readable for count in counts.values()])
        return chain(first, rows)

    def _refuse_encoding(self) -> NoReturn:
        raise InputError(f"{self.name} is not UTF-8 text: save it as UTF-8")


class Raw(io.RawIOBase):
    """Wrap the caller's stream for io and pyarrow, which would close the stream itself."""

    def __init__(self, stream: Any, check: Callable[[int], None] = lambda count: None):
        self._stream, self._check, self._count = stream, check, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return hasattr(self._stream, "seekable") and self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._count += len(content)
        self._check(self._count)
        return len(content)


Line = tuple[int, str, str | None]  # number from 1, content with its line end, problem


def _lines(stream: io.TextIOWrapper, limit: int) -> Iterator[Line]:
    """Yield all lines. The content of a line of ``limit`` or more characters is replaced by a problem."""
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
    """Return whether a text has an unpaired surrogate, which stands for a byte that is not UTF-8."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


# ── CSV and TSV ──────────────────────────────────────────────────────────────────────────────────────────────────────


Fields = tuple[int, list[str], str | None]  # first line of a row, its fields, problem


class RowLines:
    """Iterate over lines for the csv module, and keep what is asked about the lines of the current row.

    Attributes:
        begin, number: numbers of the row's first and last line.
        first, last: these lines.
        shapes: the number of tabs, and the line end, of each line that is not blank.
        problem: the first problem of a line.
    """

    def __init__(self, lines: Iterator[Line], limit: int):
        self._lines, self._limit, self.number, self.last = lines, limit, 0, ""
        self.begin_row()

    def begin_row(self) -> None:
        self.begin, self._characters = self.number + 1, 0
        self.first = ""
        self.shapes: set[tuple[int, str]] = set()
        self.problem: str | None = None

    def __iter__(self) -> "RowLines":
        return self

    def __next__(self) -> str:
        self.number, self.last, problem = next(self._lines)
        self.first = self.first or self.last
        if self.last.strip(" \r\n"):
            self.shapes.add((self.last.count("\t"), self.last[len(self.last.rstrip("\r\n")) :]))
        self._characters += len(self.last)
        if not self.last or self._characters > self._limit:
            raise csv.Error(f"{self._limit:,} characters or more")
        self.problem = self.problem or problem
        return self.last  # even if it is not UTF-8, because its quotation marks determine where the row ends


def _delimited(lines: RowLines, separator: str) -> Iterator[Fields]:
    """Yield the first line, the fields and the problem of each row. The first row is the header. No fields: not parsed.

    pyarrow.csv is faster, but does not count lines, accepts stray quotation marks, and stops at a cell that is not UTF-8.
    """
    reader, width = csv.reader(lines, delimiter=separator, strict=True), 0
    while True:
        lines.begin_row()
        fields: list[str] = []
        try:
            fields = next(reader)
            problem = lines.problem
        except StopIteration:
            return
        except csv.Error as error:
            problem = str(error)
            if "expected after" in problem:
                problem = "a quotation mark is stray or not doubled"
            elif problem == "unexpected end of data":
                problem = "a quotation mark is not closed"
        if not problem and len(fields) < 2 and not lines.last.strip():
            continue  # a blank line
        width = width or len(fields)
        if not problem and len(fields) != width:
            problem = f"{len(fields)} fields, where the header has {width}"
        yield lines.begin, fields, problem and problem + _extent(lines)


def _extent(lines: RowLines) -> str:
    return f" (lines {lines.begin} to {lines.number})" if lines.number > lines.begin else ""


def refuse_swallowed_rows(rows: Iterator[Fields], lines: RowLines) -> Iterator[Fields]:
    """Give a problem to TSV rows that may be several rows, the first with a stray quotation mark. ``lines`` are at the header.

    Doubtful are rows of several lines that all have the tabs and the line end of the header. A row with as many fields as the
    header whose lines have other tabs or line ends is surely quoted. A doubtful row is accepted if the header is quoted, or if
    both hold for the rows before it and up to `ROWS_AHEAD` rows from it: more of them are surely quoted than doubtful, and no
    quotation mark is stray, or in a cell that is not quoted.
    """
    if '"' in lines.first:
        yield from rows
        return
    ((tabs, end),) = lines.shapes
    of_header = {(tabs, end), (tabs, "")}  # the last line of the file may have no end
    num_quoted, num_doubtful, has_stray = 0, 0, False
    waiting: list[tuple[Fields, str | None]] = []  # each with the problem that it has unless cells are quoted

    def decide() -> Iterator[Fields]:
        is_quoted = num_quoted > num_doubtful and not has_stray
        for (begin, fields, problem), doubt in waiting:
            yield begin, fields, problem if is_quoted else doubt or problem
        waiting.clear()

    for begin, fields, problem in rows:
        doubt = None
        if '"' in lines.first:  # else no cell is quoted
            if not fields or "\t".join(fields) == lines.first.rstrip("\r\n"):
                has_stray = True
            elif not problem and not lines.shapes <= of_header:
                num_quoted += 1
            elif not problem and lines.number > lines.begin:
                num_doubtful += 1
                doubt = f"a stray quotation mark swallows the rows below it{_extent(lines)}"
                doubt += "; if these lines are one row, quote the header too"
        waiting.append(((begin, fields, problem), doubt))
        first_doubt = waiting[0][1]
        if not first_doubt or has_stray or num_quoted > num_doubtful or len(waiting) == ROWS_AHEAD:
            yield from decide()
    yield from decide()


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Fault(Exception):
    """A problem, in place of a value that cannot be read."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    values = dict(pairs)
    if len(values) < len(pairs):
        return Fault(f"the name {_first_twice([name for name, _ in pairs])} occurs twice")
    return values


def _integer(digits: str) -> int | Fault:
    try:
        return int(digits)
    except ValueError:  # Python limits the digits
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
    problem = None if isinstance(value, dict | Fault) else "not a JSON object"
    try:
        # the encoder visits all values, faster than Python can
        json.dumps(value, ensure_ascii=False, default=_raise).encode()
    except Fault as fault:
        problem = str(fault)
    except UnicodeEncodeError:  # JSON has an escape for half of a pair, and UTF-8 has no encoding
        problem = "half of a surrogate pair, which is not a character"
    except RecursionError:
        problem = TOO_DEEP
    return Row(number, {} if problem else value, problem)


def _raise(fault: Fault) -> NoReturn:
    raise fault


# ── Names in messages ────────────────────────────────────────────────────────────────────────────────────────────────


def looks_like_name(text: str) -> bool:
    """Return whether a text can be the name of a column, which the first row of a file without a header rarely is."""
    digits = sum(map(str.isdigit, text))
    short = len(text) <= 60 and len(text.split()) <= 5
    return short and digits <= max(4, len(text) // 2) and re.search(r"[.?!](\s|$)|[。！？]", text) is None


def quote_name(name: str) -> str:
    """Quote the name of a column for a message, or give its length if it does not look like a name."""
    return repr(name) if looks_like_name(name) else f"(a value of {len(name):,} characters)"


def _first_twice(names: Sequence[str]) -> str:
    return quote_name(next(name for name, count in Counter(names).items() if count > 1))

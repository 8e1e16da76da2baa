"""Read the rows of one source, one at a time, each with the line where it begins.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem. The rows before and after it are still read.
2. `RowReader` and its `read` raise `InputError` if the columns are unknown, or the source is damaged or exceeds its `Limits`.
3. Types are never inferred. A CSV cell "NA" or "007" is that text, and an empty cell is an empty text. In JSON and Parquet
   an integer beside nulls stays an integer.
4. Text is UTF-8, with or without a byte order mark, unless another encoding is given. The problem of a text in another one
   names an encoding that fits, but none is ever guessed. Lines end with \\n, \\r\\n or \\r. Blank lines are not rows.
5. CSV and TSV rows are quoted as in RFC 4180. A stray quotation mark swallows rows; the problem names their lines. Many TSV
   files are not quoted at all. So a TSV row of several lines that may as well be several rows is a problem, unless the
   header is quoted (`refuse_swallowed_rows`). Another separator than that of the file's name is found in the header, and logged.
6. Of an .xlsx file, the first visible sheet is read. Its first row is the header; columns that it does not name are left out.
7. In a folder of texts, each file is a row. Files in a subfolder have its path as their label.
8. Of a Parquet file, only the requested columns are read, a few rows at a time.
9. Memory holds a few rows, or up to 1,024 of JSON Lines. Only a ``json`` file is loaded completely.
10. Messages show no values. They show the name of a column only if it looks like a name.
"""

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

from hierarchical_clinicalbert.reading import workbook
from hierarchical_clinicalbert.reading.delimited import (
    Fields,
    Line,
    RowLines,
    find_separators,
    read_delimited,
    refuse_swallowed_rows,
)
from hierarchical_clinicalbert.reading.encodings import Encoding
from taxonomy_hierarchical import quote_name

logger = logging.getLogger(__name__)

KINDS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "txt", "xlsx")
SEEKABLE = ("parquet", "xlsx")  # read from their end
FOLDER = "folder"  # of texts, one a file: the kind of a source that is no file
UNITS = {"json": "row", "parquet": "row", "xlsx": "row", FOLDER: "file"}
FIRST_ROWS = 1024  # of JSON Lines, whose names become the columns
BYTES_AT_ONCE = 2**23  # of a Parquet column; without it, pyarrow reads the column's part of a whole row group
ROWS_PER_BATCH = (
    16  # of Parquet: a value that is stored once is decoded for every row, so small batches bound the memory
)
UNREADABLE = object()
UNREADABLE_ERRORS = (LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError)  # of pyarrow or Python


class InputError(ValueError):
    """User input that cannot be used. The message is one line: what, where, and what to do."""


def reason_of(error: Exception) -> str:
    """Return an error's message on one line. The query of a URL, which may hold a signature, is removed."""
    message = getattr(error, "strerror", None) or re.sub(r"\?\S+", "", " ".join(str(error).split()))
    return message or type(error).__name__


@dataclass(frozen=True)
class Row:
    """A row of a source."""

    line: int  # where the row begins, from 1; else the number of the row or file, see `UNITS`
    values: dict[str, Any]  # by column name; empty if there is a problem. A JSON row has only the names in it.
    problem: str | None = None  # why the row cannot be read, as a short phrase


@dataclass(frozen=True)
class Limits:
    """The limits of a source. None means no limit."""

    bytes: int | None = None  # of the file, decompressed; for Parquet, of the requested columns, decoded
    rows: int | None = None
    columns: int | None = None
    characters: int = 2**24  # of a row of lines, with their ends, or of a text in a folder; a longer one is a problem
    cells: int = 10**8  # of a sheet
    unpacked_bytes: int = 2**30  # of all parts of a workbook, whose texts are held in memory


class RowReader:
    """Read the rows of one source, once.

    Args:
        stream: a binary stream, which the caller closes. Only read() is called; for `SEEKABLE` kinds also seekable() and
            seek(). For a `FOLDER`, the names of its files, each with a function that reads a number of bytes.
        kind: one of `KINDS`, or `FOLDER`.
        name: name of the source in messages.
        progress: returns the share of the stream that was read, or None if it is unknown. Ignored for Parquet.
        encoding: of text files. None for UTF-8 where no flag ``--encoding`` can be offered.

    Attributes:
        columns: column names in order, each with the share of rows that have it: 1, except for JSON. For JSON Lines, the
            names of the first 1,024 rows.
        unit: what `Row.line` counts: "line", "row" or "file".
        done: returns the share of the source that was read so far, or None.
    """

    def __init__(
        self,
        stream: Any,
        kind: str,
        name: str,
        limits: Limits | None = None,
        progress: Callable[[], float | None] = lambda: None,
        encoding: str | None = None,
    ):
        self.kind, self.name, self.limits, self.done = kind, name, limits or Limits(), progress
        self.unit = UNITS.get(kind, "line")
        self.columns: dict[str, float] = {}
        try:
            self._encoding = Encoding(encoding)
        except LookupError as error:
            raise InputError(f"--encoding {encoding}: Python has no such encoding of text") from error
        self._notice = ""  # what is logged once the rows are read
        self._read: Callable[[list[str]], Iterator[Row]]
        self._library_errors: tuple[type[Exception], ...] = ()
        with self._as_input_error():
            if kind == "parquet":
                self._read = self._open_parquet(stream)
            else:
                openers = {"xlsx": self._open_workbook, FOLDER: self._open_folder}
                rows = openers.get(kind, self._open_text)(stream)
                self._read = lambda requested: rows

    def read(self, requested: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows, with the requested columns, by default all. Other columns of a Parquet file are skipped."""
        if self._notice:
            logger.warning("%s %s", self.name, self._notice)
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
            raise InputError(f"{self.name} has more than {most:,} {limit.replace('_', ' ')}, the most that is accepted")

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
        except InputError:
            raise
        except MemoryError as error:
            raise InputError(f"{self.name} does not fit in memory, or is damaged: split it") from error
        except self._library_errors as error:
            kind = "a Parquet file" if self.kind == "parquet" else "an .xlsx workbook without a password"
            raise InputError(f"{self.name} is not {kind}, or is damaged: write or copy it again") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self.name} is damaged or incomplete: copy or download it again") from error
        except UnicodeError as error:  # of a wide encoding
            raise InputError(f"{self.name} is not {self._encoding.name} text, or is damaged") from error

    def _open_text(self, stream: Any) -> Iterator[Row]:
        buffered = io.BufferedReader(Raw(stream, self.name, lambda count: self.check("bytes", count)), 2**16)
        if problem := self._encoding.problem_of_start(buffered.peek(4)[:4]):
            raise InputError(f"{self.name} is {problem}")
        # bytes that cannot be decoded become unpaired surrogates
        text = io.TextIOWrapper(buffered, encoding=self._encoding.codec, errors="surrogateescape", newline="")
        if self.kind == "json":
            return self._open_json(text.read())
        lines = _lines(text, self.limits.characters, self._encoding.problem_of)
        if self.kind in ("csv", "tsv"):
            return self._open_delimited(RowLines(lines, self.limits.characters))
        filled = (line for line in lines if line[2] or line[1].strip())
        if self.kind != "txt":
            return self._open_objects((_parsed(*line) for line in filled), FIRST_ROWS)
        self.set_columns(["text"])
        return (Row(n, {} if problem else {"text": line.rstrip("\r\n")}, problem) for n, line, problem in filled)

    def _open_delimited(self, lines: RowLines) -> Iterator[Row]:
        # The csv module's limit is global to the process. It is only raised, never lowered, because other threads read too.
        csv.field_size_limit(max(csv.field_size_limit(), self.limits.characters))
        separator = usual = "\t" if self.kind == "tsv" else ","
        rows: Iterator[Fields] = read_delimited(lines, separator)
        _, header, problem = next(rows, (0, [], None))
        if lines.problem:
            raise InputError(f"{self.name} is {lines.problem}")
        if lines.number == lines.begin:  # a header of several lines is quoted for the usual separator
            separator, *others = find_separators(lines.last, usual, len(header))
            if others:
                shown = " or ".join(map(repr, [separator, *others]))
                raise InputError(
                    f"{self.name}: its first line may be separated by {shown}: rename the columns without one of them"
                )
        if separator != usual:
            header, problem = next(csv.reader([lines.last], delimiter=separator)), None
            rows = read_delimited(lines, separator, len(header))
            self._notice = f"is separated by {separator!r}"
        if problem:
            raise InputError(f"{self.name}: the first line, which names the columns, cannot be read: {problem}")
        self.set_columns(header)
        if separator == "\t" and len(header) > 1:
            rows = refuse_swallowed_rows(rows, lines)
        return (Row(n, {} if bad else dict(zip(header, fields, strict=True)), bad) for n, fields, bad in rows)

    def _open_json(self, text: str) -> Iterator[Row]:
        if problem := self._encoding.problem_of(text):
            raise InputError(f"{self.name} is {problem}")
        try:
            records = JSON.decode(text)
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            remedy = "; name it .jsonl if it has an object a line" if "Extra data" in str(error) else ""
            raise InputError(f"{self.name}{line}: {_json_problem(error)}{remedy}") from error
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

    def _open_parquet(self, stream: Any) -> Callable[[list[str]], Iterator[Row]]:
        import pyarrow.parquet  # lazily, because it is slow to import

        self._library_errors = (pyarrow.ArrowException, UnicodeDecodeError, OSError)
        file = pyarrow.parquet.ParquetFile(self._seekable(stream), pre_buffer=False, buffer_size=BYTES_AT_ONCE)
        self.set_columns(file.schema_arrow.names)
        return lambda requested: self._read_parquet(file, requested)

    def _read_parquet(self, file: Any, requested: list[str]) -> Iterator[Row]:
        import pyarrow

        count, size, total = 0, 0, max(file.metadata.num_rows, 1)
        self.done = lambda: count / total
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=requested, use_threads=False):
            arrays = [batch.column(name) for name in requested]
            arrays = [a.dictionary_decode() if isinstance(a, pyarrow.DictionaryArray) else a for a in arrays]
            size += sum(array.nbytes for array in arrays)
            self.check("bytes", size)
            for cells in zip(*map(_python_values, arrays), strict=True):
                count += 1
                values = dict(zip(requested, cells, strict=True))
                unreadable = next((name for name, value in values.items() if value is UNREADABLE), None)
                problem = unreadable and f"the column {quote_name(unreadable)} holds a value that cannot be read"
                yield Row(count, {} if problem else values, problem)

    def _open_workbook(self, stream: Any) -> Iterator[Row]:
        self._library_errors = workbook.ERRORS
        sheets, rows = workbook.read_workbook(self._seekable(stream), self.check)
        if len(sheets) > 1:
            self._notice = f"has {len(sheets)} sheets: only the first is read, {quote_name(sheets[0])}"
        _, header = next(rows, (0, []))
        names = ["" if value is None else str(value) for value in header]
        self.set_columns(names)
        return (Row(number, dict(zip_longest(names, values[: len(names)]))) for number, values in rows)

    def _open_folder(self, files: Sequence[tuple[str, Callable[[int], bytes]]]) -> Iterator[Row]:
        labelled = any("/" in name for name, _ in files)
        self.set_columns(["id", "text", "label"] if labelled else ["id", "text"])
        self._notice = f"holds {len(files):,} texts, one a file; for one a line, give its files by a pattern"
        return (self._text_row(number, *file) for number, file in enumerate(files, start=1))

    def _text_row(self, number: int, name: str, read: Callable[[int], bytes]) -> Row:
        most = self.limits.characters
        content = read(4 * most)  # bytes, at most 4 a character
        text, problem = self._encoding.decode(content)
        problem = problem or (f"{most:,} characters or more" if len(text) >= most else None)
        if problem or not text.strip():
            return Row(number, {}, f"{name}: {problem or 'the text is empty'}")
        folder = name.rpartition("/")[0]
        return Row(number, {"id": name, "text": text, "label": folder} if folder else {"id": name, "text": text})

    def _seekable(self, stream: Any) -> io.BufferedReader:
        raw = Raw(stream, self.name)
        if not raw.seekable():
            raise InputError(f"{self.name}: .{self.kind} is read from its end, so save the file to a disk first")
        return io.BufferedReader(raw)


class Raw(io.RawIOBase):
    """Wrap a stream for io and pyarrow, which would close the stream itself. ``count`` bytes were read."""

    def __init__(self, stream: Any, name: str, check: Callable[[int], None] = lambda count: None):
        self._stream, self._name, self._check, self.count = stream, name, check, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return hasattr(self._stream, "seekable") and self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except gzip.BadGzipFile:
            raise
        except OSError as error:
            raise InputError(f"cannot read {self._name}: {reason_of(error)}") from error
        buffer[: len(content)] = content
        self.count += len(content)
        self._check(self.count)
        return len(content)


def _lines(stream: io.TextIOWrapper, limit: int, problem_of: Callable[[str], str | None]) -> Iterator[Line]:
    """Yield all lines. The content of a line of ``limit`` or more characters is replaced by a problem."""
    number = 0
    while text := stream.readline(limit):
        number += 1
        if len(text) < limit or text.endswith("\n"):
            yield number, text, problem_of(text)
            continue
        while len(text) == limit and not text.endswith("\n"):
            text = stream.readline(limit)
        yield number, "", f"{limit:,} characters or more"


# ── Values of JSON and Parquet ───────────────────────────────────────────────────────────────────────────────────────


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise InputError(f"the name {_first_twice([name for name, _ in pairs])} occurs twice")
    return values


JSON = json.JSONDecoder(object_pairs_hook=_object)


def _json_problem(error: Exception) -> str:
    """Return why `JSON` cannot decode a text."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, InputError) else "a number has too many digits"  # which Python limits


def _parsed(number: int, line: str, problem: str | None) -> Row:
    if problem:
        return Row(number, {}, problem)
    try:
        return _object_row(number, JSON.decode(line))
    except (ValueError, RecursionError) as error:
        return Row(number, {}, _json_problem(error))


def _object_row(number: int, value: Any) -> Row:
    problem = None if isinstance(value, dict) else "not a JSON object"
    try:
        json.dumps(value, ensure_ascii=False).encode()  # visits all values, faster than Python can
    except UnicodeEncodeError:  # JSON has an escape for half of a pair, and UTF-8 has no encoding
        problem = "half of a surrogate pair, which is not a character"
    except RecursionError as error:
        problem = _json_problem(error)
    return Row(number, {} if problem else value, problem)


def _python_values(array: Any) -> list[Any]:
    """Convert an array of pyarrow. A value that Python cannot hold, or text that is not UTF-8, becomes `UNREADABLE`."""
    try:
        return array.to_pylist()
    except UNREADABLE_ERRORS:
        return list(map(_python_value, array))


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UNREADABLE_ERRORS:
        return UNREADABLE


def _first_twice(names: Sequence[str]) -> str:
    return quote_name(next(name for name, count in Counter(names).items() if count > 1))

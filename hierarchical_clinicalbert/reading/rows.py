"""Read the rows of one source, one at a time, each with the line where it begins.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem. The rows before and after it are still read.
2. `RowReader` and its `read` raise `InputError` if the columns are unknown, or the source is
   damaged or exceeds its `Limits`.
3. Types are never inferred. A CSV cell "NA" or "007" is that text, and an empty cell is an empty
   text. In JSON and Parquet an integer beside nulls stays an integer.
4. Text is UTF-8, with or without a byte order mark, unless another encoding is given. The problem
   of a text in another one names an encoding that fits, but none is ever guessed. Lines end with
   \\n, \\r\\n or \\r. Empty lines are not rows.
5. CSV and TSV rows are quoted as in RFC 4180. A stray quotation mark swallows rows; the problem
   names their lines. Many TSV files are not quoted at all. So a TSV row of several lines that may
   as well be several rows is a problem, unless the header is quoted. Another separator than that of
   the file's name is found in the header, and logged.
6. Of an .xlsx file, the first visible sheet is read. Its first row is the header; columns that it
   does not name are left out.
7. In a folder of texts, each file is a row. Files in a subfolder have its path as their label.
8. Of a Parquet file, only the requested columns are read, a few rows at a time.
9. Memory holds a few rows, or up to 1,024 of JSON Lines. Only a ``json`` file is loaded completely.
10. Messages show no values. They show the name of a column only if it looks like a name.
"""

import gzip
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

from hierarchical_clinicalbert.reading.delimited import find_separator, read_delimited
from hierarchical_clinicalbert.reading.encodings import Encoding
from hierarchical_clinicalbert.reading.workbook import read_workbook
from taxonomy_hierarchical import quote_name

logger = logging.getLogger(__name__)

KINDS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "txt", "xlsx")
# read from their end
SEEKABLE = {"parquet": "a Parquet file", "xlsx": "an .xlsx workbook without a password"}
FOLDER = "folder"  # of texts, one a file: the kind of a source that is no file
UNITS = {"json": "row", "parquet": "row", "xlsx": "row", FOLDER: "file"}
FIRST_ROWS = 1024  # of JSON, whose names become the columns
# of a Parquet column; without it, pyarrow reads the column's part of a whole row group
BYTES_AT_ONCE = 2**23
# of Parquet: a value that is stored once is decoded for every row, so small batches bound the
# memory
ROWS_PER_BATCH = 16


class InputError(ValueError):
    """User input that cannot be used. The message is one line: what, where, and what to do."""


def reason_of(error: Exception) -> str:
    """Return an error's message on one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Row:
    """A row of a source."""

    line: int  # where the row begins, from 1; else the number of the row or file, see `UNITS`
    # by column name; empty if there is a problem. A JSON row has only the names in it.
    values: dict[str, Any]
    problem: str | None = None  # why the row cannot be read, as a short phrase


@dataclass(frozen=True)
class Limits:
    """The limits of a source. None means no limit."""

    # of the file, decompressed; for Parquet, of the requested columns, decoded
    bytes: int | None = None
    rows: int | None = None
    columns: int | None = None
    cells: int = 10**8  # of a sheet
    unpacked_bytes: int = 2**30  # of all parts of a workbook, whose texts are held in memory


class RowReader:
    """Read the rows of one source, once.

    Args:
        stream: a binary stream, which the caller closes. Only read() is called; for `SEEKABLE`
            kinds also seekable() and seek(). For a `FOLDER`, the names of its files, each with a
            function that reads it.
        kind: one of `KINDS`, or `FOLDER`.
        name: name of the source in messages.
        progress: returns the share of the stream that was read, or None if it is unknown. Ignored
            for Parquet.
        encoding: of text files. None for UTF-8 where no flag ``--encoding`` can be offered.

    Attributes:
        columns: column names in order. For JSON, the names of the first 1,024 rows.
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
        self.kind = kind
        self.name = name
        self.limits = limits or Limits()
        self.done = progress
        self.unit = UNITS.get(kind, "line")
        self.columns: list[str] = []
        try:
            self._encoding = Encoding(encoding)
        except (LookupError, ValueError) as error:
            raise InputError(
                f"--encoding {encoding}: Python has no such encoding of text"
            ) from error
        self._notice = ""  # what is logged once the rows are read
        openers = {
            "parquet": self._open_parquet,
            "xlsx": self._open_workbook,
            FOLDER: self._open_folder,
        }
        with self._as_input_error():
            # of Parquet, a function of the requested columns
            self._rows = openers.get(kind, self._open_text)(stream)

    def read(self, requested: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows, with the requested columns, by default all.

        Other columns of a Parquet file are skipped.
        """
        if self._notice:
            logger.warning("%s %s", self.name, self._notice)
        with self._as_input_error():
            names = list(self.columns if requested is None else requested)
            rows = self._rows(names) if self.kind == "parquet" else self._rows
            for count, row in enumerate(rows, start=1):
                self.check("rows", count)
                yield row

    def place(self, row: Row) -> str:
        """Return the position of a row, for a message."""
        return f"{self.name}, {self.unit} {row.line}"

    def check(self, limit: str, count: int) -> None:
        """Raise InputError if a count exceeds one of the `Limits`."""
        most = getattr(self.limits, limit)
        if most is not None and count > most:
            raise InputError(
                f"{self.name} has more than {most:,} {limit.replace('_', ' ')}, the most "
                "that is accepted"
            )

    def set_columns(self, names: list[str]) -> None:
        """Set ``columns``, or raise InputError if there are too many, or two have the same name."""
        self.check("columns", len(names))
        counts = Counter(filter(None, names))  # spreadsheets leave empty names at the end
        if twice := [name for name, count in counts.items() if count > 1]:
            raise InputError(
                f"{self.name} has two columns called {quote_name(twice[0])}: rename or remove one"
            )
        self.columns = list(dict.fromkeys(names))

    @contextmanager
    def _as_input_error(self) -> Iterator[None]:
        """Convert any exception into an `InputError`: libraries document none for a damaged
        source, and raise, say, KeyError.
        """
        try:
            yield
        except InputError:
            raise
        except MemoryError as error:
            raise InputError(
                f"{self.name} does not fit in memory, or is damaged: split it"
            ) from error
        except Exception as error:
            what = SEEKABLE.get(self.kind, f"{self._encoding.name} text")
            raise InputError(
                f"{self.name} is not {what}, or is damaged: copy or write it again"
            ) from error

    def _open_text(self, stream: Any) -> Iterator[Row]:
        buffered = io.BufferedReader(
            Raw(stream, self.name, lambda count: self.check("bytes", count)), 2**16
        )
        if problem := self._encoding.problem_of_start(buffered.peek(4)[:4]):
            raise InputError(f"{self.name} is {problem}")
        # bytes that cannot be decoded become unpaired surrogates
        text = io.TextIOWrapper(
            buffered, encoding=self._encoding.codec, errors="surrogateescape", newline=""
        )
        if self.kind == "json":
            return self._open_json(text.read())
        if self.kind in ("csv", "tsv"):
            return self._open_delimited(text)
        lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        if self.kind != "txt":
            return self._open_objects(self._parsed(*line) for line in lines)
        self.set_columns(["text"])
        problem_of = self._encoding.problem_of
        return (
            Row(n, {}, bad) if (bad := problem_of(line)) else Row(n, {"text": line.rstrip("\r\n")})
            for n, line in lines
        )

    def _open_delimited(self, lines: Iterator[str]) -> Iterator[Row]:
        num_blank, first = next(
            ((n, line) for n, line in enumerate(lines) if line.strip()), (0, "")
        )
        usual = "\t" if self.kind == "tsv" else ","
        separator = find_separator(first, usual)
        if separator != usual:
            self._notice = f"is separated by {separator!r}"
        # without quotes in the header, a TSV file may not be quoted at all
        may_swallow = separator == "\t" and '"' not in first
        rows = read_delimited(
            chain([first], lines), separator, num_blank, self._encoding.problem_of, may_swallow
        )
        _, header, problem = next(rows, (0, [], None))
        if problem:
            raise InputError(
                f"{self.name}: the first line, which names the columns, cannot be read: {problem}"
            )
        self.set_columns(header)
        return (
            Row(n, {} if bad else dict(zip(header, fields, strict=True)), bad)
            for n, fields, bad in rows
        )

    def _open_json(self, text: str) -> Iterator[Row]:
        if problem := self._encoding.problem_of(text):
            raise InputError(f"{self.name} is {problem}")
        try:
            records = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            remedy = (
                "; name it .jsonl if it has an object a line" if "Extra data" in str(error) else ""
            )
            raise InputError(f"{self.name}: not JSON: {reason_of(error)}{remedy}") from error
        if not isinstance(records, list):
            raise InputError(f"{self.name}: a JSON file must hold a list of objects")
        return self._open_objects(
            _object_row(i, record) for i, record in enumerate(records, start=1)
        )

    def _open_objects(self, rows: Iterator[Row]) -> Iterator[Row]:
        # many writers omit nulls, so the columns are the names of several rows
        first = list(islice(rows, FIRST_ROWS))
        if first and all(row.problem for row in first):
            raise InputError(f"{self.place(first[0])}: {first[0].problem}")
        self.set_columns(list(dict.fromkeys(name for row in first for name in row.values)))
        return chain(first, rows)

    def _parsed(self, number: int, line: str) -> Row:
        if problem := self._encoding.problem_of(line):
            return Row(number, {}, problem)
        try:
            return _object_row(number, DECODER.decode(line))
        except (ValueError, RecursionError) as error:
            return Row(number, {}, f"not JSON: {reason_of(error)}")

    def _open_parquet(self, stream: Any) -> Callable[[list[str]], Iterator[Row]]:
        import pyarrow.parquet  # lazily, because it is slow to import

        file = pyarrow.parquet.ParquetFile(
            self._seekable(stream), pre_buffer=False, buffer_size=BYTES_AT_ONCE
        )
        self.set_columns(file.schema_arrow.names)
        return lambda requested: self._read_parquet(file, requested)

    def _read_parquet(self, file: Any, requested: list[str]) -> Iterator[Row]:
        import pyarrow

        count = 0
        size = 0
        total = max(file.metadata.num_rows, 1)
        self.done = lambda: count / total
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=requested, use_threads=False):
            batch = batch.select(requested)  # which has also other columns, if names have dots
            columns = [
                a.dictionary_decode() if isinstance(a, pyarrow.DictionaryArray) else a
                for a in batch.columns
            ]
            size += sum(column.nbytes for column in columns)
            self.check("bytes", size)
            for place in range(batch.num_rows):
                count += 1
                try:
                    row = Row(count, batch.slice(place, 1).to_pylist()[0])
                except Exception:  # pyarrow documents none; Python has no such value
                    row = Row(count, {}, "it holds a value that cannot be read")
                yield row

    def _open_workbook(self, stream: Any) -> Iterator[Row]:
        sheets, rows = read_workbook(self._seekable(stream), self.check)
        if len(sheets) > 1:
            self._notice = (
                f"has {len(sheets)} sheets: only the first is read, {quote_name(sheets[0])}"
            )
        _, header = next(rows, (0, []))
        names = ["" if value is None else str(value) for value in header]
        self.set_columns(names)
        return (
            Row(number, dict(zip_longest(names, values[: len(names)]))) for number, values in rows
        )

    def _open_folder(self, files: Sequence[tuple[str, Callable[[], bytes]]]) -> Iterator[Row]:
        self.set_columns(["id", "text", "label"])
        self._notice = (
            f"holds {len(files):,} texts, one a file; for one a line, give its files by a pattern"
        )
        return (
            self._text_row(number, name, read())
            for number, (name, read) in enumerate(files, start=1)
        )

    def _text_row(self, number: int, name: str, content: bytes) -> Row:
        text = content.decode(self._encoding.codec, "surrogateescape")
        problem = self._encoding.problem_of_start(content[:4]) or self._encoding.problem_of(text)
        if problem or not text.strip():
            return Row(number, {}, f"{name}: {problem or 'the text is empty'}")
        return Row(number, {"id": name, "text": text, "label": name.rpartition("/")[0]})

    def _seekable(self, stream: Any) -> io.BufferedReader:
        raw = Raw(stream, self.name)
        if not raw.seekable():
            raise InputError(
                f"{self.name}: .{self.kind} is read from its end, so save the file to a disk first"
            )
        return io.BufferedReader(raw)


class Raw(io.RawIOBase):
    """Wrap a stream for io and pyarrow, which would close the stream itself.

    ``count`` bytes were read.
    """

    def __init__(self, stream: Any, name: str, check: Callable[[int], None] = lambda count: None):
        self._stream = stream
        self._name = name
        self._check = check
        self.count = 0

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


# ── Values of JSON ────────────────────────────────────────────────────────────────────────────────


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _object_row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, "not a JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode()  # visits all values, faster than Python can
    except (UnicodeEncodeError, RecursionError) as error:
        # JSON can escape half of a surrogate pair, which UTF-8 lacks
        return Row(number, {}, f"not text: {reason_of(error)}")
    return Row(number, value)

"""A file of texts in, rows with their line numbers out, and what became of them as CSV or JSON Lines.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem, not an end: those before and after it are read.
2. Files are at most 10 MB and are read from memory: nothing of them is on disk while they are classified.
3. In a CSV for download a cell that a spreadsheet would take for a formula begins with an apostrophe.
4. Columns keep their names and order; those of another row length are problems, not guesses.
"""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet
from classification import Refused

MAX_BYTES = 10 * 2**20
MAX_ROWS = 10_000
MAX_UNPACKED = 20 * MAX_BYTES  # of a Parquet file: its pages are compressed
MAX_VALUES = 1000 * MAX_ROWS  # of a Parquet file: those that are missing take no room in it
KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")
TEXT_COLUMNS = ("medical_abstract", "abstract", "text", "sentence", "content", "document", "body")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        line: where it begins in the file, from 1; of a Parquet file the row, from 1.
        values: what stands in each column; empty where there is a problem.
        problem: why it cannot be read.
    """

    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a file, problems included, and the names of its columns."""

    columns: list[str]
    rows: list[Row]

    def text_column(self) -> str:
        """The column that most likely holds the texts: by its name, else the one with the most characters."""
        for name in TEXT_COLUMNS:
            for column in self.columns:
                if column.strip().lower() == name:
                    return column
        read = [row.values for row in self.rows if row.problem is None][:100]
        return max(self.columns, key=lambda column: sum(len(str(values.get(column) or "")) for values in read))


def kind_of(name: str) -> str:
    """The kind of a file, by its name.

    Raises:
        Refused: it is none that can be read.
    """
    kind = name.lower().rpartition(".")[2].replace("ndjson", "jsonl")
    if kind not in KINDS:
        raise Refused("The file must be CSV, TSV, JSON Lines (.jsonl), Parquet or text (.txt), and be named so.")
    return kind


def read_table(content: bytes, kind: str) -> Table:
    """The rows of a file.

    Raises:
        Refused: it is too large, empty, not of its kind, or two columns share a name.
    """
    if len(content) > MAX_BYTES:
        raise Refused(f"The file has {len(content) / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are accepted.")
    read = {"csv": read_delimited, "tsv": read_delimited, "jsonl": read_json_lines, "txt": read_lines}
    if kind == "parquet":
        columns, rows = read_parquet(content)
    else:
        columns, rows = read[kind](content, kind)
    if not rows:
        raise Refused("The file has no rows.")
    if not columns:
        raise Refused("No row of the file can be read; is it of the kind that its name says?")
    return Table(columns, rows)


def too_many(rows: list[Row]) -> None:
    if len(rows) > MAX_ROWS:
        raise Refused(f"The file has more than {MAX_ROWS:,} rows, which is the most that is accepted.")


def lines_of(content: bytes) -> Iterator[tuple[int, str, bool]]:
    """Numbers, lines with their ends, and whether they are UTF-8; in one that is not, half surrogates stand for bytes."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), start=1):
        try:
            yield number, line.decode(), True
        except UnicodeDecodeError:
            yield number, line.decode(errors="surrogateescape"), False


def read_lines(content: bytes, kind: str) -> tuple[list[str], list[Row]]:
    """A text a line; blank lines are none."""
    rows: list[Row] = []
    for number, line, valid in lines_of(content):
        if not valid:
            rows.append(Row(number, {}, "not UTF-8"))
        elif line.strip():
            rows.append(Row(number, {"text": line.rstrip("\r\n")}))
        too_many(rows)
    return ["text"], rows


def read_json_lines(content: bytes, kind: str) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, line, valid in lines_of(content):
        if not line.strip():
            continue
        try:
            found = json.loads(line) if valid else None
            if not valid:
                rows.append(Row(number, {}, "not UTF-8"))
            elif not isinstance(found, dict):
                rows.append(Row(number, {}, "not a JSON object"))
            elif half_surrogates(found):
                rows.append(Row(number, {}, "half of a surrogate pair, which is no character"))
            else:
                columns.update(dict.fromkeys(found))
                rows.append(Row(number, found))
        except (ValueError, RecursionError):  # also of a number with more digits than Python reads
            rows.append(Row(number, {}, "not JSON"))
        too_many(rows)
    return list(columns), rows


def half_surrogates(found: dict[str, Any]) -> bool:
    """Whether a name or a value has what JSON can escape and UTF-8 cannot write."""
    try:
        json.dumps(finite(found), ensure_ascii=False).encode()  # as it will be written, however deep it is nested
    except UnicodeEncodeError:
        return True
    return False


def read_delimited(content: bytes, kind: str) -> tuple[list[str], list[Row]]:
    broken: set[int] = set()

    def lines() -> Iterator[str]:
        for number, line, valid in lines_of(content):
            if not valid:
                broken.add(number)
            yield line  # also a broken one: its quotation marks say where its row ends

    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(lines(), delimiter="\t" if kind == "tsv" else ",", strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, None) or []
    except csv.Error:
        raise Refused("The first line of the file, which names the columns, cannot be read.") from None
    if broken:
        raise Refused("The first line of the file, which names the columns, is not UTF-8.")
    if len(set(header)) < len(header):
        raise Refused("Two columns of the file have the same name.")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return header, rows
        except csv.Error:
            rows.append(Row(line, {}, "a quotation mark that is not closed, or not doubled"))
        else:
            if broken & set(range(line, reader.line_num + 1)):
                rows.append(Row(line, {}, "not UTF-8"))
            elif kind == "tsv" and any(takes_in_rows(cell, i, len(header)) for i, cell in enumerate(fields)):
                rows.append(Row(line, {}, "a quotation mark that is not closed before the rows below"))
            elif fields and len(fields) != len(header):
                rows.append(Row(line, {}, f"{len(fields)} fields, where the first line has {len(header)}"))
            elif fields:
                rows.append(Row(line, dict(zip(header, fields, strict=True))))
        too_many(rows)


def takes_in_rows(cell: str, place: int, fields: int) -> bool:
    """Whether a cell of a TSV file, by its tabs, began with a stray quotation mark and holds the rows below it.

    Args:
        place: of its column, from 0.
        fields: of a row.
    """
    first, *others = (line.count("\t") for line in cell.split("\n"))
    rest = fields - 1 - place  # the fields of its own row that the cell would have taken in first
    return fields > 1 and bool(others) and (first == rest if rest else all(tabs == fields - 1 for tabs in others))


def read_parquet(content: bytes) -> tuple[list[str], list[Row]]:
    try:
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise Refused(f"The file has {file.metadata.num_rows:,} rows; at most {MAX_ROWS:,} are accepted.")
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            if sum(group.total_byte_size for group in groups) > MAX_UNPACKED:
                raise Refused(f"Unpacked, the file has more than {MAX_UNPACKED // 2**20} MB.")
            columns = (group.column(i) for group in groups for i in range(group.num_columns))
            if sum(column.num_values for column in columns) > MAX_VALUES:
                raise Refused(f"The file has more than {MAX_VALUES:,} values, which is the most that is accepted.")
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise Refused("Two columns of the file have the same name.")
            batches, size = [], 0  # a value that repeats is stored once, and takes its room as often as it is read
            for batch in file.iter_batches(16):
                plain = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
                batches.append(pyarrow.RecordBatch.from_arrays(plain, names))
                size += batches[-1].nbytes
                if size > MAX_UNPACKED:
                    raise Refused(f"Unpacked, the file has more than {MAX_UNPACKED // 2**20} MB.")
            table = pyarrow.Table.from_batches(batches) if batches else file.schema_arrow.empty_table()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("The file is not Parquet, or is damaged.") from None
    columns = []
    for number, column in enumerate(table.itercolumns(), start=1):
        try:
            columns.append(column.to_pylist())
        except (pyarrow.ArrowException, KeyError, OSError, OverflowError, ValueError):
            why = "holds what cannot be read, such as a time beyond the year 9999"
            raise Refused(f"Column {number} of the file {why}: leave it out.") from None
    rows = enumerate(zip(*columns, strict=True), start=1)
    return names, [Row(number, dict(zip(names, values, strict=True))) for number, values in rows]


def to_csv(records: list[dict[str, Any]]) -> str:
    """Records as CSV that spreadsheets may open: lists as text, formulas defused."""
    stream = io.StringIO()
    writer = csv.writer(
        stream, lineterminator="\r\n"
    )  # as RFC 4180 has it; a bare return in a cell is quoted then, too
    names = list(dict.fromkeys(name for record in records for name in record))
    writer.writerow([defuse(name) for name in names])
    for record in records:
        writer.writerow([defuse(record.get(name)) for name in names])
    return stream.getvalue()


def defuse(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"'{text}" if text.startswith(FORMULA) else text


def to_json_lines(records: list[dict[str, Any]]) -> str:
    """Records as JSON Lines. Numbers that JSON does not know, such as NaN, become null."""
    return "".join(json.dumps(finite(record), ensure_ascii=False, default=str) + "\n" for record in records)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

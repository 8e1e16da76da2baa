"""A file of texts in, its texts with their line numbers out, and what became of them as CSV or JSON Lines.

Worth knowing:

1. A row that cannot be read is a `Row` with a problem, not an end: those before and after it are read.
2. A file of at most 10 MB can unpack to gigabytes, whatever it says of itself. So a process of its own reads it, this file run
   as a script, with limits of time and, on Linux, of memory. It passes on one column, and only so much of it.
3. Files are read from memory: nothing of them is on disk while they are classified.
4. In a CSV for download a cell that a spreadsheet would take for a formula begins with an apostrophe.
5. Columns keep their names and order; those of another row length are problems, not guesses.
"""

import csv
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 10 * 2**20
MAX_ROWS = 10_000
MAX_COLUMNS = 1_000
MAX_UNPACKED = 4 * MAX_BYTES  # of the column with the texts
MAX_MEMORY = 512 * 2**20  # that the reading process takes for a file
MAX_SECONDS = 30  # that it takes
KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")
TEXT_COLUMNS = ("medical_abstract", "abstract", "text", "sentence", "content", "document", "body")
TOO_LARGE = f"Unpacked, the file has more than {MAX_UNPACKED // 2**20} MB."
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
Found = tuple[int, dict[str, Any], str | None]  # where a row begins, its values, and why it cannot be read


class Refused(ValueError):
    """What a user asked for cannot be done; the message says in words why, and holds nothing that they sent."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        line: where it begins in the file, from 1; of a Parquet file the row, from 1.
        text: what stands in the column with the texts; None where that is empty, False where it is a number or the like.
        problem: why the row cannot be read.
    """

    line: int
    text: Any
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """The names of a file's columns, the one that was read, and its rows, problems included."""

    columns: list[str]
    column: str
    rows: list[Row]


def kind_of(name: str) -> str:
    """The kind of a file, by its name.

    Raises:
        Refused: it is none that can be read.
    """
    kind = name.lower().rpartition(".")[2].replace("ndjson", "jsonl")
    if kind not in KINDS:
        raise Refused("The file must be CSV, TSV, JSON Lines (.jsonl), Parquet or text (.txt), and be named so.")
    return kind


def read_table(content: bytes, kind: str, column: str | None = None) -> Table:
    """The rows of a file, as a process of its own reads them.

    Args:
        column: with the texts; by default one that is named like it, else the one with the most characters.

    Raises:
        Refused: it is too large, empty, not of its kind, has no such column, or two columns share a name.
    """
    if len(content) > MAX_BYTES:
        raise Refused(f"The file has {len(content) / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are accepted.")
    asked = json.dumps({"kind": kind, "column": column}).encode() + b"\n" + content
    # Arrow's own allocators and glibc's arenas reserve far more than they use, which counts against the limit
    settings = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    reader = [sys.executable, __file__]
    try:
        done = subprocess.run(
            reader, input=asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=MAX_SECONDS, env=settings
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"The file takes more than {MAX_SECONDS} seconds to read.") from None
    if done.returncode:
        print(f"reading a {kind} file ended with code {done.returncode}", file=sys.stderr, flush=True)
        raise Refused(f"The file is damaged, or takes more than {MAX_MEMORY // 2**20} MB of memory to read.")
    head, *rows = (json.loads(line) for line in io.BytesIO(done.stdout))
    if "refused" in head:
        raise Refused(head["refused"])
    return Table(**head, rows=[Row(*row) for row in rows])


# in the process that reads


def main() -> None:
    """Answers `read_table`: what is asked, and the file, come by standard input; lines of JSON go to standard output."""
    asked = json.loads(sys.stdin.buffer.readline())
    if asked["kind"] == "parquet":
        import pyarrow.parquet  # noqa: F401 (before the limit, which counts from here)
    limit_memory()
    written = io.BytesIO()
    try:
        for line in read(sys.stdin.buffer.read(), **asked):
            written.write(json.dumps(line, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
            if written.tell() > MAX_UNPACKED:
                raise Refused(TOO_LARGE)
        answer = written.getbuffer()
    except Refused as error:
        answer = json.dumps({"refused": str(error)}).encode()
    except MemoryError:
        answer = json.dumps({"refused": TOO_LARGE}).encode()
    sys.stdout.buffer.write(answer)


def limit_memory() -> None:
    """Lets this process take `MAX_MEMORY` more than it has. Only Linux can."""
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):  # another system, or a lower limit already
        pass


def read(content: bytes, kind: str, column: str | None) -> Iterator[Any]:
    """The columns and the one with the texts, then rows: line, text, problem."""
    if kind == "parquet":
        yield from read_parquet(content, column)
        return
    readers = {"csv": read_delimited, "tsv": read_delimited, "jsonl": read_json_lines, "txt": read_lines}
    columns: dict[str, None] = {}
    sizes: Counter[str] = Counter()
    count = good = 0
    for _, values, problem in readers[kind](content, kind, columns):
        count += 1
        check_count(count)
        if problem is None and good < 100:
            good += 1
            sizes.update({name: len(value) for name, value in values.items() if isinstance(value, str)})
    if not count:
        raise Refused("The file has no rows.")
    column = choose_column(columns, column) or max(columns, key=sizes.__getitem__)
    yield {"columns": list(columns), "column": column}
    for line, values, problem in readers[kind](content, kind, {}):
        yield [line, text_or_false(values.get(column)), problem]


def check_count(rows: int) -> None:
    if rows > MAX_ROWS:
        raise Refused(f"The file has more than {MAX_ROWS:,} rows, which is the most that is accepted.")


def add_columns(columns: dict[str, None], names: Collection[str]) -> None:
    columns.update(dict.fromkeys(names))
    if max(len(columns), len(names)) > MAX_COLUMNS:
        raise Refused(f"The file has more than {MAX_COLUMNS:,} columns, which is the most that is accepted.")


def choose_column(columns: Collection[str], asked: str | None) -> str | None:
    """The column that is asked for, else one that is named as texts are, else None."""
    if not columns:
        raise Refused("No row of the file can be read; is it of the kind that its name says?")
    if asked is not None and asked not in list(columns):  # it may be of any type
        raise Refused("The file has no such column.")
    named = (column for name in TEXT_COLUMNS for column in columns if column.strip().lower() == name)
    return next(named, None) if asked is None else asked


def text_or_false(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else False


def lines_of(content: bytes) -> Iterator[tuple[int, str, bool]]:
    """Numbers, lines with their ends, and whether they are UTF-8; in one that is not, half surrogates stand for bytes."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), start=1):
        try:
            yield number, line.decode(), True
        except UnicodeDecodeError:
            yield number, line.decode(errors="surrogateescape"), False


def read_lines(content: bytes, kind: str, columns: dict[str, None]) -> Iterator[Found]:
    """A text a line; blank lines are none."""
    add_columns(columns, ["text"])
    for number, line, valid in lines_of(content):
        if not valid:
            yield number, {}, "not UTF-8"
        elif line.strip():
            yield number, {"text": line.rstrip("\r\n")}, None


def read_json_lines(content: bytes, kind: str, columns: dict[str, None]) -> Iterator[Found]:
    for number, line, valid in lines_of(content):
        if not line.strip():
            continue
        try:
            found = json.loads(line) if valid else None
            "".join(found if isinstance(found, dict) else ()).encode()
        except UnicodeEncodeError:
            yield number, {}, "half of a surrogate pair in a name, which is no character"
        except (ValueError, RecursionError):  # also of a number with more digits than Python reads
            yield number, {}, "not JSON"
        else:
            if isinstance(found, dict):
                add_columns(columns, found)
                yield number, found, None
            else:
                yield number, {}, "not a JSON object" if valid else "not UTF-8"


def read_delimited(content: bytes, kind: str, columns: dict[str, None]) -> Iterator[Found]:
    broken = False  # whether a line of the row is not UTF-8

    def lines() -> Iterator[str]:
        nonlocal broken
        for _, line, valid in lines_of(content):
            broken = broken or not valid
            yield line  # also a broken one: its quotation marks say where its row ends

    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(lines(), delimiter="\t" if kind == "tsv" else ",", strict=True)
    try:
        header = next(reader, None) or []
    except csv.Error:
        raise Refused("The first line of the file, which names the columns, cannot be read.") from None
    if broken:
        raise Refused("The first line of the file, which names the columns, is not UTF-8.")
    add_columns(columns, header)
    if len(columns) < len(header):
        raise Refused("Two columns of the file have the same name.")
    while True:
        line, broken = reader.line_num + 1, False
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield line, {}, "a quotation mark that is not closed, or not doubled"
            continue
        if broken:
            yield line, {}, "not UTF-8"
        elif kind == "tsv" and any(takes_in_rows(cell, i, len(header)) for i, cell in enumerate(fields)):
            yield line, {}, "a quotation mark that is not closed before the rows below"
        elif fields and len(fields) != len(header):
            yield line, {}, f"{len(fields)} fields, where the first line has {len(header)}"
        elif fields:
            yield line, dict(zip(header, fields, strict=True)), None


def takes_in_rows(cell: str, place: int, fields: int) -> bool:
    """Whether a cell of a TSV file, by its tabs, began with a stray quotation mark and holds the rows below it.

    Args:
        place: of its column, from 0.
        fields: of a row.
    """
    first, *others = (line.count("\t") for line in cell.split("\n"))
    rest = fields - 1 - place  # the fields of its own row that the cell would have taken in first
    return fields > 1 and bool(others) and (first == rest if rest else all(tabs == fields - 1 for tabs in others))


def read_parquet(content: bytes, column: str | None) -> Iterator[Any]:
    """As `read`. Only one column is unpacked, and where none is named as texts are, the first rows of all that hold texts."""
    import pyarrow
    import pyarrow.parquet

    types = pyarrow.types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    def values(batch: Any, name: str) -> list[Any]:
        try:
            return batch.column(name).to_pylist()
        except MemoryError:
            raise
        except (pyarrow.ArrowException, KeyError, OSError, OverflowError, ValueError):
            why = "holds what cannot be read, such as a time beyond the year 9999"
            raise Refused(f"Column {names.index(name) + 1} of the file {why}: leave it out.") from None

    try:
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), pre_buffer=False) as file:
            names = file.schema_arrow.names
            add_columns({}, names)
            if len(set(names)) < len(names):
                raise Refused("Two columns of the file have the same name.")
            check_count(file.metadata.num_rows)
            column = choose_column(names, column)
            if column is None:
                texts = [field.name for field in file.schema_arrow if is_text(field.type)]
                first = next(file.iter_batches(100, columns=texts, use_threads=False), None)
                sizes = Counter(
                    {name: sum(len(value or "") for value in values(first, name)) for name in texts if first}
                )
                column = max(names, key=sizes.__getitem__)
            yield {"columns": names, "column": column}
            line = 0
            for batch in file.iter_batches(16, columns=[column], use_threads=False):
                for value in values(batch, column):
                    line += 1
                    check_count(line)
                    yield [line, text_or_false(value), None]
            if not line:
                raise Refused("The file has no rows.")
    except (Refused, MemoryError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError):
        raise Refused("The file is not Parquet, or is damaged.") from None


# what is downloaded


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
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text}" if text.startswith(FORMULA) else text


def to_json_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    main()

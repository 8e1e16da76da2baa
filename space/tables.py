"""A file of texts in, its texts with their line numbers out, and what became of them as CSV or JSON Lines.

Worth knowing:

1. `reading` reads the file, as it does for the commands. It lies beside this folder in the repository, and in it on the Hub.
2. A file of at most 10 MB can unpack to gigabytes, whatever it says of itself. So a process of its own reads it, this file run
   as a script, with limits of time and, on Linux, of memory. It passes on one column, and only so much of it.
3. Files are read from memory: nothing of them is on disk while they are classified.
4. In a CSV for download a cell that a spreadsheet would take for a formula begins with an apostrophe.
"""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not Path(__file__).with_name("reading").exists():  # in the repository
    sys.path.append(str(Path(__file__).parent.parent))

from reading.columns import TEXT_COLUMNS, find_column, longest_column, text_problem
from reading.rows import KINDS, InputError, Limits, Rows

MAX_BYTES = 10 * 2**20
MAX_ROWS = 10_000
MAX_COLUMNS = 1_000
MAX_UNPACKED = 4 * MAX_BYTES  # of the column with the texts
MAX_MEMORY = 512 * 2**20  # that the reading process takes for a file
MAX_SECONDS = 30  # that it takes
LIMITS = Limits(bytes=MAX_UNPACKED, rows=MAX_ROWS, columns=MAX_COLUMNS, characters=MAX_BYTES + 1)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class Refused(ValueError):
    """What a user asked for cannot be done. The message says why. Of what they sent it shows at most names of columns."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        line: where it begins in the file, see `reading.rows.Row`.
        text: None if there is a problem.
        problem: why the row cannot be classified.
    """

    line: int
    text: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """The names of a file's columns, the one that was read, and its rows, problems included."""

    columns: list[str]
    column: str
    rows: list[Row]


def kind_of(name: str) -> str:
    """Return the kind of a file by its name.

    Raises:
        Refused: it is none that can be read.
    """
    kind = name.lower().rpartition(".")[2]
    if kind not in KINDS:
        raise Refused("The file must be CSV, TSV, JSON, JSON Lines (.jsonl), Parquet or text (.txt), and be named so.")
    return kind


def read_table(content: bytes, kind: str, column: str | None = None) -> Table:
    """Return the rows of a file, as a process of its own reads them.

    Args:
        column: with the texts; by default found by its name, else the one with the most characters.

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
    """Answer `read_table`: what is asked, and the file, come by standard input; lines of JSON go to standard output."""
    asked = json.loads(sys.stdin.buffer.readline())
    if asked["kind"] == "parquet":
        import reading.parquet  # noqa: F401 (before the limit, which counts from here)
    limit_memory()
    written = io.BytesIO()
    try:
        for line in read(sys.stdin.buffer.read(), **asked):
            written.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            if written.tell() > MAX_UNPACKED:
                raise Refused(f"Unpacked, the file has more than {MAX_UNPACKED // 2**20} MB.")
        answer = written.getbuffer()
    except InputError as error:
        answer = json.dumps({"refused": f"{error}."}).encode()
    except Refused as error:
        answer = json.dumps({"refused": str(error)}).encode()
    sys.stdout.buffer.write(answer)


def limit_memory() -> None:
    """Let this process take `MAX_MEMORY` more than it has. Only Linux can."""
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):  # another system, or a lower limit already
        pass


def read(content: bytes, kind: str, column: str | None) -> Iterator[Any]:
    """Yield the columns and the one with the texts, then rows: line, text, problem.

    Raises:
        Refused, InputError: as for `read_table`.
    """
    rows = open_rows(content, kind)
    if column is not None and column not in list(rows.columns):  # it may be of any type
        raise Refused("The file has no such column.")
    found = find_column(rows.columns, column, TEXT_COLUMNS)
    if found is None:
        found = longest_column(rows.texts, (row.values for row in rows.read(rows.texts) if row.problem is None))
        if found is None:
            found = next(iter(rows.columns), None)
        rows = open_rows(content, kind)
    yield {"columns": list(rows.columns), "column": found}
    empty = True
    for row in rows.read([] if found is None else [found]):
        empty = False
        text = row.values.get(found)
        problem = row.problem or text_problem(text)
        yield [row.line, None if problem else text, problem]
    if empty:
        raise Refused("The file has no rows.")


def open_rows(content: bytes, kind: str) -> Rows:
    return Rows(io.BytesIO(content), kind, "The file", LIMITS)


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

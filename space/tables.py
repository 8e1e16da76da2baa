"""Read an uploaded file of texts, and write its results as CSV or JSON Lines.

Worth knowing:

1. The package `hierarchical_clinicalbert.reading` reads the file, as for the commands. In the
   repository it is beside this folder, and on the Hub inside it.
2. A file of at most 10 MB can decompress to gigabytes. So a subprocess reads the file, with limits
   of time and, on Linux, of memory. The subprocess runs this file as a script. It returns only the
   column of texts, up to `MAX_UNPACKED` bytes.
3. Files are read from memory: they are not on disk while they are classified.
4. In a CSV for download, no spreadsheet finds a formula, whatever it takes for separators and
   quotes: see `FORMULA`.
"""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

if not Path(__file__).with_name("hierarchical_clinicalbert").exists():  # in the repository
    sys.path.append(str(Path(__file__).parent.parent))

from hierarchical_clinicalbert.reading.columns import TEXT_COLUMNS, find_column, text_problem
from hierarchical_clinicalbert.reading.encodings import has_surrogate
from hierarchical_clinicalbert.reading.results import join_lists
from hierarchical_clinicalbert.reading.rows import FOLDER, KINDS, InputError, Limits, RowReader
from taxonomy_hierarchical import looks_like_name

MAX_CHARACTERS = 20_000  # of a text, unless the model reads more
MAX_BYTES = 10 * 2**20  # which gradio checks
MAX_ROWS = 10_000
MAX_COLUMNS = 1_000
MAX_UNPACKED = 4 * MAX_BYTES  # of the column of texts
MAX_MEMORY = 512 * 2**20  # of the subprocess, in addition to its memory before it reads the file
MAX_SECONDS = 30  # of the subprocess
SAMPLE = 100  # rows in which `longest_column` counts characters
OFFER = ("give --encoding", "choose the encoding")  # of the commands, and here
File = tuple[str, bytes]  # name and content
LIMITS = Limits(bytes=MAX_UNPACKED, rows=MAX_ROWS, columns=MAX_COLUMNS, unpacked_bytes=MAX_UNPACKED)
# The places in a cell where a spreadsheet can find a formula: at the start, and where it may begin
# another cell, after a comma, a semicolon, a tab, a vertical bar or a line break. Quotes and spaces
# in between may be dropped. The characters are those of OWASP's page "CSV Injection". A backslash
# marks these places, because an apostrophe can be a quote, too. Backslashes that already stand
# there are kept apart: they get one more.
DROPPED = r"""(?: (?! [\t\r\n] ) [\s"'\0] )*"""
FORMULA = re.compile(
    rf"""
      # a line break can only begin a cell with quotes
      (?: ^ | [,;|\t\r\n] \ * ["'] ) {DROPPED} (?= \\* [\t\r\n] )
    | [,;|\r\n]                      {DROPPED} (?= \\* \t )
    | (?: ^ | [,;|\t\r\n] )          {DROPPED} (?= \\* [=+\-@＝＋－＠] )
    """,
    re.VERBOSE,
)


class Refused(ValueError):
    """A request that cannot be fulfilled.

    The message gives the reason, and shows at most names of columns.
    """


class TextRow(NamedTuple):
    """A row of a file."""

    line: int  # where the row begins, see `reading.rows.Row`
    text: str | None  # None if there is a problem
    problem: str | None = None  # why the row cannot be classified


class Table(NamedTuple):
    """The columns of a file, the column of texts, and all rows, including those with a problem."""

    columns: list[str]
    column: str
    rows: list[TextRow]


def problem_of(text: Any, length: int) -> str | None:
    """Return why a value cannot be classified, as a short phrase, or None.

    Texts have at most ``length`` characters.
    """
    if problem := text_problem(text):
        return problem
    if len(text) > length:
        return f"the text has {len(text):,} characters; at most {length:,} are accepted"
    return (
        "the text is not valid Unicode: it has half of a surrogate pair"
        if has_surrogate(text)
        else None
    )


def read_table(
    files: list[File],
    column: str | None = None,
    length: int = MAX_CHARACTERS,
    encoding: str | None = None,
) -> Table:
    """Read the rows of a file in a subprocess, or of several, each of which is a text.

    Args:
        files: names and contents. The name of a single file, or its ending alone, is its kind.
        column: the column of texts; by default found by its name, else the one with the most
        characters. length: the greatest length of a text in characters.

    Raises:
        Refused: the file is empty, not of its kind or of another one, lacks the column, or has two
        columns of one name.
    """
    kind = FOLDER if len(files) > 1 else files[0][0].lower().rpartition(".")[2]
    if kind not in (*KINDS, FOLDER):
        raise Refused(
            "The file must be CSV, TSV, Excel (.xlsx), JSON, JSON Lines, Parquet or text "
            "(.txt), with that ending in its name."
        )
    sizes = [(name, len(content)) for name, content in files]
    asked = {
        "column": column,
        "length": length,
        "kind": kind,
        "encoding": encoding or "utf-8",
        "sizes": sizes,
    }
    request = json.dumps(asked).encode() + b"\n" + b"".join(content for _, content in files)
    # the allocators of Arrow and the arenas of glibc reserve far more than they use, which counts
    # against the limit
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        done = subprocess.run(
            [sys.executable, __file__], input=request, timeout=MAX_SECONDS, env=environment, **pipes
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"The file takes more than {MAX_SECONDS} seconds to read.") from None
    if done.returncode:
        print(
            f"reading a {kind} file ended with code {done.returncode}", file=sys.stderr, flush=True
        )
        raise Refused(
            f"The file is damaged, or takes more than {MAX_MEMORY // 2**20} MB of memory to read."
        )
    head, *rows = (json.loads(line) for line in io.BytesIO(done.stdout))
    if "refused" in head:
        raise Refused(head["refused"])
    return Table(**head, rows=[TextRow(*row) for row in rows])


# ── The subprocess ────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Reply to `read_table`: read the request and the file from standard input, and write lines of
    JSON.
    """
    request = json.loads(sys.stdin.buffer.readline())
    if request["kind"] == "parquet":
        import pyarrow.parquet  # noqa: F401 (before the limit, which counts from here)
    if request["kind"] == "xlsx":
        import openpyxl  # noqa: F401
    limit_memory()
    lines = io.BytesIO()
    try:
        for line in read(sys.stdin.buffer.read(), **request):
            lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            if lines.tell() > MAX_UNPACKED:
                raise Refused(f"Unpacked, the file has more than {MAX_UNPACKED // 2**20} MB.")
        reply = lines.getbuffer()
    except (InputError, Refused) as error:
        message = str(error).replace(*OFFER).replace("--encoding ", "encoding ").removesuffix(".")
        reply = json.dumps({"refused": f"{message}."}).encode()
    sys.stdout.buffer.write(reply)


def limit_memory() -> None:
    """Limit the memory of this process to `MAX_MEMORY` more than it has now, on Linux."""
    try:
        import resource

        size = (
            int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
            + MAX_MEMORY
        )
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):  # not Linux, or a lower limit is set
        pass


def read(content: bytes, column: str | None, length: int, **source: Any) -> Iterator[Any]:
    """Yield the columns and the column of texts, then for each row its line, text and problem.

    Raises:
        Refused, InputError: as for `read_table`.
    """
    rows = open_rows(content, **source)
    column = None if column is None else str(column)  # a client can send any type
    text_column = find_column(rows.columns, column, TEXT_COLUMNS)
    if text_column is None:
        if column is not None:
            raise Refused("The file has no such column.")
        text_column = longest_column(rows)
        unnamed = text_column == "" or (
            text_column is not None and not looks_like_name(text_column)
        )
        if source["kind"] in ("csv", "tsv") and unnamed:
            raise Refused("The file has no column called text or abstract: is the header missing?")
        rows = open_rows(content, **source)
    yield {"columns": list(rows.columns), "column": text_column}
    empty = True
    for row in rows.read([] if text_column is None else [text_column]):
        empty = False
        text = row.values.get(text_column)
        problem = row.problem.replace(*OFFER) if row.problem else problem_of(text, length)
        yield [row.line, None if problem else text, problem]
    if empty:
        raise Refused("The file has no rows.")


def longest_column(rows: RowReader) -> str | None:
    """Return the column with the most characters of text in the first rows, or None without
    columns.
    """
    counts = dict.fromkeys(rows.columns, 0)
    for row in islice(rows.read(), SAMPLE):
        for column, value in row.values.items():
            if isinstance(value, str) and column in counts:
                counts[column] += len(value)
    return max(counts, key=counts.__getitem__, default=None)


def open_rows(content: bytes, kind: str, encoding: str, sizes: list[tuple[str, int]]) -> RowReader:
    stream = io.BytesIO(content)  # of several files, one after another
    several = [(name, partial(stream.read, size)) for name, size in sizes]
    return RowReader(
        several if kind == FOLDER else stream, kind, "The file", LIMITS, encoding=encoding
    )


# ── Downloads ─────────────────────────────────────────────────────────────────────────────────────


def to_csv(records: list[dict[str, Any]]) -> str:
    """Format records as CSV that is safe in spreadsheets: lists are joined, and formulas
    defused.
    """
    stream = io.StringIO()
    # so that a bare \r in a cell is quoted, as RFC 4180 demands
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(records[0] if records else [])  # all have the same names
    writer.writerows(map(defuse, join_lists(record).values()) for record in records)
    return stream.getvalue()


def defuse(value: Any) -> Any:
    """Return the value of a cell in which no spreadsheet finds a formula."""
    return FORMULA.sub(r"\g<0>\\", value) if isinstance(value, str) else value


def to_json_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    main()

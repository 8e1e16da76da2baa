"""Read the rows of CSV and TSV from lines, and find their separator. Quotes are those of RFC 4180."""

import csv
import re
from collections.abc import Iterator

from taxonomy_hierarchical import looks_like_name

SEPARATORS = ",;\t|"
Line = tuple[int, str, str | None]  # number from 1, content with its line end, problem
Fields = tuple[int, list[str], str | None]  # first line of a row, its fields, problem


class RowLines:
    """Iterate over lines for the csv module, and keep what is asked about the lines of the current row.

    Attributes:
        begin, number: numbers of the row's first and last line.
        last: the row's last line.
        problem: the first problem of a line.
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


def find_separators(header: str, usual: str, num_fields: int) -> list[str]:
    """Return the separators that split a header into the most names: the ``usual`` one alone if no other splits it.

    Several separators mean that the header does not tell. By the usual one it has ``num_fields``, which need not be names.
    """
    counts = {separator: _count_names(header, separator) for separator in SEPARATORS if separator != usual}
    most = max(counts.values())
    if most > 1 and most >= num_fields:
        best = [separator for separator in counts if counts[separator] == most]
        return best if num_fields < 2 else [usual, *best]
    return [usual]


def _count_names(header: str, separator: str) -> int:
    try:
        fields = next(csv.reader([header], delimiter=separator, strict=True), [])
    except csv.Error:
        return 0
    splits = len(fields) > 1 and all(looks_like_name(name) and '"' not in name for name in fields)
    return len(fields) if splits else 1


def read_delimited(lines: RowLines, separator: str, width: int = 0) -> Iterator[Fields]:
    """Yield the first line, the fields and the problem of each row. No fields: not parsed.

    Without the ``width`` of a header that was read before, the first row is the header.

    pyarrow.csv is faster, but does not count lines, accepts stray quotation marks, and stops at a cell that is not UTF-8.
    """
    reader = csv.reader(lines, delimiter=separator, strict=True)
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
        if problem and lines.number > lines.begin:
            problem += f" (lines {lines.begin} to {lines.number})"
        yield lines.begin, fields, problem


def refuse_swallowed_rows(rows: Iterator[Fields], lines: RowLines) -> Iterator[Fields]:
    """Give a problem to TSV rows that may be several rows, the first with a stray quotation mark. ``lines`` are at the header.

    Many TSV files are not quoted at all. So unless the header is quoted, a row of several lines is doubtful if all of them have
    the tabs and the line end of the header.
    """
    header = lines.last
    num_tabs, end = header.count("\t"), header[len(header.rstrip("\r\n")) :]
    for begin, fields, problem in rows:
        if not problem and lines.number > begin and '"' not in header:
            content = re.split("(\r\n|\r|\n)", "\t".join(fields))
            counts = {line.count("\t") for line in content[::2] if line.strip(" ")}
            if counts == {num_tabs} and {*content[1::2]} == {end}:
                problem = f"a stray quotation mark swallows the rows below it (lines {begin} to {lines.number})"
                problem += "; if these lines are one row, quote the header too"
        yield begin, fields, problem

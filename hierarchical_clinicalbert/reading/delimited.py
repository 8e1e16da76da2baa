"""Find the separator of CSV and TSV, and read their rows. Quotes are those of RFC 4180."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator

from taxonomy_hierarchical import looks_like_name

SEPARATORS = ",;\t|"
MAX_FIELD = 2**24  # characters: how far a quotation mark that is not closed swallows rows
PROBLEMS = {"unexpected end of data": "a quotation mark is not closed"}  # by the message of the csv module
Fields = tuple[int, list[str], str | None]  # first line of a row, its fields, problem


def find_separator(header: str, usual: str) -> str:
    """Return the separator that splits a header into the most names, the ``usual`` one if no other makes more columns."""
    counts = {usual: len(next(csv.reader([header], delimiter=usual), []))}  # by this one they need not be names
    for separator in SEPARATORS:
        counts.setdefault(separator, _count_names(header, separator))
    return max(counts, key=counts.__getitem__)


def _count_names(header: str, separator: str) -> int:
    try:
        fields = next(csv.reader([header], delimiter=separator, strict=True), [])
    except csv.Error:
        return 0
    splits = len(fields) > 1 and all(looks_like_name(name) and '"' not in name for name in fields)
    return len(fields) if splits else 1


def read_delimited(
    lines: Iterable[str], separator: str, num_before: int, problem_of: Callable[[str], str | None]
) -> Iterator[Fields]:
    """Yield the first line, the fields and the problem of each row. The first row is the header. Blank lines are not rows.

    pyarrow.csv is faster, but does not count lines, accepts stray quotation marks, and stops at a cell that is not UTF-8.

    Args:
        num_before: how many lines are before ``lines``.
        problem_of: returns why a text cannot be decoded, or None.
    """
    csv.field_size_limit(MAX_FIELD)  # of the process
    line, width = "", 0

    def remembered() -> Iterator[str]:
        nonlocal line
        for line in lines:  # noqa: UP028 - the last one is looked at below
            yield line

    reader = csv.reader(remembered(), delimiter=separator, strict=True)
    while True:
        begin, fields = num_before + reader.line_num + 1, list[str]()
        problem: str | None = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_stray = "expected after" in str(error)
            problem = "a quotation mark is stray or not doubled" if is_stray else PROBLEMS.get(str(error), str(error))
        if not problem and len(fields) < 2 and not line.strip():
            continue
        width, end = width or len(fields), num_before + reader.line_num
        problem = problem or problem_of("".join(fields))
        if not problem and len(fields) != width:
            problem = f"{len(fields)} fields, where the header has {width}"
        if problem and end > begin:
            problem += f" (lines {begin} to {end})"
        yield begin, fields, problem


def refuse_swallowed_rows(rows: Iterator[Fields], num_tabs: int) -> Iterator[Fields]:
    """Give a problem to TSV rows that may be several rows, the first with a stray quotation mark.

    Many TSV files are not quoted at all. So a row of several lines is doubtful if all of them have the header's ``num_tabs``.
    """
    for begin, fields, problem in rows:
        lines = re.split("\r\n|\r|\n", "\t".join(fields))
        if not problem and len(lines) > 1 and {line.count("\t") for line in lines if line.strip(" ")} == {num_tabs}:
            problem = f"a stray quotation mark swallows the rows below it (lines {begin} to {begin + len(lines) - 1})"
            problem += "; if these lines are one row, quote the header too"
        yield begin, fields, problem

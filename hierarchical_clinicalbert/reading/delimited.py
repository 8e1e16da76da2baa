"""Find the separator of CSV and TSV, and read their rows. Quotes are those of RFC 4180."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator

SEPARATORS = ",;\t|"
MAX_FIELD = 2**24  # characters: how far a quotation mark that is not closed swallows rows
# by the message of the csv module
PROBLEMS = {"unexpected end of data": "a quotation mark is not closed"}
Fields = tuple[int, list[str], str | None]  # first line of a row, its fields, problem


def find_separator(header: str, usual: str) -> str:
    """Return the usual separator if it splits a header, else the one that makes the most names."""

    def count(separator: str) -> int:
        return len(next(csv.reader([header], delimiter=separator), []))

    return usual if count(usual) > 1 else max((usual, *SEPARATORS), key=count)


def read_delimited(
    lines: Iterable[str],
    separator: str,
    num_before: int,
    problem_of: Callable[[str], str | None],
    may_swallow: bool,
) -> Iterator[Fields]:
    """Yield the first line, the fields and the problem of each row. The first row is the header.
    Empty lines are not rows.

    pyarrow.csv is faster, but does not count lines, accepts stray quotation marks, and stops at a
    cell that is not UTF-8.

    Args:
        num_before: how many lines are before ``lines``.
        problem_of: returns why a text cannot be decoded, or None.
        may_swallow: whether a row of several lines is a problem if each of these lines could be a
        row.
    """
    csv.field_size_limit(MAX_FIELD)  # of the process
    reader = csv.reader(lines, delimiter=separator, strict=True)
    width = 0
    while True:
        begin = num_before + reader.line_num + 1
        fields = list[str]()
        problem: str | None = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_stray = "expected after" in str(error)
            problem = (
                "a quotation mark is stray or not doubled"
                if is_stray
                else PROBLEMS.get(str(error), str(error))
            )
        if not fields and not problem:
            continue
        width = width or len(fields)
        end = num_before + reader.line_num
        problem = problem or problem_of("".join(fields))
        if not problem and len(fields) != width:
            problem = f"{len(fields)} fields, where the header has {width}"
        if problem and end > begin:
            problem += f" (lines {begin} to {end})"
        elif (
            may_swallow
            and end > begin
            and width > 1
            and could_be_rows(separator.join(fields), separator, width)
        ):
            problem = f"a stray quotation mark swallows the rows below it (lines {begin} to {end})"
            problem += "; if these lines are one row, quote the header too"
        yield begin, fields, problem


def could_be_rows(text: str, separator: str, width: int) -> bool:
    """Return whether each line of a row could be a row of ``width`` fields."""
    return all(
        line.count(separator) == width - 1
        for line in re.split("\r\n|\r|\n", text)
        if line.strip(" ")
    )

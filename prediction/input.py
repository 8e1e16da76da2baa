"""Read the input files as records: a text, its id, and the line where it begins."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reading.columns import TEXT_COLUMNS, choose_columns, text_problem
from reading.rows import Rows
from reading.sources import Source, open_rows


@dataclass(frozen=True)
class Record:
    """A row of the input.

    Attributes:
        source: name of the row's file.
        line: where the row begins in the file, see `reading.rows.Row`.
        id: a JSON value, see `json_id`; None without an id column.
        text: None for a row with a problem.
        problem: why the row cannot be classified; None for a readable row.
        done: share of all files read so far; None for standard input.
    """

    source: str
    line: int
    id: Any = None
    text: str | None = None
    problem: str | None = None
    done: float | None = None


def read_records(sources: Sequence[Source], text_column: str | None, id_column: str | None) -> Iterator[Record]:
    """Yield the rows of all sources, in order.

    Args:
        text_column: None to find the column by its name, in each source separately.
        id_column: None for no ids.

    Raises:
        InputError: a source cannot be read, is damaged, or lacks a column.
    """
    sizes = [0 if source.path == "-" else Path(source.path).stat().st_size for source in sources]
    bytes_before, total = 0, sum(sizes)
    for source, size in zip(sources, sizes, strict=True):
        with open_rows(source) as rows:
            columns = _columns(rows, text_column, id_column)
            for row in rows.read(list(dict.fromkeys(columns))):
                text, raw_id = [*map(row.values.get, columns), None, None][:2]
                problem, record_id = row.problem, None
                if problem is None:
                    problem = text_problem(text)
                    try:
                        record_id = json_id(raw_id)
                    except ValueError as error:
                        problem = problem or str(error)
                done = (bytes_before + size * (rows.done() or 0)) / total if total else None
                yield Record(source.name, row.line, record_id, text if problem is None else None, problem, done)
        bytes_before += size


def _columns(rows: Rows, text_column: str | None, id_column: str | None) -> list[str]:
    """Return the text column, then the id column if there is one. JSON Lines without any key has no columns."""
    if not rows.columns:
        return []
    columns = {rows.name: rows.columns}
    id_columns = [] if id_column is None else choose_columns(columns, id_column, (), "--id_column")
    return [*choose_columns(columns, text_column, TEXT_COLUMNS, "--text_column"), *id_columns]


def json_id(value: Any) -> Any:
    """Convert an id to a JSON value: infinite numbers, dates and bytes become strings, NaN becomes None.

    Raises:
        ValueError: the id is a list or an object, or bytes that are not UTF-8. The message is a short phrase.
    """
    if isinstance(value, (dict, list)):
        raise ValueError("the id is neither text nor a number")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError("the id is not UTF-8") from error
    if value is None or value != value:  # NaN
        return None
    return value if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)) else str(value)

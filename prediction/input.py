"""The texts of the input files, one at a time, each with the place where it begins."""

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
        source: the name of its file.
        line: where it begins there, see `reading.rows.Row`.
        id: as JSON has it, see `json_id`. None if no ids were asked for.
        text: None if there is a problem.
        problem: why the row cannot be classified; None if it can.
        done: the share of all files that was read up to here; None for standard input.
    """

    source: str
    line: int
    id: Any = None
    text: str | None = None
    problem: str | None = None
    done: float | None = None


def read_records(sources: Sequence[Source], text_column: str | None, id_column: str | None) -> Iterator[Record]:
    """Yield the rows of all sources, one source after the other.

    Args:
        text_column: by default found by its name, in each source anew.
        id_column: None for no ids.

    Raises:
        InputError: a source cannot be read, is damaged, or lacks a column.
    """
    sizes = [0 if source.path == "-" else Path(source.path).stat().st_size for source in sources]
    before, total = 0, sum(sizes)
    for source, size in zip(sources, sizes, strict=True):
        with open_rows(source) as rows:
            wanted = _columns(rows, text_column, id_column)
            for row in rows.read(list(dict.fromkeys(wanted))):
                text, key = [*map(row.values.get, wanted), None, None][:2]
                problem, identity = row.problem, None
                if problem is None:
                    problem = text_problem(text)
                    try:
                        identity = json_id(key)
                    except ValueError as error:
                        problem = problem or str(error)
                done = (before + size * (rows.done() or 0)) / total if total else None
                yield Record(source.name, row.line, identity, text if problem is None else None, problem, done)
        before += size


def _columns(rows: Rows, text: str | None, key: str | None) -> list[str]:
    """Return the column of texts and, if asked for, that of ids; none for JSON Lines without any names."""
    if not rows.columns:
        return []
    columns = {rows.name: rows.columns}
    keys = [] if key is None else choose_columns(columns, key, (), "--id_column")
    return [*choose_columns(columns, text, TEXT_COLUMNS, "--text_column"), *keys]


def json_id(value: Any) -> Any:
    """Return an id as JSON has it: infinite numbers, dates and bytes become texts, NaN becomes None.

    Raises:
        ValueError: it is a list or an object, or bytes that are not UTF-8. The message is a short phrase.
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

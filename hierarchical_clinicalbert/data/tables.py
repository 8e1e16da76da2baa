"""Read a source into a table, and name the rows that cannot be used."""

from collections.abc import Iterable, Sequence

import pandas as pd

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.reading.sources import Source, open_rows
from taxonomy_hierarchical import quote_name


def read_table(source: Source, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read columns of a file, by default all, with the values as they are in the file.

    For `place`, the index holds the line or row number of each row, and is called, for example,
    "train.csv, line".

    Raises:
        InputError: there are no rows, or a row cannot be read.
    """
    lines = []
    cells = []
    with open_rows(source) as rows:
        names = list(rows.columns if columns is None else columns)
        for row in rows.read(names):
            if row.problem is not None:
                raise InputError(f"{rows.place(row)}: {row.problem}")
            lines.append(row.line)
            cells.append([row.values.get(name) for name in names])
    if not lines:
        raise InputError(f"{source.name} has no rows")
    index = pd.Index(lines, name=f"{rows.name}, {rows.unit}")
    # of type object, values are not converted
    return pd.DataFrame(cells, index, names, dtype=object)


def place(table: pd.DataFrame, row: int, columns: Sequence[str]) -> str:
    """Return the position of a row, counted from 0, for a message."""
    return f"{table.index.name} {table.index[row]}, column {quote_name(' '.join(columns))}"


def refuse_rows(
    table: pd.DataFrame, columns: Sequence[str], problems: Iterable[str | None]
) -> None:
    """Raise InputError if any row has a problem.

    The message names the first row and counts them all.
    """
    bad_rows = [(row, problem) for row, problem in enumerate(problems) if problem is not None]
    if bad_rows:
        others = f"; {len(bad_rows):,} rows cannot be used" if len(bad_rows) > 1 else ""
        row, problem = bad_rows[0]
        raise InputError(f"{place(table, row, columns)}: {problem}{others}")

"""Find the column of texts or labels.

Worth knowing:

1. A name that the caller gives must be a column's name exactly.
2. Else the first candidate decides that a column has as its name, whatever the case and the white space around it.
3. The first row of a file without a header stands where names should. What does not look like a name is not shown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from .rows import InputError, looks_like_name, quote_name

TEXT_COLUMNS = ("medical_abstract", "abstract", "text", "sentence", "content", "document", "body")
LABEL_COLUMNS = ("condition_label", "label", "labels", "category", "class", "condition_name")
LEAST_SHARE = 0.5  # of the rows, that must have a column for it to be found by its name
SAMPLE = 100  # rows by which the column with most characters is found


def find_column(columns: Mapping[str, float], asked: str | None, candidates: Sequence[str]) -> str | None:
    """Return the column that was asked for, or else the first candidate that there is; None if there is none.

    Args:
        columns: as `Rows.columns`.
        candidates: in lower case.
    """
    if asked is not None:
        return asked if asked in columns else None
    usual = [column for column, share in columns.items() if share >= LEAST_SHARE]
    known = {column.strip().casefold(): column for column in reversed(usual)} | {column: column for column in usual}
    return next((known[name] for name in candidates if name in known), None)


def choose_columns(
    sources: Mapping[str, Mapping[str, float]], asked: str | None, candidates: Sequence[str], flag: str
) -> list[str]:
    """Return a column of each source: the one that was asked for, or the first candidate that all of them have.

    Args:
        sources: `Rows.columns`, by the source's name in messages.
        flag: that names the column, for messages.

    Raises:
        InputError: no such column.
    """
    for name, columns in sources.items():
        if not columns:
            raise InputError(f"{name} has no columns")
        if find_column(columns, asked, candidates) is None:
            if asked is not None:
                raise InputError(f"{name} has no column {quote_name(asked)} ({flag}); it has {listed(columns)}")
            raise InputError(
                f"{name}: no column is called {', '.join(candidates)}; give {flag}, one of {listed(columns)}"
            )
    if asked is not None:
        return [asked] * len(sources)
    for candidate in candidates:
        found = [find_column(columns, None, (candidate,)) for columns in sources.values()]
        if None not in found:
            return [column for column in found if column is not None]
    raise InputError(f"{', '.join(sources)} have no column in common for {flag}: rename it in one of them")


def longest_column(columns: Iterable[str], sample: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the column with the most characters of text in the first rows, or None if none has any.

    Args:
        columns: as `Rows.texts`.
        sample: `Row.values`; the first 100 count.
    """
    counts = dict.fromkeys(columns, 0)
    for values in islice(sample, SAMPLE):
        for column in counts:
            value = values.get(column)
            counts[column] += len(value) if isinstance(value, str) else 0
    best = max(counts, key=counts.__getitem__, default="")
    return best if counts.get(best) else None


def text_problem(value: Any) -> str | None:
    """Return why a value is not a text that can be classified, or None if it is one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the text is missing"
    if not isinstance(value, str):
        return f"the text is not a text but {type(value).__name__}"
    return None if value.strip() else "the text is empty"


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return the names of columns for a message: not all of thousands, and none if one of them is a text."""
    names = list(names)
    text = next((name for name in names if not looks_like_name(name)), None)
    if text is not None:
        return f"{len(names):,} columns that are not shown, as one is called {quote_name(text)}: is the header missing?"
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*map(quote_name, names[:most]), *more])

"""Read the input files as records, each with a text, an id and a line number."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hierarchical_clinicalbert.reading.columns import TEXT_COLUMNS, choose_columns, text_problem
from hierarchical_clinicalbert.reading.sources import Source, open_rows

SAMPLED_TEXTS = 10_000  # of an input, to estimate its class frequencies


@dataclass(frozen=True)
class InputRow:
    """A row of the input."""

    source: str  # name of the row's file
    line: int  # where the row begins in the file, see `reading.rows.Row`
    id: Any  # a JSON value, see `json_id`; None without an id column
    text: str | None  # None for a row with a problem
    problem: str | None  # why the row cannot be classified
    done: float | None  # share of all files read so far; None for standard input


def read_records(
    sources: Sequence[Source], text_column: str | None, id_column: str | None
) -> Iterator[InputRow]:
    """Yield a record for each row of all sources, in order. Without a text column, find one by its
    name in each source.

    Raises:
        InputError: a source cannot be read, or lacks a column.
    """
    sizes = [source.size for source in sources]
    bytes_before = 0
    total = sum(sizes)
    for source, size in zip(sources, sizes, strict=True):
        # an empty file among others has no rows
        if not size and source.path != "-" and len(sources) > 1:
            continue
        with open_rows(source) as rows:
            # JSON Lines without any name has no columns
            columns = {rows.name: rows.columns} if rows.columns else {}
            names = choose_columns(columns, text_column, TEXT_COLUMNS, "--text_column")
            if id_column is not None:
                names += choose_columns(columns, id_column, (), "--id_column")
            for row in rows.read(list(dict.fromkeys(names))):
                text, raw_id = [*map(row.values.get, names), None, None][:2]
                problem = row.problem or text_problem(text)
                done = (bytes_before + size * (rows.done() or 0)) / total if total else None
                yield InputRow(
                    source.name, row.line, json_id(raw_id), None if problem else text, problem, done
                )
        bytes_before += size


def sample_texts(records: Iterable[InputRow]) -> list[str]:
    """Draw `SAMPLED_TEXTS` readable texts, or all if there are fewer: the same ones of the same
    input (Vitter, 1985, algorithm R).
    """
    sample = list[str]()
    generator = random.Random(0)
    for number, text in enumerate(record.text for record in records if record.text is not None):
        if number < SAMPLED_TEXTS:
            sample.append(text)
        elif (place := generator.randrange(number + 1)) < SAMPLED_TEXTS:
            sample[place] = text
    return sample


def json_id(value: Any) -> Any:
    """Return an id as a JSON value: what is neither text nor a number, such as a date, becomes
    text.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)

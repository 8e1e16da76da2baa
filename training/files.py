"""Tables from files, for every command that reads texts.

Worth knowing:

1. Nothing is guessed from a value: a CSV cell "NA" or "007" is that text, and an empty cell is an empty text.
2. A ragged row, a column that occurs twice, or another encoding than UTF-8 is an error, not a repaired table.
3. Rows are counted from 0, without the header, in messages. A text is never shown.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from errors import InputError, one_line
from taxonomy_hierarchical import looks_like_name, quote_name

if TYPE_CHECKING:  # predict.py does without
    import pandas as pd

TEXT_COLUMNS = ("medical_abstract", "abstract", "text", "sentence", "content", "document")
TAKEN_IN = (
    "a quotation mark begins a text that takes in the rows below it; where quotation marks are part of texts, quote these "
    "texts and double the marks"
)
FILE_KINDS = ".csv, .tsv, .json, .jsonl, .ndjson or .parquet"


def read_table(path: str | Path) -> pd.DataFrame:
    """The rows of a ``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.ndjson`` or ``.parquet`` file.

    Cells of .csv and .tsv files are text, exactly as written.

    Raises:
        InputError: the file is missing, empty, of another kind, not UTF-8, or its rows differ in their fields.
    """
    path = Path(path)
    readers = {
        ".csv": _read_delimited,
        ".tsv": _read_delimited,
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".parquet": _read_parquet,
    }
    if not path.exists():
        raise InputError(f"cannot read {path}: there is no such file")
    if path.suffix.lower() not in readers or not path.is_file():
        raise InputError(f"cannot read {path}: a data file is {FILE_KINDS}")
    try:
        table = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a Parquet file, or damaged: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply: expected a flat object a row") from error
    if not len(table):
        raise InputError(f"{path} has no rows")
    return table


def _read_delimited(path: Path) -> pd.DataFrame:
    import pandas as pd

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty") from error
    except pd.errors.ParserError as error:
        raise InputError(f"{path}: {str(error).strip().removeprefix('Error tokenizing data. C error: ')}") from error
    header = next(_records(path, separator), None)
    if header is None:  # white space that pandas takes for a name
        raise InputError(f"{path} is empty")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has two columns called {quote_name(twice[0])}")
    if not isinstance(table.index, pd.RangeIndex):  # how pandas reads rows that are longer than the header
        raise InputError(f"{path}, row 0 (counted from 0): more fields than the {len(header)} of the header")
    if separator == "\t":
        for place, name in enumerate(table.columns):
            several = table[name].str.contains("\n", regex=False)
            for row, cell in table.loc[several, name].items():
                if takes_in_rows(cell, place, len(header)):
                    raise InputError(f"{path}, row {row} (counted from 0): {TAKEN_IN}")
    for row, fields in enumerate(_records(path, separator), start=-1):  # pandas fills short rows up
        if len(fields) < len(header):
            raise InputError(
                f"{path}, row {row} (counted from 0): {len(fields)} fields, where the header has {len(header)}"
            )
    return table


def takes_in_rows(cell: str, place: int, fields: int) -> bool:
    """Whether a cell of a TSV file, by its tabs, began with a stray quotation mark and holds the rows below it.

    Args:
        place: of its column, from 0.
        fields: of a row.
    """
    first, *others = (line.count("\t") for line in cell.split("\n"))
    rest = fields - 1 - place  # the fields of its own row that the cell would have taken in first
    return fields > 1 and bool(others) and (first == rest if rest else all(tabs == fields - 1 for tabs in others))


def _records(path: Path, separator: str) -> Iterator[list[str]]:
    """The header and the rows, as they were written, without blank lines.

    Raises:
        InputError: a text goes on after the quotation mark that ends it, as where stray ones take rows in.
    """
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader, line = csv.reader(stream, delimiter=separator, strict=True), 0
            try:
                for fields in reader:
                    if len(fields) > 1 or "".join(fields).strip():
                        yield fields
                    line = reader.line_num
            except csv.Error as error:
                raise InputError(
                    f"{path}, lines {line + 1} to {reader.line_num}: a quotation mark begins or ends a text where none should "
                    "(double those that are part of a text, and quote the text)"
                ) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> pd.DataFrame:
    names = pyarrow.parquet.read_schema(path).names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path} has two columns called {quote_name(twice)}")
    # whole numbers beside missing ones would become floats, which are not exact beyond 2^53
    return pyarrow.parquet.read_table(path).to_pandas(integer_object_nulls=True)


def _read_json(path: Path) -> pd.DataFrame:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # of the syntax, or a number of thousands of digits
        raise InputError(f"{path} is not JSON: {error}") from error
    if isinstance(records, dict):
        records = records.get("data")
    if not isinstance(records, list):
        raise InputError(f'{path}: expected a list of objects, or {{"data": [...]}}')
    return _from_records(records, path)


def _read_json_lines(path: Path) -> pd.DataFrame:
    records = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    records.append(json.loads(line, object_pairs_hook=unique))
                except ValueError as error:  # of the syntax, or a number of thousands of digits
                    reason = getattr(error, "msg", error)
                    raise InputError(f"{path}, line {number}, is not JSON: {reason}") from error
    return _from_records(records, path)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a name occurs twice, as the second value would win unseen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{quote_name(twice)} occurs twice in an object")
    return found


def _from_records(records: list, path: Path) -> pd.DataFrame:
    import pandas as pd

    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{path}, row {row} (counted from 0): expected an object, found {type(record).__name__}")
    return pd.DataFrame(records, dtype=object)  # object: 7 beside a missing value stays 7, not 7.0


def find_column(tables: dict[str, pd.DataFrame], asked: str | None, candidates: Sequence[str], flag: str) -> str:
    """The column that was asked for, or the first of the candidates that every table has.

    Args:
        tables: by the name they have in messages.
        flag: the command-line flag that names the column.

    Raises:
        InputError: no such column.
    """
    for name, table in tables.items():
        wanted = candidates if asked is None else (asked,)
        if not any(column in table.columns for column in wanted):
            columns = listed(table.columns)
            if asked is None:
                raise InputError(f"{name}: no column is called {', '.join(wanted)}; give {flag}, one of {columns}")
            raise InputError(f"{name} has no column {quote_name(asked)} ({flag}); it has {columns}")
    if asked is not None:
        return asked
    common = [column for column in candidates if all(column in table.columns for table in tables.values())]
    if not common:
        raise InputError(f"{', '.join(tables)} have no column in common for {flag}: rename it in one of them")
    return common[0]


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names of columns for a message: not all of thousands, and none where one is a text, since all may be a row then."""
    names = list(map(str, names))
    if (text := next((name for name in names if not looks_like_name(name)), None)) is not None:
        return f"{len(names):,} columns that are not shown, as one is called {quote_name(text)}: is the header missing?"
    shown = [quote_name(name) for name in names[:most]]
    return ", ".join([*shown, f"and {len(names) - most:,} more"] if len(names) > most else shown)


def check_writable(flag: str, path: Path) -> None:
    """Refuses a folder that cannot be made or written to, as far as can be told without making it.

    Raises:
        InputError: it or a folder above it is a file, or may not be written to, or its name is too long.
    """
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error
    if not there.is_dir():
        raise InputError(f"{flag} {path}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: {there} may not be written to")


def read_texts(table: pd.DataFrame, column: str, name: str) -> list[str]:
    """The texts of a column, as they are.

    Args:
        name: what the table is called in messages.

    Raises:
        InputError: missing or empty texts, or values that are not text.
    """
    values = table[column].tolist()
    refuse_rows(table[column].isna(), "missing texts", column, name)
    refuse_rows([not isinstance(value, str) for value in values], "values that are not text", column, name)
    refuse_rows([not value or value.isspace() for value in values], "empty texts", column, name)
    refuse_rows(map(has_half_surrogate, values), "texts with an unpaired surrogate", column, name)
    return values


def has_half_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which JSON can spell: no character, and not to be written as UTF-8."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def refuse_rows(wrong: Iterable[bool], what: str, columns: str, name: str) -> None:
    """Raises InputError, naming the first, where any row is wrong."""
    found = np.flatnonzero(np.asarray(list(wrong)))
    if len(found):
        first = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
        raise InputError(f"{name}, column {quote_name(columns)}: {len(found)} {what}, at row {first} (counted from 0)")


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """Fingerprints of files, by name."""
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found

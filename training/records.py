"""Texts of files of any size, one at a time, each with the place where it stands.

Worth knowing:

1. A row that cannot be read is a record with a problem, not an end: those before and after it are read.
2. Memory holds a record, or of a Parquet file or of JSON Lines 1,024 rows, whatever the size of the files.
3. ``.gz`` files are unpacked as they are read; ``-`` is standard input; a pattern such as ``part-*.csv`` stands for its files
   in sorted order.
"""

import csv
import glob
import gzip
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from configuration_hierarchical import quote_name
from training import InputError, one_line
from training.files import TAKEN_IN, TEXT_COLUMNS, has_half_surrogate, listed, takes_in_rows, unique

KINDS = ("csv", "tsv", "jsonl", "ndjson", "parquet")
LONGEST_FIELD = 2**24  # characters
PARQUET_ROWS = 1024
FIRST_OBJECTS = 1024  # of JSON Lines, whose names are the columns


@dataclass(frozen=True)
class Record:
    """A row of the input.

    Attributes:
        source: the file that it is from.
        line: where it ends there, from 1; in a Parquet file its row, from 1.
        id: the value of the column of ids as JSON knows it: infinite numbers, dates and bytes are text, NaN is None. None too
            where no ids were asked for.
        text: None where there is a problem.
        problem: why it cannot be read.
        done: the share of the bytes of all files up to here; None for standard input.
    """

    source: str
    line: int
    id: Any = None
    text: str | None = None
    problem: str | None = None
    done: float | None = None


def find_inputs(pattern: str, kind: str | None) -> list[tuple[str, str]]:
    """The files that an ``--input`` stands for, and the kind of each.

    Args:
        kind: one of `KINDS`; by default what a file's suffix says.

    Raises:
        InputError: no such file, or one whose kind is not told by its name.
    """
    if pattern == "-":
        if kind is None:
            raise InputError("--input - needs --input_format, one of " + ", ".join(KINDS))
        if kind == "parquet":
            raise InputError("a Parquet file is read from its end: it cannot come by --input -")
        return [("-", kind)]
    paths = (
        [pattern] if Path(pattern).is_file() else sorted(path for path in glob.glob(pattern) if Path(path).is_file())
    )
    if not paths and Path(pattern).is_dir():
        raise InputError(f"--input {pattern} is a folder: give a pattern such as '{pattern}/*.csv'")
    if not paths:
        raise InputError(f"--input {pattern}: there is no such file")
    return [(path, kind or kind_of(path)) for path in paths]


def kind_of(path: str) -> str:
    suffix = Path(path.removesuffix(".gz")).suffix.lower().removeprefix(".")
    if suffix not in KINDS:
        known = ", ".join(f".{kind}" for kind in KINDS)
        raise InputError(f"--input {path}: its name does not tell its kind, one of {known}; give --input_format")
    if suffix == "parquet" and path.endswith(".gz"):
        raise InputError(f"--input {path}: unpack it; a Parquet file is read from its end")
    return suffix


def read_records(inputs: Sequence[tuple[str, str]], text_column: str | None, id_column: str | None) -> Iterator[Record]:
    """The rows of all inputs, one after the other.

    Args:
        inputs: as from `find_inputs`.
        text_column: by default the first of `TEXT_COLUMNS` that a file has.
        id_column: None for no ids.

    Raises:
        InputError: a file cannot be opened or is broken off, or lacks the columns.
    """
    sizes = [0 if path == "-" else Path(path).stat().st_size for path, _ in inputs]
    total = sum(sizes)
    before = 0
    for (path, kind), size in zip(inputs, sizes, strict=True):
        name = "standard input" if path == "-" else path
        columns = (text_column, id_column)
        try:
            read = _read_parquet(path, size, *columns) if kind == "parquet" else _read_text(path, kind, *columns)
            for record, position in read:
                done = (before + position) / total if total else None
                yield Record(name, *record, done=done)
        except (EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{name} is damaged or was not copied to its end: {error}") from error
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror or one_line(error)}") from error
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{name} is not a Parquet file, or damaged: {str(error).splitlines()[0]}") from error
        before += size


def _choose(source: str, names: Sequence[str], text: str | None, id: str | None) -> tuple[str, str | None]:
    """The columns of texts and of ids, once it is known which columns there are."""
    shown = listed(names)
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{source} has two columns called {quote_name(twice)}")
    if text is None:
        text = next((name for name in TEXT_COLUMNS if name in names), None)
        if text is None:
            known = ", ".join(TEXT_COLUMNS)
            raise InputError(f"{source}: no column is called {known}; give --text_column, one of {shown}")
    for flag, name in (("--text_column", text), ("--id_column", id)):
        if name is not None and name not in names:
            raise InputError(f"{source} has no column {quote_name(name)} ({flag}); it has {shown}")
    return text, id


# (line, id, text, problem) of a record
_Row = tuple[int, Any, str | None, str | None]


def _plain(key: Any) -> Any:
    """An id as JSON knows it. Bytes that are not UTF-8 become half surrogates."""
    if isinstance(key, bytes):
        return key.decode("utf-8", "surrogateescape")
    if key is None or key != key:  # NaN
        return None
    return key if isinstance(key, (str, int)) or (isinstance(key, float) and math.isfinite(key)) else str(key)


def _checked(line: int, key: Any, text: Any) -> _Row:
    if isinstance(key, (dict, list)):
        return line, None, None, "the id is neither text nor a number"
    key, problem = _plain(key), None
    if text is None:
        problem = "the text is missing"
    elif not isinstance(text, str):
        problem = f"the text is no text but {type(text).__name__}"
    elif not text.strip():
        problem = "the text is empty"
    elif has_half_surrogate(text):
        problem = "the text is not UTF-8"
    if isinstance(key, str) and has_half_surrogate(key):
        key, problem = None, problem or "the id is not UTF-8"
    return line, key, text if problem is None else None, problem


def _read_text(path: str, kind: str, text_column: str | None, id_column: str | None) -> Iterator[tuple[_Row, int]]:
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        # bytes that are not UTF-8 become half surrogates, which `_checked` finds
        stream = io.TextIOWrapper(unpacked, encoding="utf-8-sig", errors="surrogateescape", newline="")
        source = "standard input" if path == "-" else path
        if kind in ("csv", "tsv"):
            rows = _delimited(stream, source, "\t" if kind == "tsv" else ",", text_column, id_column)
        else:
            rows = _json_lines(stream, source, text_column, id_column)
        for row in rows:
            yield row, 0 if path == "-" else raw.tell()


def _delimited(
    stream: io.TextIOBase, source: str, separator: str, text_column: str | None, id_column: str | None
) -> Iterator[_Row]:
    before = csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(stream, delimiter=separator, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise InputError(f"{source} is empty")
        if any("\0" in name or has_half_surrogate(name) for name in header):
            raise InputError(f"{source} is not UTF-8 text: save it as UTF-8")
        text_column, id_column = _choose(source, header, text_column, id_column)
        text = header.index(text_column)
        key = None if id_column is None else header.index(id_column)
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                several = f", from line {first}" if reader.line_num > first else ""
                yield reader.line_num, None, None, f"not {'TSV' if separator != ',' else 'CSV'}: {error}{several}"
                continue
            if not fields:
                continue  # a blank line
            cells = enumerate(fields) if separator == "\t" else ()
            if any(takes_in_rows(cell, place, len(header)) for place, cell in cells):
                yield reader.line_num, None, None, TAKEN_IN
                continue
            if len(fields) != len(header):
                yield reader.line_num, None, None, f"{len(fields)} fields, where the header has {len(header)}"
                continue
            yield _checked(reader.line_num, None if key is None else fields[key], fields[text])
    except csv.Error as error:
        raise InputError(f"{source}: the header is not readable: {error}") from error
    finally:
        csv.field_size_limit(before)


def _json_lines(stream: io.TextIOBase, source: str, text_column: str | None, id_column: str | None) -> Iterator[_Row]:
    # one object alone may lack what others have, since many writers leave nulls out, or have what the others have not
    objects, first, num_objects = _json_objects(stream), [], 0
    counts: Counter[str] = Counter()
    for one in objects:
        first.append(one)
        if one[1] is not None:
            num_objects += 1
            counts.update(list(one[1]))
        if len(first) >= FIRST_OBJECTS and num_objects:
            break
    if counts:
        if text_column is None:
            text_column = next((name for name in TEXT_COLUMNS if 2 * counts[name] >= num_objects), None)
        text_column, id_column = _choose(source, list(counts), text_column, id_column)
    for number, found, problem in chain(first, objects):
        if found is None:
            yield number, None, None, problem
            continue
        key = None if id_column is None else found.get(id_column)
        yield _checked(number, key, found.get(text_column))


def _json_objects(stream: io.TextIOBase) -> Iterator[tuple[int, dict | None, str | None]]:
    """Numbers of lines, their objects, and what is wrong where a line is none."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:  # of the syntax, a number of thousands of digits, or the depth
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
            yield number, None, f"not JSON: {reason}"
            continue
        if isinstance(found, dict):
            yield number, found, None
        else:
            yield number, None, f"not an object but {type(found).__name__}"


def _read_parquet(path: str, size: int, text_column: str | None, id_column: str | None) -> Iterator[tuple[_Row, int]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        text_column, id_column = _choose(path, file.schema_arrow.names, text_column, id_column)
        wanted = [text_column] if id_column in (None, text_column) else [text_column, id_column]
        row, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
            texts = batch.column(text_column).to_pylist()
            try:
                keys = [None] * len(texts) if id_column is None else batch.column(id_column).to_pylist()
            except (KeyError, OverflowError, ValueError) as error:
                why = "holds what cannot be read, such as a time beyond the year 9999"
                raise InputError(f"{path}: the column {id_column!r} {why}: give another --id_column") from error
            for key, text in zip(keys, texts, strict=True):
                row += 1
                yield _checked(row, key, text), size * row // total

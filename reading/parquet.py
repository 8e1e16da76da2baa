"""Read Parquet: only the requested columns, a few rows at a time, with the Python values that pyarrow converts to."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from pyarrow import types

from .rows import Fault, InputError, Raw, Row, Rows, quote_name

# raised for a damaged file, or one that is not Parquet
FOREIGN = (pyarrow.ArrowException, UnicodeDecodeError, OSError)
# raised for a value that has no Python equivalent
UNREADABLE = (pyarrow.ArrowException, KeyError, OSError, OverflowError, ValueError)
BATCH = 16  # rows; a value that is stored once is decoded for every row, so small batches bound the memory


def open_file(rows: Rows, stream: Any) -> Callable[[list[str]], Iterator[Row]]:
    """Set the columns of ``rows``, and return a function from requested columns to an iterator of rows."""
    raw = Raw(stream)
    if not raw.seekable():
        raise InputError(f"{rows.name}: a Parquet file is read from its end, so save it to a disk first")
    file = pyarrow.parquet.ParquetFile(io.BufferedReader(raw), pre_buffer=False)
    rows.check("rows", file.metadata.num_rows)
    rows.set_columns(file.schema_arrow.names)
    rows.texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
    return lambda requested: _read(rows, file, requested)


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _read(rows: Rows, file: pyarrow.parquet.ParquetFile, requested: list[str]) -> Iterator[Row]:
    count, size, total = 0, 0, max(file.metadata.num_rows, 1)
    rows.done = lambda: count / total
    for batch in file.iter_batches(BATCH, columns=requested, use_threads=False):
        arrays = [batch.column(name) for name in requested]
        arrays = [array.dictionary_decode() if types.is_dictionary(array.type) else array for array in arrays]
        size += sum(array.nbytes for array in arrays)
        rows.check("bytes", size)
        for cells in zip(*map(_values, arrays), strict=True):
            count += 1
            values = dict(zip(requested, cells, strict=True))
            problems = (f"the column {quote_name(n)} holds {v}" for n, v in values.items() if isinstance(v, Fault))
            problem = next(problems, None)
            yield Row(count, {} if problem else values, problem)


def _values(array: pyarrow.Array) -> list[Any]:
    try:
        return array.to_pylist()
    except UNREADABLE:
        return [_value(scalar) for scalar in array]


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UNREADABLE as error:
        utf8 = isinstance(error, UnicodeDecodeError)
        return Fault("text that is not UTF-8" if utf8 else "what cannot be read, such as a time beyond the year 9999")

"""Read Parquet: only the requested columns, a few rows at a time, with the Python values that pyarrow converts to."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from pyarrow import types

from hierarchical_clinicalbert.reading.rows import Fault, InputError, Raw, Row, Rows, quote_name

FOREIGN = (pyarrow.ArrowException, UnicodeDecodeError, OSError)  # for a damaged file, or one that is not Parquet
UNREADABLE = (pyarrow.ArrowException, KeyError, OSError, OverflowError, ValueError)  # for values Python cannot hold
BYTES_AT_ONCE = 2**23  # of a column; without it, pyarrow reads the column's part of a whole row group
ROWS_PER_BATCH = 16  # a value that is stored once is decoded for every row, so small batches bound the memory


def open_file(rows: Rows, stream: Any) -> Callable[[list[str]], Iterator[Row]]:
    """Set the columns of ``rows``, and return a function from requested columns to an iterator of rows."""
    raw = Raw(stream)
    if not raw.seekable():
        raise InputError(f"{rows.name}: a Parquet file is read from its end, so save it to a disk first")
    file = pyarrow.parquet.ParquetFile(io.BufferedReader(raw), pre_buffer=False, buffer_size=BYTES_AT_ONCE)
    rows.set_columns(file.schema_arrow.names)
    return lambda requested: _read(rows, file, requested)


def _read(rows: Rows, file: pyarrow.parquet.ParquetFile, requested: list[str]) -> Iterator[Row]:
    count, size, total = 0, 0, max(file.metadata.num_rows, 1)
    rows.done = lambda: count / total
    for batch in file.iter_batches(ROWS_PER_BATCH, columns=requested, use_threads=False):
        arrays = [batch.column(name) for name in requested]
        arrays = [array.dictionary_decode() if types.is_dictionary(array.type) else array for array in arrays]
        size += sum(array.nbytes for array in arrays)
        rows.check("bytes", size)
        for cells in zip(*map(_values, arrays), strict=True):
            count += 1
            values = dict(zip(requested, cells, strict=True))
            fault = next((name for name, value in values.items() if isinstance(value, Fault)), None)
            if fault is None:
                yield Row(count, values)
            else:
                yield Row(count, {}, f"the column {quote_name(fault)} holds {values[fault]}")


def _values(array: pyarrow.Array) -> list[Any]:
    try:
        return array.to_pylist()
    except UNREADABLE:
        return list(map(_value, array))


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Fault("text that is not UTF-8")
    except UNREADABLE:
        return Fault("a value that cannot be read, such as a time beyond the year 9999")

"""Read the rows of an .xlsx workbook, a zip archive of XML files, by openpyxl in read-only mode."""

import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

MOST_ROWS = 2**20  # of a sheet, in Excel


def read_workbook(
    file: Any, check: Callable[[str, int], None]
) -> tuple[list[str], Iterator[tuple[int, list[Any]]]]:
    """Return the names of the visible sheets, and an iterator over the rows of the first one that
    are not empty.

    A row is its number and its values, up to its last cell. A formula has the value that the
    spreadsheet stored.

    Args:
        file: a binary file that can seek.
        check: called with "unpacked_bytes" and their number before anything is parsed, and with
        "cells" and their number
            while rows are read, gaps included. It raises an error for too large a number.
    """
    import openpyxl  # lazily, because it is slow to import

    # the sizes may be wrong, but zipfile unpacks no more than they say
    with zipfile.ZipFile(file) as archive:
        check("unpacked_bytes", sum(part.file_size for part in archive.infolist()))
    # of formats and extensions that it does not know
    warnings.filterwarnings("ignore", module="openpyxl")
    sheets = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets
    visible = [sheet for sheet in sheets if sheet.sheet_state == "visible"] or sheets
    visible[0].reset_dimensions()  # many programs store wrong ones
    return [sheet.title for sheet in visible], _filled_rows(
        visible[0].iter_rows(values_only=True), check
    )


def _filled_rows(
    rows: Iterator[tuple], check: Callable[[str, int], None]
) -> Iterator[tuple[int, list[Any]]]:
    cells = 0
    for number, row in enumerate(rows, start=1):
        if number > MOST_ROWS:
            raise ValueError("more rows than a sheet can have")
        cells += len(row)
        check("cells", cells)
        # a carriage return is escaped in these files
        values = [
            value.replace("_x000D_", "\r") if isinstance(value, str) else value for value in row
        ]
        if any(value not in (None, "") for value in values):
            yield number, values

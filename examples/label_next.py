"""Print the rows that the model is least certain about, as CSV, the least certain first:

    python examples/label_next.py predictions.jsonl --count 200 --input texts.csv > next.csv

The first argument is an output of ``predict.py --uncertainty``: a file or a folder. With
``--input``, the input of that run, each row comes with its text. Files are read as streams, so
memory holds no more than the printed rows.
"""

import argparse
import csv
import glob
import heapq
import io
import sys
from collections.abc import Collection, Iterator
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hierarchical_clinicalbert.errors import ArgumentParser, InputError, print_result
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.rows import KINDS
from hierarchical_clinicalbert.reading.sources import (
    Source,
    find_all_sources,
    find_sources,
    open_rows,
)


def main() -> str:
    """Return the rows as CSV."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--input", nargs="+", action="extend", default=[], help="as for predict.py")
    parser.add_argument("--input_format", choices=KINDS, help="as for predict.py")
    parser.add_argument("--encoding", help="as for predict.py")
    parser.add_argument("--text_column", help="as for predict.py")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise InputError(f"--count must be at least 1, not {arguments.count}")
    predictions = arguments.predictions.removesuffix("/")
    is_folder = predictions != arguments.predictions or Path(predictions).is_dir()
    outputs = find_sources(f"{glob.escape(predictions)}/part-*" if is_folder else predictions)
    inputs = find_all_sources(arguments.input, arguments.input_format, arguments.encoding)
    # in ties, the first
    rows = dict(heapq.nlargest(arguments.count, uncertainties(outputs), key=itemgetter(1)))
    texts = (
        texts_of(inputs, arguments.text_column, rows, sum(1 for _ in uncertainties(outputs)))
        if inputs
        else {}
    )
    # texts are always quoted: they may hold a lone carriage return
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["row", "uncertainty", "text"] if inputs else ["row", "uncertainty"])
    writer.writerows(
        [row, uncertainty, *([texts[row]] if inputs else [])] for row, uncertainty in rows.items()
    )
    return table.getvalue()


def uncertainties(outputs: list[Source]) -> Iterator[tuple[int, float]]:
    """Yield the number and the uncertainty of each row."""
    for source in outputs:
        with open_rows(source) as rows:
            if missing := {"row", "uncertainty"}.difference(rows.columns):
                raise InputError(
                    f"{source.name} has no column {min(missing)}: predict with "
                    "--uncertainty, without --id_column, "
                    "to .jsonl, .csv or .parquet"
                )
            for row in rows.read(["row", "uncertainty"]):
                if row.problem or row.values.get("uncertainty") in (None, ""):
                    raise InputError(f"{rows.place(row)}: {row.problem or 'it has no uncertainty'}")
                try:
                    pair = int(row.values["row"]), float(row.values["uncertainty"])
                except (TypeError, ValueError) as error:
                    raise InputError(
                        f"{rows.place(row)}: row and uncertainty must be numbers"
                    ) from error
                yield pair


def texts_of(
    inputs: list[Source], text_column: str | None, rows: Collection[int], num_predicted: int
) -> dict[int, str | None]:
    """Return the texts of these rows, by number.

    Raise InputError unless each prediction has one readable row of the input.
    """
    texts = {}
    readable = 0
    for number, record in enumerate(read_records(inputs, text_column, None)):
        readable += record.problem is None
        if number in rows:
            texts[number] = record.text
    if readable != num_predicted or any(texts.get(row) is None for row in rows):
        counts = f"{readable:,} rows with a text, and there are {num_predicted:,} predictions"
        raise InputError(f"--input has {counts}: give the input of these predictions")
    return texts


if __name__ == "__main__":
    print_result("label_next.py", main)

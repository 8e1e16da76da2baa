"""The output's columns, and writers for JSON Lines, CSV and Parquet."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet

from prediction.input import Record

OUTPUTS = (".jsonl", ".csv", ".parquet")
DIGITS = 6
SEPARATORS = {"path": " > ", "answer": " | ", "labels": "; ", "scores": "; "}  # in the cells of a CSV file


class RowFormat:
    """The columns of an output.

    Args:
        by_id: whether a row holds its record's id in place of its number.
        answers: whether rows hold an answer for ``--coverage`` or ``--recall``.
        costs: whether the predictions are those of least expected cost.
        classes: labels of the leaves or nodes whose probabilities are written.
    """

    def __init__(self, by_id: bool, multi_label: bool, answers: bool, costs: bool, classes: list[str]):
        self.classes = classes
        text, number = pyarrow.string(), pyarrow.float64()
        texts, numbers = pyarrow.list_(text), pyarrow.list_(number)
        # a Parquet column has one type, so ids are strings
        self.types = {"id": text} if by_id else {"row": pyarrow.int64()}
        self.types |= (
            {"labels": texts, "scores": numbers} if multi_label else {"label": text, "score": number, "path": texts}
        )
        if costs and not multi_label:
            self.types["expected_cost"] = number
        self.types["truncated"] = pyarrow.bool_()
        if answers:
            self.types["answer"] = texts
        if classes:
            self.types["probabilities"] = pyarrow.struct([(label, number) for label in classes])

    def row(self, number: int, record: Record, prediction: dict[str, Any]) -> dict[str, Any]:
        """Build the row of a record from the pipeline's prediction."""
        row = {"id": record.id, "row": number, "truncated": prediction["truncated"]}
        row["answer"] = [node["label"] for node in prediction.get("answer", [])]
        if "labels" in self.types:
            row["labels"] = [node["label"] for node in prediction["labels"]]
            row["scores"] = [round(node["score"], DIGITS) for node in prediction["labels"]]
        else:
            row["label"], row["score"] = prediction["label"], round(prediction["score"], DIGITS)
            row["path"] = [node["label"] for node in prediction["path"]]
            row["expected_cost"] = round(prediction.get("expected_cost", 0.0), DIGITS)
        if self.classes:
            nodes = {label: probability for level in prediction["levels"] for label, probability in level.items()}
            row["probabilities"] = {label: round(nodes[label], DIGITS) for label in self.classes}
        return {name: row[name] for name in self.types}

    @contextmanager
    def open(self, file: Path) -> Iterator[Callable[[list[str]], None]]:
        """Open a new file, and yield a function that writes rows, given as lines of JSON."""
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetWriter(file, pyarrow.schema(self.types)) as writer:
                yield lambda lines: writer.write_table(self.table(lines))
            return
        with file.open("w", encoding="utf-8", newline="") as stream:
            if file.suffix == ".jsonl":
                yield stream.writelines
                return
            # Python 3.11 quotes a lone carriage return only if the writer's line end has one
            lines = SimpleNamespace(write=lambda line: stream.write(line.removesuffix("\r\n") + "\n"))
            writer = csv.writer(lines, lineterminator="\r\n")
            names = [name for name in self.types if name != "probabilities"]
            writer.writerow([*names, *(f"probability of {label}" for label in self.classes)])
            yield lambda lines: writer.writerows(self.cells(json.loads(line)) for line in lines)

    def cells(self, row: dict[str, Any]) -> list[Any]:
        """Return the CSV cells: lists as text, each probability in its own column."""
        probabilities = row.pop("probabilities", {})
        joined = {name: SEPARATORS[name].join(map(str, row[name])) for name in SEPARATORS if name in row}
        return [*(row | joined).values(), *probabilities.values()]

    def table(self, lines: list[str]) -> pyarrow.Table:
        rows = [json.loads(line) for line in lines]
        for row in rows:
            if row.get("id") is not None:
                row["id"] = str(row["id"])
        return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(self.types))

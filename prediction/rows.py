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


class RowFormat:
    """The columns of an output.

    Args:
        by_id: whether a row holds its record's id in place of its number.
        answers: whether rows hold an answer for ``--coverage``.
        leaves: labels of the leaves whose probabilities are written.
    """

    def __init__(self, by_id: bool, answers: bool, leaves: list[str]):
        self.leaves = leaves
        text, texts, number = pyarrow.string(), pyarrow.list_(pyarrow.string()), pyarrow.float64()
        # a Parquet column has one type, so ids are strings
        self.types = {"id": text} if by_id else {"row": pyarrow.int64()}
        self.types |= {"label": text, "score": number, "path": texts, "truncated": pyarrow.bool_()}
        if answers:
            self.types["answer"] = texts
        if leaves:
            self.types["probabilities"] = pyarrow.struct([(leaf, number) for leaf in leaves])

    def row(self, number: int, record: Record, prediction: dict[str, Any]) -> dict[str, Any]:
        """Build the row of a record from the pipeline's prediction."""
        row = {
            "id": record.id,
            "row": number,
            "label": prediction["label"],
            "score": round(prediction["score"], DIGITS),
            "path": [node["label"] for node in prediction["path"]],
            "truncated": prediction["truncated"],
            "answer": [node["label"] for node in prediction.get("answer", [])],
        }
        if self.leaves:
            nodes = {label: probability for level in prediction["levels"] for label, probability in level.items()}
            row["probabilities"] = {label: round(nodes[label], DIGITS) for label in self.leaves}
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
            writer.writerow([*names, *(f"probability of {leaf}" for leaf in self.leaves)])
            yield lambda lines: writer.writerows(self.cells(json.loads(line)) for line in lines)

    def cells(self, row: dict[str, Any]) -> list[Any]:
        """Return the CSV cells: paths and answers as text, each probability in its own column."""
        probabilities = row.pop("probabilities", {})
        joined = {"path": " > ".join(row["path"]), "answer": " | ".join(row.get("answer", []))}
        return [*((row | joined)[name] for name in row), *probabilities.values()]

    def table(self, lines: list[str]) -> pyarrow.Table:
        rows = [json.loads(line) for line in lines]
        for row in rows:
            if row.get("id") is not None:
                row["id"] = str(row["id"])
        return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(self.types))

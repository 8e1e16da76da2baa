"""The output's columns, and writers for JSON Lines, CSV and Parquet."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from prediction.input import Record

OUTPUTS = (".jsonl", ".csv", ".parquet")
DIGITS = 6


@dataclass(frozen=True)
class RowFormat:
    """The columns and the file format of an output.

    Attributes:
        suffix: one of `OUTPUTS`.
        by_id: whether a row holds its record's id in place of its number.
        answers: whether rows hold an answer for ``--coverage``.
        leaves: labels of the leaves whose probabilities are written.
    """

    suffix: str
    by_id: bool
    answers: bool
    leaves: list[str]

    def row(self, number: int, record: Record, prediction: dict[str, Any]) -> dict[str, Any]:
        """Build the row of a record from the pipeline's prediction."""
        row: dict[str, Any] = {"id": record.id} if self.by_id else {"row": number}
        row |= {
            "label": prediction["label"],
            "score": round(prediction["score"], DIGITS),
            "path": [node["label"] for node in prediction["path"]],
            "truncated": prediction["truncated"],
        }
        if self.answers:
            row["answer"] = [node["label"] for node in prediction["answer"]]
        if self.leaves:
            nodes = {label: probability for level in prediction["levels"] for label, probability in level.items()}
            row["probabilities"] = {label: round(nodes[label], DIGITS) for label in self.leaves}
        return row

    @contextmanager
    def open(self, file: Path) -> Iterator[Callable[[list[str]], None]]:
        """Open a new file, and yield a function that writes rows, given as lines of JSON."""
        if self.suffix == ".parquet":
            schema = self.schema()
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                yield lambda lines: writer.write_table(pyarrow.Table.from_pylist(self.typed(lines), schema=schema))
            return
        with file.open("w", encoding="utf-8", newline="") as stream:
            if self.suffix == ".jsonl":
                yield stream.writelines
                return
            plain = csv.writer(stream, lineterminator="\n")
            quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)

            def write(rows: Iterable[list[Any]]) -> None:
                for row in rows:
                    # Python 3.11 leaves a lone carriage return unquoted, which readers take for the end of the row
                    has_return = any("\r" in cell for cell in row if isinstance(cell, str))
                    (quoted if has_return else plain).writerow(row)

            write([[*self.names(), *(f"probability of {leaf}" for leaf in self.leaves)]])
            yield lambda lines: write(self.cells(json.loads(line)) for line in lines)

    def names(self) -> list[str]:
        return ["id" if self.by_id else "row", "label", "score", "path", "truncated", *["answer"][: self.answers]]

    def cells(self, row: dict[str, Any]) -> list[Any]:
        """Return the CSV cells: paths and answers as text, each probability in its own column."""
        flat = {**row, "path": " > ".join(row["path"]), "answer": " | ".join(row.get("answer", []))}
        return [*(flat[name] for name in self.names()), *row.get("probabilities", {}).values()]

    def schema(self) -> pyarrow.Schema:
        names = pyarrow.list_(pyarrow.string())
        types = {"row": pyarrow.int64(), "id": pyarrow.string(), "label": pyarrow.string(), "score": pyarrow.float64()}
        types |= {"path": names, "answer": names, "truncated": pyarrow.bool_()}
        fields = [(name, types[name]) for name in self.names()]
        if self.leaves:
            fields.append(("probabilities", pyarrow.struct([(leaf, pyarrow.float64()) for leaf in self.leaves])))
        return pyarrow.schema(fields)

    def typed(self, lines: list[str]) -> list[dict[str, Any]]:
        """Parse rows, and convert their ids to strings, since a Parquet column has one type."""
        rows = [json.loads(line) for line in lines]
        return [row | {"id": str(row["id"])} if row.get("id") is not None else row for row in rows]

"""Build output rows from predictions, and write them as JSON Lines, CSV, Parquet or tasks of Label
Studio.

A task is a JSON object that holds the row, its text, and the prediction as a pre-annotation:
https://labelstud.io/guide/predictions. The other formats do not contain texts.
"""

import csv
import json
from argparse import Namespace
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.prediction.input import InputRow
from hierarchical_clinicalbert.prediction.summary import Summary
from hierarchical_clinicalbert.reading.columns import text_hash
from hierarchical_clinicalbert.reading.results import (
    PROBABILITIES,
    PROBABILITY_OF,
    TEXT_HASH,
    join_lists,
    rounded,
    to_row,
)
from hierarchical_clinicalbert.reading.stores import is_url

TASKS = ".tasks.json"
OUTPUTS = (".jsonl", ".csv", ".parquet", TASKS)
# of a Parquet file; one group per block would make the footer as large as the rows
ROW_GROUP_BYTES = 2**26


class RowFormat:
    """Build the rows of an output, and write them to files.

    Args:
        arguments: the flags of predict.py.
        model: the checkpoint's.
        version: the model's version, for tasks; None for other formats.
    """

    def __init__(self, arguments: Namespace, model: Any, version: str | None):
        config = model.config
        open_world = model.heads.open_world
        self.version = version
        self.labels = config.tree.labels
        self.summary = Summary(self.labels, open_world)
        self.classes = [*config.id2label.values()] if arguments.probabilities else []
        self.decisions = (
            build_decisions(config.tree, config.problem_type) if arguments.uncertainty else None
        )
        text = pyarrow.string()
        number = pyarrow.float64()
        count = pyarrow.int64()
        texts = pyarrow.list_(text)
        numbers = pyarrow.list_(number)
        # a Parquet column has one type, so ids are strings
        self.types = {"row": count} if arguments.id_column is None else {"id": text}
        self.types |= {"label": text, "score": number, "path": texts}
        self.types |= {"labels": texts, "scores": numbers, "paths": pyarrow.list_(texts)}
        if config.tree.descriptions:
            self.types["descriptions"] = texts
        if open_world is not None and open_world.has_references:
            self.types["p_value"] = number
        if (arguments.coverage, arguments.recall) != (None, None):
            self.types["prediction_set"] = texts
        if arguments.uncertainty:
            self.types |= {"uncertainty": number, "unsure_level": count}
        self.types |= {"tokens": count, "tokens_read": count, "truncated": pyarrow.bool_()}
        if self.classes:
            probabilities = pyarrow.struct([(label, number) for label in self.classes])
            self.types |= {TEXT_HASH: text, PROBABILITIES: probabilities}

    def row(self, number: int, record: InputRow, prediction: dict[str, Any]) -> dict[str, Any]:
        """Build the row, or the task, of a record from the pipeline's prediction."""
        row = {"id": record.id, "row": number, "descriptions": [], **to_row(prediction)}
        nodes = {
            label: score for level in prediction.get("levels", []) for label, score in level.items()
        }
        if self.classes:
            row[TEXT_HASH] = text_hash(record.text or "")
            row[PROBABILITIES] = rounded({label: nodes[label] for label in self.classes})
        if self.decisions is not None:
            probabilities = torch.tensor(
                [[nodes[label] for label in self.labels]], dtype=torch.float64
            )
            (entropies,) = self.decisions.entropies(probabilities).tolist()
            row |= {
                "uncertainty": rounded(sum(entropies)),
                "unsure_level": 1 + entropies.index(max(entropies)),
            }
        row = {name: row[name] for name in self.types}
        return row if self.version is None else self.task(row, record.text)

    def task(self, row: dict[str, Any], text: str | None) -> dict[str, Any]:
        """Build a task with the predicted paths.

        Its score is the lowest probability of a predicted node.
        """
        choice = {
            "from_name": "taxonomy",
            "to_name": "text",
            "type": "taxonomy",
            "value": {"taxonomy": row["paths"]},
        }
        annotation: dict[str, Any] = {
            "model_version": self.version,
            "result": [choice] if row["paths"] else [],
        }
        if row["scores"]:
            annotation["score"] = min(row["scores"])
        return {"data": {"text": text, **row}, "predictions": [annotation]}

    def write(self, file: Path, blocks: Iterable[list[str]]) -> None:
        """Write a new file with the rows of blocks, given as lines of JSON."""
        if file.suffix == ".parquet":
            self.write_parquet(file, blocks)
            return
        lines = chain.from_iterable(blocks)
        with file.open("w", encoding="utf-8", newline="") as stream:
            if file.suffix == ".jsonl":
                stream.writelines(lines)
            elif file.suffix == ".json":
                stream.write("[")
                stream.writelines(
                    f"{',' if number else ''}{line}" for number, line in enumerate(lines)
                )
                stream.write("]\n")
            else:
                writer = csv.writer(stream)
                names = [name for name in self.types if name != PROBABILITIES]
                writer.writerow([*names, *(f"{PROBABILITY_OF}{label}" for label in self.classes)])
                for row in map(json.loads, lines):
                    probabilities = row.pop(PROBABILITIES, {})
                    writer.writerow([*join_lists(row).values(), *probabilities.values()])

    def write_parquet(self, file: Path, blocks: Iterable[list[str]]) -> None:
        """Write a Parquet file with row groups of at least `ROW_GROUP_BYTES`."""
        schema = pyarrow.schema(self.types)
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            group: list[pyarrow.Table] = []
            for lines in blocks:
                rows = [json.loads(line) for line in lines]
                for row in rows:
                    if row.get("id") is not None:
                        row["id"] = str(row["id"])
                group.append(pyarrow.Table.from_pylist(rows, schema=schema))
                if sum(table.nbytes for table in group) >= ROW_GROUP_BYTES:
                    writer.write_table(pyarrow.concat_tables(group))
                    group.clear()
            if group:
                writer.write_table(pyarrow.concat_tables(group))


def file_name(output: str) -> str:
    """Return the name of an output. The query of a URL is removed."""
    return output.partition("?")[0] if is_url(output) else output


def output_kind(output: str, output_format: str | None) -> str:
    """Return the suffix of the output's file, or of the files in its folder."""
    name = file_name(output)
    if name.endswith("/"):
        return f".{output_format or 'parquet'}"
    return TASKS if name.endswith(TASKS) else Path(name).suffix

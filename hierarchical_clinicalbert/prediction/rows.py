"""Build output rows from predictions, and write them as JSON Lines, CSV, Parquet or tasks of Label Studio.

A task is a JSON object that holds the row, its text, and the prediction as a pre-annotation:
https://labelstud.io/guide/predictions. The other formats do not contain texts.
"""

import csv
import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet

from hierarchical_clinicalbert.prediction.input import InputRow
from hierarchical_clinicalbert.reading.stores import is_url

TASKS = ".tasks.json"
OUTPUTS = (".jsonl", ".csv", ".parquet", TASKS)
DIGITS = 6
ROW_GROUP_BYTES = 2**26  # of a Parquet file; one group per block would make the footer as large as the rows
SEPARATORS = {"path": " > ", "answer": " | ", "labels": "; ", "scores": "; "}  # in the cells of a CSV file


class RowFormat:
    """Build the rows of an output, and write them to files.

    Args:
        arguments: the flags of predict.py.
        config: the configuration of the checkpoint.
        version: the model's version, for tasks; None for other formats.
    """

    def __init__(self, arguments: Namespace, config: Any, version: str | None):
        tree, self.version = config.tree, version
        self.classes = [*config.id2label.values()] if arguments.probabilities else []
        self.parents = {tree.labels[i]: tree.labels[parent] for i, parent in enumerate(tree.parents) if parent >= 0}
        text, number = pyarrow.string(), pyarrow.float64()
        texts, numbers = pyarrow.list_(text), pyarrow.list_(number)
        # a Parquet column has one type, so ids are strings
        self.types = {"row": pyarrow.int64()} if arguments.id_column is None else {"id": text}
        if config.is_multi_label:
            self.types |= {"labels": texts, "scores": numbers}
        else:
            self.types |= {"label": text, "score": number, "path": texts}
            if arguments.costs is not None:
                self.types["expected_cost"] = number
        if arguments.uncertainty:
            self.types |= {"uncertainty": number, "unsure_level": pyarrow.int64()}
        self.types["truncated"] = pyarrow.bool_()
        if (arguments.coverage, arguments.recall) != (None, None):
            self.types["answer"] = texts
        if self.classes:
            self.types["probabilities"] = pyarrow.struct([(label, number) for label in self.classes])

    def row(self, number: int, record: InputRow, prediction: dict[str, Any]) -> dict[str, Any]:
        """Build the row, or the task, of a record from the pipeline's prediction."""
        row = {"id": record.id, "row": number, "truncated": prediction["truncated"]}
        row["answer"] = [node["label"] for node in prediction.get("answer", [])]
        if "labels" in self.types:
            row["labels"] = [node["label"] for node in prediction["labels"]]
            row["scores"] = [round(node["score"], DIGITS) for node in prediction["labels"]]
        else:
            row["label"], row["score"] = prediction["label"], round(prediction["score"], DIGITS)
            row["path"] = [node["label"] for node in prediction["path"]]
            row["expected_cost"] = round(prediction.get("expected_cost", 0.0), DIGITS)
        if "uncertainty" in self.types:
            entropies = self.entropies(prediction["levels"])
            row["uncertainty"] = round(sum(entropies), DIGITS)
            row["unsure_level"] = 1 + entropies.index(max(entropies))
        if self.classes:
            nodes = {label: probability for level in prediction["levels"] for label, probability in level.items()}
            row["probabilities"] = {label: round(nodes[label], DIGITS) for label in self.classes}
        row = {name: row[name] for name in self.types}
        return row if self.version is None else self.task(row, record.text, prediction)

    def task(self, row: dict[str, Any], text: str | None, prediction: dict[str, Any]) -> dict[str, Any]:
        """Build a task with the predicted paths. Its score is the lowest probability of a predicted node."""
        predicted = prediction["labels"] if "labels" in row else [prediction]
        paths = [[step["label"] for step in node["path"]] for node in predicted]
        choice = {"from_name": "taxonomy", "to_name": "text", "type": "taxonomy", "value": {"taxonomy": paths}}
        annotation: dict[str, Any] = {"model_version": self.version, "result": [choice] if paths else []}
        if paths:
            annotation["score"] = round(min(node["score"] for node in predicted), DIGITS)
        return {"data": {"text": text, **row}, "predictions": [annotation]}

    def entropies(self, levels: list[dict[str, float]]) -> list[float]:
        """Compute the contribution of each level's decisions to the entropy of a prediction, in nats.

        For single-path models, a decision is the choice among siblings. The sum over levels is the entropy of the leaf, by the
        chain rule (Cover and Thomas, 2006, "Elements of Information Theory", theorem 2.5.1). For multi-label models, a decision
        is whether a text has a node, given its parent. Siblings are independent given their parent, so the sum is the entropy of
        the set of nodes.

        Args:
            levels: for each level, from the roots down, the probability of every node by label.
        """
        probabilities, entropies = dict[str | None, float]({None: 1.0}), []
        for level in levels:
            entropies.append(0.0)
            for label, probability in level.items():
                of_parent = probabilities[self.parents.get(label)]
                entropies[-1] += of_parent * entropy_term(probability / of_parent if of_parent else 0.0)
                if "labels" in self.types:
                    entropies[-1] += of_parent * entropy_term(1 - probability / of_parent if of_parent else 0.0)
            probabilities.update(level.items())
        return entropies

    @contextmanager
    def open(self, file: Path) -> Iterator[Callable[[list[str]], None]]:
        """Open a new file, and yield a function that writes rows, given as lines of JSON."""
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetWriter(file, pyarrow.schema(self.types)) as writer:
                waiting: list[pyarrow.Table] = []

                def write(lines: list[str]) -> None:
                    waiting.append(self.table(lines))
                    if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                        write_waiting()

                def write_waiting() -> None:
                    if waiting:
                        writer.write_table(pyarrow.concat_tables(waiting))
                        waiting.clear()

                yield write
                write_waiting()
            return
        with file.open("w", encoding="utf-8", newline="") as stream:
            if file.suffix == ".jsonl":
                yield stream.writelines
                return
            if file.suffix == ".json":
                stream.write("[")
                separators = chain([""], repeat(","))  # before each row
                yield lambda lines: stream.writelines(f"{next(separators)}{line}" for line in lines)
                stream.write("]\n")
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
        """Build a table from rows, given as lines of JSON. Ids become texts, because a column has one type."""
        rows = [json.loads(line) for line in lines]
        for row in rows:
            if row.get("id") is not None:
                row["id"] = str(row["id"])
        return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(self.types))


def entropy_term(p: float) -> float:
    """Return -p · log(p) in nats. It is 0 for p = 0, and where rounding left p outside of [0, 1]."""
    return -p * math.log(p) if 0 < p < 1 else 0.0


def file_name(output: str) -> str:
    """Return the name of an output. The query of a URL is removed."""
    return output.partition("?")[0] if is_url(output) else output


def output_kind(output: str, output_format: str | None) -> str:
    """Return the suffix of the output's file, or of the files in its folder."""
    name = file_name(output)
    if name.endswith("/"):
        return f".{output_format or 'parquet'}"
    return TASKS if name.endswith(TASKS) else Path(name).suffix

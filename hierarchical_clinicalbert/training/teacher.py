"""Teach a model by probabilities in a file, for training texts and for texts without labels.

Worth knowing:

1. The file is an output of ``predict.py --probabilities``: what another model says of the texts.
   Rows are found by the hash of their text, so the output may have other texts, too.
2. Or it has texts and probabilities of their labels, by a language model, or votes of annotators.
3. A text without a label gets the most probable nodes. From there on, it is a training text.
4. Texts that the model behind an output was trained on are never scored, see `data.splits`.
"""

import glob
import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets

from decisions_hierarchical import Decisions, build_decisions
from hierarchical_clinicalbert.checkpoint_files import TRAINED_TEXTS
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.labels import find_node
from hierarchical_clinicalbert.data.splits import FEATURES, LabelledSplits
from hierarchical_clinicalbert.data.tables import read_table, refuse_rows
from hierarchical_clinicalbert.data.trained_texts import TrainedTexts, read_hashes
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.files import sha256
from hierarchical_clinicalbert.reading.columns import (
    TEXT_COLUMNS,
    choose_columns,
    text_hash,
    text_problem,
)
from hierarchical_clinicalbert.reading.results import PROBABILITIES, PROBABILITY_OF, TEXT_HASH
from hierarchical_clinicalbert.reading.sources import Source, find_sources, open_rows

TASK = "data"  # column of the fields in tasks of Label Studio
ADVICE = (
    "give an output of predict.py --probabilities, or a file with columns text and probabilities"
)


def teach(name: str, arguments: DataArguments, data: LabelledSplits) -> LabelledSplits:
    """Add unlabelled texts to the training rows, and to all of them the teacher's decision scores.

    ``name`` is the teacher's file or folder. The scores, num_nodes numbers a row, are the column
    ``teacher``.

    Raises:
        InputError: the teacher's probabilities cannot be used, or some training texts have none.
    """
    # ── Probabilities of the training texts ───────────────────────────────────────────────────────
    no_rows = Dataset.from_dict({column: [] for column in FEATURES}, FEATURES)
    rows = data.splits.get("train", no_rows)
    texts = {text_hash(text) for text in rows["text"]} | data.unlabelled.keys()
    if not texts:
        raise InputError("--teacher needs texts to teach: give training rows, or --unlabelled_file")
    decisions = build_decisions(data.taxonomy, data.problem_type)
    files = find_files(name, arguments.encoding)
    probabilities: dict[str, torch.Tensor] = {}
    for file in files:
        probabilities = read_probabilities(file, arguments.text_column, decisions) | probabilities
    if missing := len(texts - probabilities.keys()):
        of_texts = f"{missing:,} of {len(texts):,} training texts"
        raise InputError(f"--teacher {name} has no probabilities of {of_texts}")

    # ── Training rows ─────────────────────────────────────────────────────────────────────────────
    if data.unlabelled:
        chosen = decisions.predict(torch.stack([probabilities[key] for key in data.unlabelled]))
        numbers = np.arange(len(data.unlabelled))
        columns = {
            "text": [*data.unlabelled.values()],
            "nodes": [data.taxonomy.deepest(np.flatnonzero(row).tolist()) for row in chosen],
            "row": numbers,
            "text_id": -1 - numbers,  # numbers that no other text has
        }
        rows = concatenate_datasets([rows, Dataset.from_dict(columns, FEATURES)])
    of_rows = torch.stack([probabilities[text_hash(text)] for text in rows["text"]])
    taught = rows.add_column("teacher", [*decisions.scores_of(of_rows).numpy()])

    # ── Report ────────────────────────────────────────────────────────────────────────────────────
    hashes = sha256(Path(file.path) for file in files)
    source = {"split": "teacher", "name": name, "dataset": None, "sha256": hashes}
    report = data.report | {"teacher": name, "sources": [*data.report["sources"], source]}
    return replace(data, splits=DatasetDict(data.splits | {"train": taught}), report=report)


def read_teachers_texts(name: str) -> TrainedTexts:
    """Return the texts that the model behind a teacher was trained on.

    predict.py wrote them beside its output; if not, they are unknown. A file of votes has none.
    """
    file = Path(name, TRAINED_TEXTS) if Path(name).is_dir() else Path(f"{name}.{TRAINED_TEXTS}")
    if file.is_file():
        return read_hashes(file)
    with open_rows(find_files(name)[0]) as rows:
        return TrainedTexts(complete={TEXT_HASH, TASK}.isdisjoint(rows.columns))


def find_files(name: str, encoding: str | None = None) -> list[Source]:
    """Return the files of a teacher: the one of that name, or those of an output's folder."""
    pattern = glob.escape(name) + ("/part-*" if Path(name).is_dir() else "")
    try:
        return find_sources(pattern, encoding=encoding)
    except InputError as error:
        raise InputError(f"--teacher {error}; {ADVICE}") from error


def read_probabilities(
    file: Source,
    text_column: str | None,
    decisions: Decisions,
) -> dict[str, torch.Tensor]:
    """Read P(node), (num_nodes,), of texts by `text_hash`.

    Probabilities are JSON objects, {label: number}. For one path a text, only their ratios count,
    so they may be votes.
    """
    # ── The forms of a file: JSON, Parquet or votes; tasks of Label Studio; CSV of predict.py ─────
    table = read_table(file)
    if TASK in table:
        table = pd.DataFrame([*table[TASK]], table.index, dtype=object)
    if of_labels := [column for column in table if column.startswith(PROBABILITY_OF)]:
        labels = [column.removeprefix(PROBABILITY_OF) for column in of_labels]
        cells = [dict(zip(labels, row, strict=True)) for row in table[of_labels].to_numpy()]
        table[PROBABILITIES] = pd.Series(cells, table.index)
    if PROBABILITIES not in table:
        raise InputError(f"--teacher {file.name} has no probabilities: {ADVICE}")

    # ── Rows ──────────────────────────────────────────────────────────────────────────────────────
    is_output = TEXT_HASH in table
    if is_output:
        table = table.drop_duplicates(TEXT_HASH)  # a repeated text has the same probabilities
        keys = table[TEXT_HASH]
    else:
        columns = {file.name: [*table]}
        (column,) = choose_columns(columns, text_column, TEXT_COLUMNS, "--text_column")
        refuse_rows(table, [column], map(text_problem, table[column]))
        keys = table[column].map(text_hash)
    find = cache(partial(find_node, decisions.tree))
    found: dict[str, torch.Tensor] = {}
    problems: list[str | None] = []
    for key, cell in zip(keys, table[PROBABILITIES], strict=True):
        try:
            if key in found:
                remedy = "give one row a text, with the sum of its votes"
                raise ValueError(f"its text has an earlier row: {remedy}")
            given = json.loads(cell) if isinstance(cell, str) else cell
            of_nodes = {find(label): float(number or 0) for label, number in given.items()}
            if not all(0 <= number < math.inf for number in of_nodes.values()):
                raise ValueError("a probability must be at least 0, and finite")
            if len(of_nodes) < len(given):
                raise ValueError("two of its labels are the same node")
            if is_output and len(of_nodes) < decisions.num_classes:
                raise ValueError("it lacks classes of the data: the teacher has another taxonomy")
            positive = {node: number for node, number in of_nodes.items() if number}
            found[key] = decisions.from_labels(positive)
            problems.append(None)
        except (AttributeError, TypeError, json.JSONDecodeError):
            problems.append('expected a JSON object, such as {"neoplasms": 0.7}')
        except ValueError as error:
            problems.append(str(error))
    refuse_rows(table, [PROBABILITIES], problems)
    return found

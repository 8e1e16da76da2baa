"""Teach a model by probabilities, from another model or from a file, for training texts and for texts without labels.

Worth knowing:

1. A teacher is a checkpoint with the taxonomy of the data. Its encoder and tokenizer may be others than the student's.
2. Or it is a file with probabilities of labels, by a language model, or votes of annotators.
3. A text without a label gets the nodes that the teacher predicts. From there on, it is a training text like others.
4. A checkpoint has learnt the training texts' labels, and says little more of them. So it also teaches by halves of them.
5. A checkpoint's scores are stored by hashes of the texts, so that runs with other splits of the rows share them. For the same
   reason, each text is always split into the same halves.
6. Texts that the teacher was trained on are never scored, see `data.splits`.
"""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from safetensors import safe_open
from safetensors.numpy import save

from configuration_hierarchical import HierarchicalConfig
from decisions_hierarchical import Decisions, build_decisions
from hierarchical_clinicalbert.checkpoint_files import MODEL_FILES, is_checkpoint, list_files, read_config
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.labels import find_node
from hierarchical_clinicalbert.data.sources import read_texts
from hierarchical_clinicalbert.data.splits import FEATURES, LabelledSplits
from hierarchical_clinicalbert.data.tables import refuse_rows
from hierarchical_clinicalbert.data.trained_texts import text_hash
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.files import sha256
from hierarchical_clinicalbert.training.arguments import Arguments, HierarchicalTrainingArguments, ModelArguments
from hierarchical_clinicalbert.training.model import fetch_model
from hierarchical_clinicalbert.training.score import scoring_trainer
from hierarchical_clinicalbert.training.tokens import tokenize_splits
from hierarchical_clinicalbert.training.views import half_texts

logger = logging.getLogger(__name__)

PROBABILITIES = "probabilities"  # column of a file

Scores = dict[str, np.ndarray]  # decision scores (num_nodes,) of a text, by its hash


def teach(name: str, arguments: Arguments, data: LabelledSplits) -> LabelledSplits:
    """Add unlabelled texts to the training rows, and to all of them the teacher's decision scores.

    ``name`` is the teacher's. The scores are lists of num_nodes numbers in the column ``teacher``. The split ``halves`` has halves
    of labelled training texts, for the steps alone: few rows with halves are still few.
    """
    # ── Decision scores, and thresholds of predicted nodes ───────────────────────────────────────────────────────────
    splits, report, halves = DatasetDict(data.splits), dict(data.report), dict[str, str]()
    rows = splits.get("train", Dataset.from_dict({column: [] for column in FEATURES}, FEATURES))
    texts = {text_hash(text): text for text in rows["text"]}
    text_of = texts | data.unlabelled
    decisions = build_decisions(data.taxonomy, data.problem_type)
    thresholds: list[float] | None = None
    if Path(name).is_file():
        scores, source = read_probabilities(name, arguments.data, decisions)
        report["sources"] = [*report["sources"], source]
        if missing := len(text_of.keys() - scores.keys()):
            raise InputError(f"--teacher {name} has no probabilities of {missing:,} of {len(text_of):,} training texts")
    else:
        in_splits = {text_hash(text) for split in splits.values() for text in split["text"]}
        for key, text in texts.items():
            pair = {text_hash(half): half for half in half_texts(text, np.random.default_rng(int(key, 16)))}
            halves |= {key: half for key, half in pair.items() if key not in in_splits}
        scores, thresholds = ask_checkpoint(name, arguments, data, text_of | halves)

    # ── Training rows ────────────────────────────────────────────────────────────────────────────────────────────────
    def with_scores(rows: Dataset) -> Dataset:
        return rows.add_column("teacher", [scores[text_hash(text)] for text in rows["text"]])

    def predicted(texts: dict[str, str]) -> Dataset:
        probabilities = decisions(torch.from_numpy(np.stack([scores[key] for key in texts])))[0].exp()
        chosen, _ = decisions.predict(probabilities, thresholds)
        nodes = [data.taxonomy.deepest(np.flatnonzero(row).tolist()) for row in chosen]
        numbers = np.arange(len(texts))
        columns = {"text": [*texts.values()], "nodes": nodes, "row": numbers}
        return Dataset.from_dict(columns | {"text_id": -1 - numbers}, FEATURES)  # numbers that no other text has

    if data.unlabelled:
        rows = concatenate_datasets([rows, predicted(data.unlabelled)])
    splits["train"] = with_scores(rows)
    if halves:
        splits["halves"] = with_scores(predicted(halves))
        logger.info("halves of training texts, which the teacher labels: %s", f"{len(halves):,}")
    report["teacher"] = name
    return replace(data, splits=splits, report=report)


# ── A file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_probabilities(name: str, arguments: DataArguments, decisions: Decisions) -> tuple[Scores, dict[str, Any]]:
    """Read texts and the probabilities of their labels, and describe the file as `SourceRows.sources` does.

    Probabilities are JSON objects, {label: number}. For one path a text, only their ratios count, so they may be votes.
    """
    table, source = read_texts(name, "teacher", arguments, PROBABILITIES)
    keys = [*map(text_hash, table.iloc[:, 0])]
    found, problems, is_repeated = [], list[str | None](), pd.Series(keys).duplicated()
    for cell, repeated in zip(table[PROBABILITIES], is_repeated, strict=True):
        try:
            if repeated:
                raise ValueError("its text has an earlier row: give one row a text, with the sum of its votes")
            given = json.loads(cell) if isinstance(cell, str) else cell
            numbers = {find_node(decisions.tree, label): float(number or 0) for label, number in given.items()}
            if not all(0 <= number < math.inf for number in numbers.values()):
                raise ValueError("a probability must be at least 0, and finite")
            if len(numbers) < len(given):
                raise ValueError("two of its labels are the same node")
            found.append(decisions.from_labels(numbers))
            problems.append(None)
        except (AttributeError, TypeError, json.JSONDecodeError):
            problems.append('expected a JSON object, such as {"neoplasms": 0.7}')
        except ValueError as error:
            problems.append(str(error))
    refuse_rows(table, [PROBABILITIES], problems)
    scores = decisions.scores_of(torch.stack(found)).numpy()
    return dict(zip(keys, scores, strict=True)), source


# ── A checkpoint ─────────────────────────────────────────────────────────────────────────────────────────────────────


def ask_checkpoint(
    name: str, arguments: Arguments, data: LabelledSplits, text_of: dict[str, str]
) -> tuple[Scores, list[float] | None]:
    """Return a checkpoint's decision scores of texts, given by hash, and its thresholds of predicted nodes.

    Raises:
        InputError: ``--teacher`` is no checkpoint, or has another taxonomy or form of label than the data.
    """
    # ── Teacher ──────────────────────────────────────────────────────────────────────────────────────────────────────
    args = arguments.training
    folder = fetch_model(ModelArguments(model_name_or_path=name)).model_name_or_path
    if not is_checkpoint(folder):
        raise InputError(f"--teacher {name} is neither a file nor a checkpoint that train.py wrote")
    config = read_config(folder)
    if config.problem_type != data.problem_type:
        raise InputError(f"--teacher {name} is for {config.problem_type}, the data are for {data.problem_type}")
    ours, theirs = data.taxonomy.node_of_path, config.tree.node_of_path
    if ours.keys() != theirs.keys():
        raise InputError(f"--teacher {name} has another taxonomy than the data: give its taxonomy as --taxonomy")
    in_our_order = [theirs[path] for path in ours]

    # ── Scores, from the file and the teacher ────────────────────────────────────────────────────────────────────────
    weights = ",".join(sha256(Path(folder, file) for file in list_files(Path(folder), MODEL_FILES)).values())
    file = None if arguments.loss.teacher_scores is None else Path(arguments.loss.teacher_scores)
    stored = {} if file is None else read_scores(file, weights)
    missing = {key: text for key, text in text_of.items() if key not in stored}
    if missing:
        logger.info("the teacher scores %d texts", len(missing))
        found = score_texts(folder, config, list(missing.values()), args)
        stored |= dict(zip(missing, found, strict=True))
        if file is not None and args.should_save:
            write_scores(file, weights, stored)
    thresholds = config.calibration.thresholds
    in_order = None if thresholds is None else [thresholds[node] for node in in_our_order]
    return {key: scores[in_our_order] for key, scores in stored.items()}, in_order


def score_texts(
    folder: str, config: HierarchicalConfig, texts: list[str], args: HierarchicalTrainingArguments
) -> np.ndarray:
    """Return a checkpoint's decision scores of texts, (num_texts, num_nodes)."""
    trainer = scoring_trainer(folder, args)
    tokenizer = trainer.processing_class
    columns = {"text": texts, "nodes": [[0]] * len(texts), "row": range(len(texts))}
    limit = config.calibration.max_length or tokenizer.model_max_length
    splits, _ = tokenize_splits(DatasetDict(test=Dataset.from_dict(columns)), tokenizer, limit)
    ignored = [key for key in config.keys_to_ignore_at_inference if key != "decision_logits"]
    _, scores, *_ = trainer.predict(splits["test"], ignored).predictions
    return scores[np.argsort(splits["test"]["row"][:])]


def read_scores(file: Path, weights: str) -> Scores:
    """Read ``--teacher_scores``, none if there is no file. InputError: they are of other ``weights``."""
    if not file.exists():
        return {}
    with as_input_error(f"--teacher_scores {file} cannot be read"), safe_open(file, "numpy") as content:
        if content.metadata() != {"weights": weights}:
            raise InputError(f"--teacher_scores {file} holds scores of another teacher: give another file")
        hashes = (row.tobytes().hex() for row in content.get_tensor("texts"))
        return dict(zip(hashes, content.get_tensor("scores"), strict=True))


def write_scores(file: Path, weights: str, scores: Scores) -> None:
    """Write ``--teacher_scores``, atomically."""
    new = file.with_name(f"{file.name}.new")
    hashes = np.array([np.frombuffer(bytes.fromhex(key), np.uint8) for key in scores])
    with as_input_error(f"--teacher_scores {file} cannot be written"):
        # safetensors' own files can be read by their owner alone
        new.write_bytes(save({"texts": hashes, "scores": np.stack([*scores.values()])}, {"weights": weights}))
        new.replace(file)

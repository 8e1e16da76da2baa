"""Teach a model by another one: its decision scores for the training texts, and labels for texts that have none.

Worth knowing:

1. The teacher needs the taxonomy of the data. Its encoder and tokenizer may be others than the student's.
2. A text without a label gets the nodes that the teacher predicts. From there on, it is a training text like others.
3. Scores are stored by hashes of the texts, so that runs with other splits of the rows share them.
4. Texts that the teacher was trained on are never scored, see `data.splits`.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from safetensors import safe_open
from safetensors.numpy import save
from transformers import AutoTokenizer

from configuration_hierarchical import HierarchicalConfig
from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.checkpoint_files import MODEL_FILES, is_checkpoint, list_files, read_config
from hierarchical_clinicalbert.data.sources import read_unlabelled
from hierarchical_clinicalbert.data.splits import FEATURES, LabelledSplits
from hierarchical_clinicalbert.data.trained_texts import text_hash
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.files import sha256
from hierarchical_clinicalbert.training.arguments import Arguments, HierarchicalTrainingArguments, ModelArguments
from hierarchical_clinicalbert.training.model import fetch_model
from hierarchical_clinicalbert.training.score import scoring_trainer
from hierarchical_clinicalbert.training.tokens import tokenize_splits

logger = logging.getLogger(__name__)

Scores = dict[str, np.ndarray]  # decision scores (num_nodes,) of a text, by its hash


def teach(name: str, arguments: Arguments, data: LabelledSplits) -> LabelledSplits:
    """Add the texts of ``--unlabelled_file`` to the training rows, and the teacher's decision scores to all of them.

    ``name`` is the teacher's. The scores are lists of num_nodes numbers in the column ``teacher``.

    Raises:
        InputError: ``--teacher`` is no checkpoint, or has another taxonomy or form of label than the data.
    """
    # ── Teacher ──────────────────────────────────────────────────────────────────────────────────────────────────────
    args = arguments.training
    folder = fetch_model(ModelArguments(model_name_or_path=name)).model_name_or_path
    if not is_checkpoint(folder):
        raise InputError(f"--teacher {name} is not a checkpoint that train.py wrote")
    config = read_config(folder)
    if config.problem_type != data.problem_type:
        raise InputError(f"--teacher {name} is for {config.problem_type}, the data are for {data.problem_type}")
    ours, theirs = data.taxonomy.node_of_path, config.tree.node_of_path
    if ours.keys() != theirs.keys():
        raise InputError(f"--teacher {name} has another taxonomy than the data: give its taxonomy as --taxonomy")
    in_our_order = [theirs[path] for path in ours]
    our_node = {theirs[path]: node for path, node in ours.items()}

    # ── Texts: those of the training rows, and others that are in no split ───────────────────────────────────────────
    splits, report = DatasetDict(data.splits), dict(data.report)
    rows = splits.get("train", Dataset.from_dict({column: [] for column in FEATURES}, FEATURES))
    labelled, unlabelled = rows["text"][:], dict[str, str]()
    if arguments.data.unlabelled_file is not None:
        texts, source = read_unlabelled(arguments.data.unlabelled_file, arguments.data)
        report["sources"] = [*report["sources"], source]
        known = {text_hash(text) for split in splits.values() for text in split["text"]}
        unlabelled = {key: text for text in texts if (key := text_hash(text)) not in known}
        logger.info("unlabelled texts: %d of %d are in no split, and new", len(unlabelled), len(texts))

    # ── Scores, from the file and the teacher ────────────────────────────────────────────────────────────────────────
    weights = ",".join(sha256(Path(folder, file) for file in list_files(Path(folder), MODEL_FILES)).values())
    file = None if arguments.loss.teacher_scores is None else Path(arguments.loss.teacher_scores)
    stored = {} if file is None else read_scores(file, weights)
    text_of = {text_hash(text): text for text in labelled} | unlabelled
    missing = {key: text for key, text in text_of.items() if key not in stored}
    if missing:
        logger.info("the teacher scores %d texts", len(missing))
        found = score_texts(folder, config, list(missing.values()), args)
        stored |= dict(zip(missing, found, strict=True))
        if file is not None and args.should_save:
            write_scores(file, weights, stored)

    # ── Training rows ────────────────────────────────────────────────────────────────────────────────────────────────
    if unlabelled:
        decisions = build_decisions(config.tree, config.problem_type)
        scores = torch.from_numpy(np.stack([stored[key] for key in unlabelled]))
        predicted, _ = decisions.predict(decisions(scores)[0].exp(), config.calibration.thresholds)
        deepest = (config.tree.deepest(np.flatnonzero(row).tolist()) for row in predicted)
        nodes = [sorted(our_node[node] for node in of_text) for of_text in deepest]
        numbers = np.arange(len(unlabelled))
        columns = {"text": [*unlabelled.values()], "nodes": nodes, "row": numbers}
        added = Dataset.from_dict(columns | {"text_id": -1 - numbers}, FEATURES)  # numbers that no other text has
        rows = concatenate_datasets([rows, added])
    taught = [stored[text_hash(text)][in_our_order] for text in rows["text"]]
    splits["train"] = rows.add_column("teacher", taught)
    report["teacher"] = {"checkpoint": name, "unlabelled_texts": len(unlabelled)}
    return replace(data, splits=splits, report=report)


def score_texts(
    folder: str, config: HierarchicalConfig, texts: list[str], args: HierarchicalTrainingArguments
) -> np.ndarray:
    """Return a checkpoint's decision scores of texts, (num_texts, num_nodes)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    columns = {"text": texts, "nodes": [[0]] * len(texts), "row": range(len(texts))}
    limit = config.calibration.max_length or tokenizer.model_max_length
    splits, _ = tokenize_splits(DatasetDict(test=Dataset.from_dict(columns)), tokenizer, limit)
    trainer = scoring_trainer(folder, args, tokenizer)
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

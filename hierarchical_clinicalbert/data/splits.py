"""Split labelled rows into training, validation and test rows.

Worth knowing:

1. Texts are identical if `normalise_text` returns the same string. Each text is in one split only. Training rows with a
   validation or test text are dropped, and so are validation rows with a test text.
2. Texts that an earlier run of a checkpoint was trained on are never scored. They become training rows or are left out.
3. In multi-label data, the rows of a text within a split are merged into one row with all their labels.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pandas as pd

from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.data.label_forms import RowForm
from hierarchical_clinicalbert.data.labels import LabelledRows
from hierarchical_clinicalbert.data.report import SPLITS, log_splits, rows_by_split, texts_by_node
from hierarchical_clinicalbert.data.trained_texts import NO_TRAINED_TEXTS, TrainedTexts, normalise_text, text_hash
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

# a plain string column of Arrow holds at most 2 GB
FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "nodes": datasets.List(datasets.Value("int64")),
        **dict.fromkeys(("row", "text_id"), datasets.Value("int64")),
        "moved": datasets.Value("bool"),
    }
)


@dataclass(frozen=True)
class LabelledSplits:
    """Labelled rows of all non-empty splits, ready to be tokenized.

    Columns: ``text``; ``nodes``, an ascending list of node ids, with one path a text of one id; ``row``, the number in the
    source, from 0 without the header; ``text_id``, the same for identical texts. ``moved`` is true for training rows that come
    from the file of another split.
    """

    splits: datasets.DatasetDict
    taxonomy: Taxonomy
    report: dict  # for data_report.json
    problem_type: str  # of the configuration
    trained_texts: TrainedTexts  # texts that the initial weights were trained on
    renamed: dict[str, str]  # new names of a checkpoint's nodes, by label


def split_rows(labelled: LabelledRows, seed: int, trained: TrainedTexts = NO_TRAINED_TEXTS) -> LabelledSplits:
    """Place each text in one split, and split off the splits without a source.

    Nothing is split off unless all texts that the checkpoint was ``trained`` on are known.
    """
    source, taxonomy, form = labelled.source, labelled.taxonomy, labelled.source.form
    labels_hash = _labels_hash(labelled.rows)

    # ── Repeated texts: trained on before, in several rows, in several splits ────────────────────────────────────────
    text_ids, texts = pd.factorize(pd.Series(map(normalise_text, labelled.rows["text"]), dtype=object))
    rows, trained_before = _place_trained_rows(labelled.rows.assign(text_id=text_ids), texts, trained)
    counts = rows["split"].value_counts()
    rows = form.merge_repeats(rows)
    merged = counts - rows["split"].value_counts()
    rows, dropped = _drop_shared(rows)

    # ── Split off ────────────────────────────────────────────────────────────────────────────────────────────────────
    shares = source.shares if trained.complete else {}
    rows = _split_off(rows, shares, seed, taxonomy, form)
    parts = rows_by_split(rows)
    if {"train", "validation"} <= parts.keys() and not any(parts["validation"]["nodes"]):
        problem = "no validation text has a label, so nothing can be calibrated"
        raise InputError(f"{problem}: give other validation rows, or label more texts")

    # ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────
    num_dropped, untrained = dropped["split"].value_counts(), []
    if "train" in parts:
        texts_of = texts_by_node(parts["train"]["nodes"], taxonomy)
        num_classes = build_decisions(taxonomy, form.problem_type).num_classes
        untrained = [taxonomy.labels[node] for node in range(num_classes) if not texts_of[node]]
    report = {
        "sources": source.sources,
        "columns": {"text": next(iter(source.columns), None), "label": source.columns[1:]},
        "taxonomy": labelled.origin,
        # a resumed run checks that its labels and training rows are the same
        "split": {
            "method": "by class, identical texts kept together" if shares else "as given",
            "split_off": shares,
            "seed": seed,
            "labels_sha256": labels_hash,
            # another test file may leave other rows for training, since no text is in two splits
            "rows_sha256": {split: _rows_hash(part) for split, part in parts.items() if split != "test"},
        },
        "splits": {
            split: form.describe(part, taxonomy, int(num_dropped.get(split, 0))) for split, part in parts.items()
        },
        "trained_before": trained_before,
        "classes_without_training_rows": untrained,
        "united_rows": {split: int(count) for split, count in merged.items()},
    }
    log_splits(report)
    splits = datasets.DatasetDict()
    for split, part in parts.items():
        splits[split] = datasets.Dataset.from_pandas(part[[*FEATURES]], features=FEATURES, preserve_index=False)
    return LabelledSplits(splits, taxonomy, report, form.problem_type, trained, labelled.renamed)


def _place_trained_rows(
    rows: pd.DataFrame, texts: pd.Index, trained: TrainedTexts
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Move each held-out row whose text earlier runs were trained on to the training rows, or drop it.

    Without training rows, the row is dropped, and so are test rows whose text selected and calibrated the checkpoint. A
    resumed run moves the rows that it moved before. It drops all others whose text it, or an earlier run, was trained on:
    they come from another test file.

    Return the rows, and the section ``trained_before`` of data_report.json.
    """
    hashes = [text_hash(text) for text in texts] if trained.all or trained.validation else []

    def has_text_of(known: frozenset[str]) -> np.ndarray:
        if not known:
            return np.zeros(len(rows), dtype=bool)
        return np.array([h in known for h in hashes], dtype=bool)[rows["text_id"]]

    by_earlier, by_this_run = has_text_of(trained.earlier), has_text_of(trained.this_run)
    in_training = (rows["split"] == "train").to_numpy()
    is_resumed = bool(trained.this_run)
    moved = ~in_training & by_earlier & in_training.any() & (by_this_run | (not is_resumed))
    left_out = ~in_training & (by_earlier | by_this_run) & ~moved
    if not in_training.any():  # scores of this checkpoint
        left_out |= (rows["split"] == "test").to_numpy() & has_text_of(trained.validation)

    def count(mask: np.ndarray) -> dict[str, int]:
        return {split: int(mask[part.index].sum()) for split, part in rows_by_split(rows).items()}

    report = {
        "scores": "verified" if trained.complete else "unverified",
        "texts": len(trained.earlier),
        "training_rows": int((in_training & by_earlier).sum()),
        "moved": count(moved),
        "left_out": count(left_out),
    }
    rows = rows.assign(trained=by_earlier, moved=moved, split=rows["split"].mask(moved, "train"))
    return rows[~left_out].reset_index(drop=True), report


def _labels_hash(rows: pd.DataFrame) -> str:
    """Return a hash of the labels of all rows but the test rows."""
    labels = [*rows.loc[rows["split"] != "test", "nodes"]]
    return hashlib.sha256(json.dumps([False, labels]).encode()).hexdigest()  # False: as unfinished runs have hashed it


def _rows_hash(rows: pd.DataFrame) -> str:
    """Return a hash of the numbers of rows, and of the texts of those that come from another split's file."""
    numbers = np.sort(rows.loc[~rows["moved"], "row"].to_numpy(np.int64))
    texts = sorted(text_hash(text) for text in rows.loc[rows["moved"], "text"])
    return hashlib.sha256(numbers.tobytes() + "".join(texts).encode()).hexdigest()


def _drop_shared(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drop rows whose text is also in a later split, in the order train, validation, test. Return the rows left and dropped."""
    dropped = pd.Series(False, index=rows.index)
    for place, split in enumerate(SPLITS[:-1], start=1):
        own, later = rows["split"] == split, rows["split"].isin(SPLITS[place:])
        shared = own & rows["text_id"].isin(rows.loc[later, "text_id"].unique())
        if own.any() and shared.sum() == own.sum():
            raise InputError(f"no {split} rows are left: every {split} text is also in {' or '.join(SPLITS[place:])}")
        dropped |= shared
    return rows[~dropped].reset_index(drop=True), rows[dropped]


def _split_off(
    rows: pd.DataFrame, shares: dict[str, float], seed: int, taxonomy: Taxonomy, form: RowForm
) -> pd.DataFrame:
    """Move a share of the training texts to each other split, with all rows of a text.

    Texts that an earlier run was trained on stay. If too few others are left, the counts are scaled down.
    """
    rng = np.random.default_rng(seed)
    rows = rows.copy()
    trained = rows.loc[rows["split"] == "train"].groupby("text_id")["trained"].any()
    counts = {split: round(share * len(trained)) for split, share in shares.items()}
    if trained.any() and (~trained).sum() < sum(counts.values()):
        counts = {split: count * int((~trained).sum()) // sum(counts.values()) for split, count in counts.items()}
    for split, count in counts.items():
        train = rows["split"] == "train"
        held_out = form.hold_out(rows[train], taxonomy, count, split, seed, rng)
        rows.loc[train & rows["text_id"].isin(held_out), "split"] = split
    return rows

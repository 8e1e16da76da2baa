"""Split labelled rows into training, validation and test rows.

Worth knowing:

1. Texts are identical if they have the same `text_hash`. Each text is in one split only. Training
   rows with a validation or test text are dropped, and so are validation rows with a test text.
2. Texts that an earlier run of a checkpoint was trained on are never scored. They are not split
   off, and left out of given rows.
3. In multi-label data, the rows of a text within a split are merged into one row with all their
   labels.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from itertools import chain

import datasets
import numpy as np
import pandas as pd

from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.label_forms import RowForm
from hierarchical_clinicalbert.data.labels import FROM_LABELS, resolve_labels
from hierarchical_clinicalbert.data.report import (
    SPLITS,
    count_by_split,
    describe_split,
    find_look_alikes,
    log_splits,
    rows_by_split,
)
from hierarchical_clinicalbert.data.sources import SourceRows
from hierarchical_clinicalbert.data.trained_texts import NO_TRAINED_TEXTS, TrainedTexts
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.reading.columns import text_hash
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

# a plain string column of Arrow holds at most 2 GB
FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "nodes": datasets.List(datasets.Value("int64")),
        "row": datasets.Value("int64"),
        "text_id": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class LabelledSplits:
    """Labelled rows of all non-empty splits, ready to be tokenized.

    Columns: ``text``; ``nodes``, an ascending list of node ids, with one path a text of one id;
    ``row``, the number in the source, from 0 without the header; ``text_id``, the same for
    identical texts.
    """

    splits: datasets.DatasetDict
    taxonomy: Taxonomy
    report: dict  # for data_report.json
    problem_type: str  # of the configuration
    trained_texts: TrainedTexts  # texts that the initial weights were trained on
    unlabelled: dict[str, str]  # texts without labels that are in no source of rows, by `text_hash`


def split_rows(
    source: SourceRows,
    arguments: DataArguments,
    taxonomy: Taxonomy | None,
    seed: int,
    trained: TrainedTexts = NO_TRAINED_TEXTS,
) -> LabelledSplits:
    """Map the labels to nodes by `resolve_labels`, place each text in one split, and split off the
    splits without a source.

    Nothing is split off unless all texts that the checkpoint was ``trained`` on are known.
    """
    labelled, taxonomy, origin = resolve_labels(source, arguments, taxonomy)
    form = source.form

    # ── Repeated texts: trained on before, in several rows, in several splits ─────────────────────
    rows = labelled.assign(hash=[*map(text_hash, labelled["text"])])
    labelled_texts = {*rows["hash"]}
    unlabelled = {
        key: text for text in source.unlabelled if (key := text_hash(text)) not in labelled_texts
    }
    rows, left_out = _leave_out_trained(rows.assign(text_id=pd.factorize(rows["hash"])[0]), trained)
    counts = count_by_split(rows)
    rows = form.merge_repeats(rows)
    merged = {split: counts[split] - count for split, count in count_by_split(rows).items()}
    rows, dropped = _drop_shared(rows)

    # ── Split off ─────────────────────────────────────────────────────────────────────────────────
    shares = source.shares if trained.complete else {}
    rows = _split_off(rows, shares, seed, taxonomy, form, trained)
    parts = rows_by_split(rows)
    if {"train", "validation"} <= parts.keys() and not any(parts["validation"]["nodes"]):
        problem = "no validation text has a label, so nothing can be calibrated"
        raise InputError(f"{problem}: give other validation rows, or label more texts")

    # ── Report ────────────────────────────────────────────────────────────────────────────────────
    described = {
        split: describe_split(part, taxonomy, form, dropped.get(split, 0))
        for split, part in parts.items()
    }
    classes = taxonomy.labels[: build_decisions(taxonomy, form.problem_type).num_classes]
    with_rows = {*chain(*described["train"]["classes"].values())} if "train" in parts else classes
    report = {
        "sources": source.sources,
        "columns": {"text": next(iter(source.columns), None), "label": source.columns[1:]},
        "taxonomy": origin,
        "look_alikes": find_look_alikes(labelled, taxonomy) if origin == FROM_LABELS else [],
        # a resumed run checks that its labels and training rows are the same
        "split": {
            "method": "by class, identical texts kept together" if shares else "as given",
            "split_off": shares,
            "seed": seed,
            "labels_sha256": _labels_hash(labelled),
            # another test file may leave other rows for training, since no text is in two splits
            "rows_sha256": {
                split: _rows_hash(part) for split, part in parts.items() if split != "test"
            },
        },
        "splits": described,
        "trained_before": {
            "scores": "verified" if trained.complete else "unverified",
            "left_out": left_out,
        },
        "classes_without_training_rows": [label for label in classes if label not in with_rows],
        "merged_rows": merged,
        "unlabelled_texts": len(unlabelled),
    }
    log_splits(report)
    splits = datasets.DatasetDict()
    for split, part in parts.items():
        splits[split] = datasets.Dataset.from_pandas(
            part[[*FEATURES]], features=FEATURES, preserve_index=False
        )
    return LabelledSplits(splits, taxonomy, report, form.problem_type, trained, unlabelled)


def _leave_out_trained(
    rows: pd.DataFrame, trained: TrainedTexts
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Drop validation and test rows whose text trained the checkpoint, and test rows whose text
    selected or calibrated it.

    Return the rows left, and the numbers of those dropped.
    """
    is_test = rows["split"] == "test"
    known = rows["hash"].isin(trained.all) | (is_test & rows["hash"].isin(trained.validation))
    left_out = known & (rows["split"] != "train")
    return rows[~left_out].reset_index(drop=True), count_by_split(rows[left_out])


def _labels_hash(rows: pd.DataFrame) -> str:
    """Return a hash of the labels of all rows but the test rows."""
    labels = [*rows.loc[rows["split"] != "test", "nodes"]]
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()


def _rows_hash(rows: pd.DataFrame) -> str:
    """Return a hash of the numbers of rows."""
    return hashlib.sha256(np.sort(rows["row"].to_numpy(np.int64)).tobytes()).hexdigest()


def _drop_shared(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Drop rows whose text is also in a later split, in the order train, validation, test.

    Return the rows left, and the numbers of those dropped.
    """
    place = rows["split"].map(SPLITS.index).astype(int)
    shared = place < place.groupby(rows["text_id"]).transform("max")
    dropped = count_by_split(rows[shared])
    for split, count in count_by_split(rows).items():
        if dropped.get(split) == count:
            later = " or ".join(SPLITS[SPLITS.index(split) + 1 :])
            raise InputError(f"no {split} rows are left: every {split} text is also in {later}")
    return rows[~shared].reset_index(drop=True), dropped


def _split_off(
    rows: pd.DataFrame,
    shares: dict[str, float],
    seed: int,
    taxonomy: Taxonomy,
    form: RowForm,
    trained: TrainedTexts,
) -> pd.DataFrame:
    """Move a share of the training texts to each other split, with all rows of a text.

    Texts that an earlier run was trained on stay, and its validation texts are no test texts. If
    too few others are left, the counts are scaled down.
    """
    rng = np.random.default_rng(seed)
    rows = rows.copy()
    is_new = (rows["split"] == "train") & ~rows["hash"].isin(trained.earlier)
    is_unseen = is_new & ~rows["hash"].isin(trained.earlier_validation)
    num_texts = rows.loc[rows["split"] == "train", "text_id"].nunique()
    needed = [(is_new, sum(shares.values())), (is_unseen, shares.get("test", 0.0))]
    available = [
        rows.loc[free, "text_id"].nunique() / max(1.0, share * num_texts)
        for free, share in needed
        if share
    ]
    scale = min([1.0, *available])
    for split, share in shares.items():
        free = rows[(is_unseen if split == "test" else is_new) & (rows["split"] == "train")]
        count = round(share * num_texts * scale)
        held_out = form.hold_out(free, taxonomy, count, rng) if count else free["text_id"].iloc[:0]
        if held_out.empty:
            problem = (
                f"cannot split off {split} rows: too few of {num_texts:,} training texts can be "
                "spared"
            )
            remedy = f"change --{split}_size, or 0 for no {split} rows, or give --{split}_file"
            raise InputError(
                f"{problem}, as each class and all texts that trained the checkpoint stay; {remedy}"
            )
        rows.loc[is_new & rows["text_id"].isin(held_out), "split"] = split
    return rows

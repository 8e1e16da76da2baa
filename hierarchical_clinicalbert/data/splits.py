"""Read texts and labels, and split them into training, validation and test rows.

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

from hierarchical_clinicalbert.data import report as data_report
from hierarchical_clinicalbert.data.arguments import SHARE, DataArguments
from hierarchical_clinicalbert.data.label_forms import RowForm
from hierarchical_clinicalbert.data.labels import FROM_LABELS, Label, resolve_labels, warn_of_odd_names
from hierarchical_clinicalbert.data.report import SPLITS, rows_by_split
from hierarchical_clinicalbert.data.sources import SplitSource, find_columns, find_split_sources, read_rows
from hierarchical_clinicalbert.data.trained_texts import NO_TRAINED_TEXTS, TrainedTexts, normalise_text, text_hash
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy, quote_name

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
    report: dict  # the content of data_report.json
    problem_type: str  # of the configuration
    logged_counts: str  # see `log_report`
    trained_texts: TrainedTexts  # texts that the initial weights were trained on


@dataclass(frozen=True)
class ReadRows:
    """The rows of all sources, with usable texts and labels as written."""

    sources: dict[str, SplitSource]
    single: bool  # whether the only source is to be split
    shares: dict[str, float]  # of the texts, to split off
    columns: list[str]  # the text column, then the label columns
    rows: pd.DataFrame
    places: dict[Label, str]  # of each label's first occurrence
    form: RowForm


def read_sources(arguments: DataArguments, trains: bool = True) -> ReadRows:
    """Read and check the rows that the arguments name. Only a data set on the Hub needs the network.

    A run that only scores, without ``trains``, reads no training rows if there are others.
    """
    sources, single, shares = _find_sources(arguments, trains)
    columns = find_columns(sources.values(), arguments)
    text_column, *label_columns = first = next(iter(columns.values()))  # other sources may use another case
    logger.info("columns: text %s, label %s", quote_name(text_column), ", ".join(map(quote_name, label_columns)))
    return ReadRows(sources, single, shares, first, *read_rows(sources, columns, arguments))


def load_splits(
    arguments: DataArguments,
    seed: int,
    taxonomy: Taxonomy | None = None,
    trained: TrainedTexts = NO_TRAINED_TEXTS,
    trains: bool = True,
    read: ReadRows | None = None,
) -> LabelledSplits:
    """Map the labels of the rows to nodes, and split the rows. Without rows that were ``read``, read them.

    ``arguments.taxonomy`` takes precedence over the ``taxonomy`` of a checkpoint. No rows are split off unless all texts that
    the checkpoint was trained on are known.
    """
    read = read or read_sources(arguments, trains)
    sources, shares, rows, places, form = read.sources, read.shares, read.rows, read.places, read.form
    text_column, *label_columns = read.columns

    # ── Map labels to nodes ──────────────────────────────────────────────────────────────────────────────────────────
    taxonomy, origin, nodes = resolve_labels(places, len(rows), label_columns, arguments, taxonomy)
    if origin == FROM_LABELS:
        are_levels = len(label_columns) > 1 and not form.classes_of_columns(label_columns)
        warn_of_odd_names(label_columns, taxonomy, are_levels)
    absent = sorted({*range(taxonomy.num_leaves)} - {*nodes.values()})
    if absent and form.classes_of_columns(label_columns):
        first = quote_name(taxonomy.labels[absent[0]])
        logger.warning("%d classes have no column and count as absent, such as %s", len(absent), first)
    node_ids = [tuple(sorted({nodes[label] for label in labels})) for labels in rows["labels"]]
    rows = rows.drop(columns="labels").assign(nodes=pd.Series(node_ids, dtype=object))
    labels_hash = _labels_hash(rows)

    # ── Repeated texts: trained on before, in several rows, in several splits ────────────────────────────────────────
    rows["text_id"], texts = pd.factorize(pd.Series(map(normalise_text, rows["text"]), dtype=object))
    rows, trained_before = _place_trained_rows(rows, texts, trained)
    counts = rows["split"].value_counts()
    rows = form.merge_repeats(rows)
    united = counts - rows["split"].value_counts()
    rows, dropped = _drop_shared(rows)

    # ── Split off ────────────────────────────────────────────────────────────────────────────────────────────────────
    if not trained.complete:
        shares = {}
    rows = _split_off(rows, shares, seed, taxonomy, form)
    if trains and not rows.loc[rows["split"] == "validation", "nodes"].map(len).max():
        problem = "no validation text has a label, so nothing can be calibrated"
        raise InputError(f"{problem}: give other validation rows, or label more texts")

    # ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────
    # a resumed run checks that its labels and training rows are the same
    method = {
        "method": "by class, identical texts kept together" if shares else "as given",
        "split_off": shares,
        "seed": seed,
        "labels_sha256": labels_hash,
        # another test file may leave other rows for training, since no text is in two splits
        "rows_sha256": {split: _rows_hash(part) for split, part in rows_by_split(rows).items() if split != "test"},
    }
    num_dropped = {split: int((dropped["split"] == split).sum()) for split in SPLITS}
    report = {
        "sources": [
            {"split": "all" if read.single else split, "name": one.name, "dataset": one.dataset, "sha256": one.sha256}
            for split, one in sources.items()
        ],
        "columns": {"text": text_column, "label": label_columns},
        "taxonomy": origin,
        "split": method,
        "splits": {
            split: form.describe(part, taxonomy, num_dropped[split]) for split, part in rows_by_split(rows).items()
        },
        "trained_before": trained_before,
        "shared_texts": data_report.shared_texts(pd.concat([rows, dropped])),
        "classes_without_training_rows": untrained_classes(rows, taxonomy, form),
        "united_rows": {split: int(count) for split, count in united.items()},
    }
    data_report.log_splits(report)
    splits = datasets.DatasetDict()
    for split, part in rows_by_split(rows).items():
        splits[split] = datasets.Dataset.from_pandas(part[[*FEATURES]], features=FEATURES, preserve_index=False)
    return LabelledSplits(splits, taxonomy, report, form.problem_type, form.logged_counts, trained_texts=trained)


def _find_sources(arguments: DataArguments, trains: bool) -> tuple[dict[str, SplitSource], bool, dict[str, float]]:
    """Find the sources of `find_split_sources`, and the share of the texts to split off for each split without a source.

    Without ``trains``, training rows are left out if there are others. InputError: a share is out of range or has no effect.
    """
    given = {"validation": arguments.validation_size, "test": arguments.test_size}
    sizes = {split: SHARE if size is None else size for split, size in given.items()}
    if not (min(sizes.values()) >= 0 and sum(sizes.values()) < 1):
        numbers = tuple(sizes.values())
        raise InputError(
            f"--validation_size and --test_size must be shares of the rows with a sum below 1, not {numbers}"
        )
    sources, single = find_split_sources(arguments)
    if not trains and len(sources) > 1:
        sources.pop("train", None)
    can_split = {"validation": "train" in sources and "validation" not in sources, "test": single}
    for split, size in given.items():
        if size and not can_split[split]:
            reason = f"the data have {split} rows" if split in sources else "the data are given by split"
            raise InputError(f"--{split}_size has no effect here, as {reason}: leave it out")
    shares = {split: sizes[split] for split in ("test", "validation") if sizes[split] and can_split[split]}
    return sources, single, shares


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
        return np.array([h in known for h in hashes])[rows["text_id"]]

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


def untrained_classes(rows: pd.DataFrame, taxonomy: Taxonomy, form: RowForm) -> list[str]:
    """Return the classes without a training row, if there are any rows."""
    train = rows.loc[rows["split"] == "train", "nodes"]
    return form.untrained(data_report.texts_by_node(train, taxonomy), taxonomy) if len(train) else []


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

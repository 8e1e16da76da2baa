"""Read texts and labels, and split them into training, validation and test rows.

Worth knowing:

1. Texts are identical if `normalise_text` returns the same string. Each text is in one split only. Training rows with a
   validation or test text are dropped, and so are validation rows with a test text.
2. Texts that an earlier run of a checkpoint was trained on are never scored. They become training rows or are left out.
3. In multi-label data, the rows of a text within a split are merged into one row with all their labels.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

from errors import InputError
from taxonomy_hierarchical import Taxonomy, quote_name
from training import data_report
from training.arguments import SHARE, DataArguments
from training.data_report import SPLITS, rows_by_split
from training.label_arrays import multi_hot
from training.labels import FROM_LABELS, Label, resolve_labels, warn_of_odd_names
from training.sources import SplitSource, find_columns, find_split_sources, read_rows
from training.trained_texts import NO_TRAINED_TEXTS, TrainedTexts, normalise_text, text_hash

logger = logging.getLogger(__name__)

# a plain string column of Arrow holds at most 2 GB
FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        **dict.fromkeys(("label", "row", "text_id"), datasets.Value("int64")),
        "moved": datasets.Value("bool"),
    }
)
MULTI_LABEL_FEATURES = datasets.Features({**FEATURES, "label": datasets.List(datasets.Value("int64"))})


@dataclass(frozen=True)
class LabelledSplits:
    """Labelled rows of all non-empty splits, ready to be tokenized.

    Columns: ``text``; ``label``, a node id; ``row``, the number in the source, from 0 without the header; ``text_id``, the same
    for identical texts. ``moved`` is true for training rows that come from the file of another split.
    In multi-label data, ``label`` is an ascending list of ids.
    """

    splits: datasets.DatasetDict
    taxonomy: Taxonomy
    report: dict  # the content of data_report.json
    is_multi_label: bool
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
    is_multi_label: bool


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
    sources, shares, rows, places, multi_label = read.sources, read.shares, read.rows, read.places, read.is_multi_label
    text_column, *label_columns = read.columns

    # ── Map labels to nodes ──────────────────────────────────────────────────────────────────────────────────────────
    taxonomy, origin, nodes = resolve_labels(places, len(rows), label_columns, arguments, taxonomy)
    if origin == FROM_LABELS:
        warn_of_odd_names(label_columns, taxonomy, multi_label)
    if multi_label and len(label_columns) > 1:
        absent = sorted({*range(taxonomy.num_leaves)} - {*nodes.values()})
        if absent:
            first = quote_name(taxonomy.labels[absent[0]])
            logger.warning("%d classes have no column and count as absent, such as %s", len(absent), first)
    labels = [sorted({nodes[one] for one in label}) if multi_label else nodes[label] for label in rows["label"]]
    rows = rows.assign(label=labels)
    labels_hash = _labels_hash(rows, arguments.incomplete_labels)

    # ── Repeated texts: trained on before, in several rows, in several splits ────────────────────────────────────────
    rows["text_id"], texts = pd.factorize(pd.Series(map(normalise_text, rows["text"]), dtype=object))
    rows, trained_before = _place_trained_rows(rows, texts, trained)
    counts = rows["split"].value_counts()
    if multi_label:
        rows = _unite(rows)
    united = counts - rows["split"].value_counts()
    rows, dropped = _drop_shared(rows)

    # ── Split off ────────────────────────────────────────────────────────────────────────────────────────────────────
    if not trained.complete:
        shares = {}
    rows = _split_off(rows, shares, seed, taxonomy)
    if multi_label and trains and not rows.loc[rows["split"] == "validation", "label"].map(len).max():
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
            split: data_report.describe(part, taxonomy, num_dropped[split])
            for split, part in rows_by_split(rows).items()
        },
        "trained_before": trained_before,
        "shared_texts": data_report.shared_texts(pd.concat([rows, dropped])),
        "classes_without_training_rows": data_report.untrained_classes(rows, taxonomy),
    }
    if multi_label:
        report["united_rows"] = {split: int(count) for split, count in united.items()}
    data_report.log_splits(report)
    features = MULTI_LABEL_FEATURES if multi_label else FEATURES
    splits = datasets.DatasetDict()
    for split, part in rows_by_split(rows).items():
        splits[split] = datasets.Dataset.from_pandas(part[[*features]], features=features, preserve_index=False)
    return LabelledSplits(splits, taxonomy, report, is_multi_label=multi_label, trained_texts=trained)


def train_on_validation_rows(data: LabelledSplits) -> LabelledSplits:
    """Return the data with the validation rows among the training rows."""
    splits, counts = datasets.DatasetDict(data.splits), dict(data.report["splits"])
    splits["train"] = datasets.concatenate_datasets([splits["train"], splits.pop("validation")])
    dropped = counts.pop("validation")["dropped_rows"] + counts["train"]["dropped_rows"]
    rows = splits["train"].to_pandas().assign(split="train")
    if data.is_multi_label:
        rows["label"] = rows["label"].map(list)
    counts["train"] = data_report.describe(rows, data.taxonomy, dropped)
    untrained = data_report.untrained_classes(rows, data.taxonomy)
    # the first run's checkpoint continues with its own rows alone
    split = data.report["split"] | {"rows_sha256": {}}
    report = data.report | {"split": split, "splits": counts, "classes_without_training_rows": untrained}
    return dataclasses.replace(data, splits=splits, report=report)


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


def _labels_hash(rows: pd.DataFrame, incomplete: bool) -> str:
    """Return a hash of the labels of all rows but the test rows, and of ``--incomplete_labels``."""
    labels = [label if isinstance(label, list) else [label] for label in rows.loc[rows["split"] != "test", "label"]]
    return hashlib.sha256(json.dumps([incomplete, labels]).encode()).hexdigest()


def _rows_hash(rows: pd.DataFrame) -> str:
    """Return a hash of the numbers of rows, and of the texts of those that come from another split's file."""
    numbers = np.sort(rows.loc[~rows["moved"], "row"].to_numpy(np.int64))
    texts = sorted(text_hash(text) for text in rows.loc[rows["moved"], "text"])
    return hashlib.sha256(numbers.tobytes() + "".join(texts).encode()).hexdigest()


def _unite(rows: pd.DataFrame) -> pd.DataFrame:
    """Merge the rows of a text within a split into the first of them, with the labels of all."""
    united: dict[tuple, set[int]] = {}
    keys = ["split", "text_id"]
    for *key, labels in rows[[*keys, "label"]].itertuples(index=False):
        united.setdefault(tuple(key), set()).update(labels)
    rows = rows.drop_duplicates(keys, ignore_index=True)
    return rows.assign(label=pd.Series(map(sorted, united.values()), dtype=object))


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


def _split_off(rows: pd.DataFrame, shares: dict[str, float], seed: int, taxonomy: Taxonomy) -> pd.DataFrame:
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
        if isinstance(rows["label"].iloc[0], list):  # of several labels; a text has one row
            texts = rows[train]
            labels, is_trained = multi_hot(taxonomy, [*texts["label"]]), texts["trained"].to_numpy()
            held_out = texts["text_id"].iloc[_sample_by_labels(labels, count, split, seed, is_trained)]
        else:
            sizes = data_report.count_labels(rows[train])
            sizes = sizes.sort_values(["text_id", "size", "label"], ascending=[True, False, True])
            label_of = sizes.drop_duplicates("text_id").set_index("text_id")["label"]  # most common, smallest of ties
            is_trained = trained[label_of.index].to_numpy()
            held_out = label_of.index[_sample(label_of.to_numpy(), count, split, rng, is_trained)]
        rows.loc[train & rows["text_id"].isin(held_out), "split"] = split
    return rows


def _sample(strata: np.ndarray, count: int, split: str, rng: np.random.Generator, trained: np.ndarray) -> np.ndarray:
    """Sample ``count`` texts in proportion to their ``strata`` (N,), as a mask (N,). Each stratum keeps a text for training.

    The method is systematic sampling along the texts, sorted by stratum (Cochran, Sampling Techniques, 1977, chapter 8). If
    at most half of the eligible texts are sampled, a text is left in each stratum of two or more. If more are sampled, the
    first text of each stratum is excluded.

    Texts in the mask ``trained`` (N,) are never sampled. With such texts, ``count`` is lowered to the number of eligible texts.
    """
    # scikit-learn's StratifiedGroupKFold loops over the groups and makes equal folds only. Its train_test_split
    # refuses a class with a single text, and fewer held-out texts than classes.
    order = _shuffled_strata(strata, rng)
    stratum, free = strata[order], ~trained[order]
    # which texts may be drawn, so that each stratum keeps one
    keeps_trained = (np.bincount(strata, trained) > 0)[stratum]
    is_alone, is_first = (np.bincount(strata) == 1)[stratum], np.diff(stratum, prepend=-1) != 0
    eligible = free & (keeps_trained | ~is_alone)  # enough if at most every second text is drawn
    if 2 * count > eligible.sum():
        eligible = free & (keeps_trained | ~is_first)
    available = int(eligible.sum())
    count = _possible_count(count, available, split, trained, "one per class must stay")
    mask = np.zeros(len(strata), dtype=bool)
    mask[order] = _systematic(eligible, count)
    return mask


def _shuffled_strata(strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of texts in which the texts of a stratum follow each other."""
    order = rng.permutation(len(strata))
    rank = rng.permutation(strata.max(initial=0) + 1)
    return order[np.argsort(rank[strata[order]], kind="stable")]


def _systematic(eligible: np.ndarray, count: int) -> np.ndarray:
    """Sample ``count`` of the eligible texts at equal distances, as a mask. Both masks are in the order of the strata."""
    ticks = np.floor(np.cumsum(eligible) * (count / max(1, eligible.sum())) + 0.5)
    return np.diff(ticks, prepend=0) > 0


def _sample_by_labels(labels: np.ndarray, count: int, split: str, seed: int, trained: np.ndarray) -> np.ndarray:
    """Return the indices of about ``count`` texts, in proportion to their labels, see `_sample`.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011, "On the Stratification of Multi-Label Data") assigns
    the texts of the rarest remaining class first. It samples no text of a class with less than half a text to sample. So
    texts with such a rare class are sampled systematically, by their rarest class. A class with one text keeps it for training.

    ``labels`` are of `multi_hot`, (N, num_nodes).
    """
    free = np.flatnonzero(~trained)
    available = len(free) if trained.any() else len(free) - 1
    count = _possible_count(count, available, split, trained, "one must stay")
    if count == len(free):
        return free
    # ── Texts with a rare class ──────────────────────────────────────────────────────────────────────────────────────
    num_texts, num_free = labels.sum(axis=0, dtype=np.int32), labels[free].sum(axis=0, dtype=np.int32)
    rarest, least = np.empty((2, len(free)), dtype=np.int64)
    for start in range(0, len(free), 1024):  # all rows at once would take several times the memory of the labels
        rows = slice(start, start + 1024)
        of_labels = np.where(labels[free[rows]] == 1, num_free, np.int32(len(labels)))
        rarest[rows], least[rows] = of_labels.argmin(axis=1), of_labels.min(axis=1)
    is_rare = least < len(free) / count / 2
    rare, others = np.flatnonzero(is_rare), np.flatnonzero(~is_rare)
    rare = rare[_shuffled_strata(rarest[rare], np.random.default_rng(seed))]
    eligible = num_texts[rarest[rare]] > 1
    num_rare = min(round(count * is_rare.mean()), int(eligible.sum()))
    sampled = rare[_systematic(eligible, num_rare)]

    # ── All others ───────────────────────────────────────────────────────────────────────────────────────────────────
    if (num_others := min(count - num_rare, len(others))) == len(others):
        sampled = np.concatenate([sampled, others])
    elif num_others:
        splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=num_others, random_state=seed)
        of_others = labels[free[others]]
        occurring = of_others.any(axis=0)  # the splitter sums all columns once per class
        occurring[:2] = True  # it refuses a single column
        sampled = np.concatenate([sampled, others[next(splitter.split(others, of_others[:, occurring]))[1]]])
    if not len(sampled):  # the splitter returns about as many as requested, possibly none
        sampled = np.random.default_rng(seed).integers(len(free), size=1)
    return free[sampled]


def _possible_count(count: int, available: int, split: str, trained: np.ndarray, stays: str) -> int:
    """Return how many texts to split off: ``count``, or if texts were trained on before, at most ``available``.

    Raises InputError if this number is 0, or more than ``available``.
    """
    reason = f"{count} of {len(trained):,} distinct training texts were requested, and {stays}"
    if trained.any():
        count = min(count, available)
        reason = f"the checkpoint was trained on {trained.sum():,} of {len(trained):,} distinct training texts"
    if not 0 < count <= available:
        remedy = f"change --{split}_size, or 0 for no {split} rows, or give --{split}_file"
        raise InputError(f"cannot split off {split} rows: {reason}; {remedy}")
    return count

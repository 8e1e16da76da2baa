"""Count duplicates, conflicting labels, classes and lengths, for data_report.json and the log."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, combinations

import numpy as np
import pandas as pd

from taxonomy_hierarchical import Taxonomy, quote_name

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LOGGED_CLASSES = 8
MAX_PAIRS = 20  # of labels that occur together
RAREST = 20  # classes to list
LOGGED_COUNTS = (
    "%(split)s: %(rows)d rows, %(dropped_rows)d dropped, %(normalised_duplicates)d duplicates; %(conflicting_texts)d texts "
    "have several labels, accuracy is at most %(accuracy_ceiling).4f; "
)
LOGGED_LABEL_SETS = "%(split)s: %(rows)d texts, %(dropped_rows)d dropped; %(labels_per_text).2f labels per text; "
LOGGED_LENGTHS = (
    "%(p50)d tokens per text in the median, %(max)d at most; %(truncated)d texts truncated at %(max_length)d"
)


def rows_by_split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Group rows by split, in the order of `SPLITS`."""
    return {split: part for split in SPLITS if len(part := rows[rows["split"] == split])}


def shared_texts(rows: pd.DataFrame) -> dict[str, int]:
    """Count the texts that each pair of splits shares."""
    texts = {split: set(part["text_id"]) for split, part in rows_by_split(rows).items()}
    return {f"{one}, {other}": len(texts[one] & texts[other]) for one, other in combinations(texts, 2)}


def describe(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Count the rows, labels and classes of one split, from which rows were ``dropped``."""
    has_sets = isinstance(rows["label"].iloc[0], list)
    return (_describe_label_sets if has_sets else _describe_labels)(rows, taxonomy, dropped)


def _describe_labels(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Count the rows, duplicates, conflicting labels and classes of a split with one label a row.

    ``accuracy_ceiling`` is the accuracy on rows labelled with a leaf, if each text's most common leaf is predicted.
    """
    counts = count_labels(rows)
    conflicting = conflicts(counts, taxonomy)
    leaves = counts[counts["label"] < taxonomy.num_leaves]
    correct = int(leaves.groupby("text_id")["size"].max().sum())
    return {
        "rows": len(rows),
        "dropped_rows": dropped,
        "normalised_duplicates": len(rows) - int(counts["text_id"].nunique()),
        "conflicting_texts": len(conflicting),
        "conflicting_rows": int(conflicting["size"].sum()),
        "accuracy_ceiling": correct / int(leaves["size"].sum()) if len(leaves) else 1.0,
        "classes": _by_level(taxonomy, taxonomy.count_at_or_below(rows["label"].tolist())),
    }


def count_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Count the rows of each text with each of its labels, in columns ``text_id``, ``label`` and ``size``."""
    return rows.groupby(["text_id", "label"], as_index=False).size()


def conflicts(counts: pd.DataFrame, taxonomy: Taxonomy) -> pd.DataFrame:
    """Return the texts of `count_labels` whose labels are not on one path: a list ``label`` and a ``size`` per text_id."""
    several = counts[counts.duplicated("text_id", keep=False)].groupby("text_id").agg({"label": list, "size": "sum"})
    return several[several["label"].map(taxonomy.deepest).map(len) > 1]


def _describe_label_sets(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Count the texts, labels and classes of a split in which a text has any number of labels and one row.

    ``classes`` counts the texts with a node or one below. All other counts are of a text's deepest labels.
    """
    deepest = [taxonomy.deepest(labels) for labels in rows["label"]]
    numbers = Counter(map(len, deepest))
    texts_of = texts_by_node(rows["label"], taxonomy)
    pairs = Counter(chain.from_iterable(combinations(labels, 2) for labels in deepest)).most_common(MAX_PAIRS)
    names = taxonomy.labels
    return {
        "rows": len(rows),
        "dropped_rows": dropped,
        "labels_per_text": sum(map(len, deepest)) / len(rows),
        "texts_without_labels": numbers[0],
        "texts_by_number_of_labels": {str(number): numbers[number] for number in sorted(numbers)},
        "rarest_classes": {names[i]: texts_of[i] for i in np.argsort(texts_of, kind="stable")[:RAREST]},
        "pairs": [{"labels": [names[i], names[j]], "texts": count} for (i, j), count in pairs],
        "classes": _by_level(taxonomy, texts_of),
    }


def texts_by_node(label_sets: Iterable[Iterable[int]], taxonomy: Taxonomy) -> list[int]:
    """Count, for each node, the texts that have it or a node below."""
    counts = Counter(chain.from_iterable(map(taxonomy.with_ancestors, label_sets)))
    return [counts[node] for node in range(taxonomy.num_nodes)]


def _by_level(taxonomy: Taxonomy, counts: Sequence[int]) -> dict[str, dict[str, int]]:
    nodes = [*zip(taxonomy.levels, taxonomy.labels, counts, strict=True)]
    levels = range(1, taxonomy.depth + 1)
    return {str(level): {label: count for at, label, count in nodes if at == level} for level in levels}


def untrained_classes(rows: pd.DataFrame, taxonomy: Taxonomy) -> list[str]:
    """Return the leaves, or in multi-label data the nodes, without a training row, if there are any rows."""
    train = rows.loc[rows["split"] == "train", "label"].tolist()
    if not train:
        return []
    if isinstance(train[0], list):
        counts = texts_by_node(train, taxonomy)
    else:
        counts = taxonomy.count_at_or_below(train)[: taxonomy.num_leaves]
    return [taxonomy.labels[i] for i, count in enumerate(counts) if not count]


def length_report(lengths: Sequence[int], max_length: int) -> dict:
    """Return percentiles of token counts, with special tokens, and how many texts are truncated at ``max_length``."""
    counts = np.asarray(lengths)
    truncated = int((counts > max_length).sum())
    return {
        **{f"p{q}": int(np.percentile(counts, q, method="inverted_cdf")) for q in (50, 90, 95, 99)},
        "max": int(counts.max()),
        "max_length": max_length,
        "truncated": truncated,
        "truncated_share": truncated / counts.size,
    }


def log_splits(report: dict) -> None:
    for source in report["sources"]:
        logger.info("%s rows from %s", source["split"], source["name"])
    if split_off := report["split"]["split_off"]:
        shares = " and ".join(f"{share:g} for {split}" for split, share in split_off.items())
        logger.info("split off the training texts, identical texts kept together: %s", shares)
    if dropped := _listed({split: counts["dropped_rows"] for split, counts in report["splits"].items()}):
        logger.warning("dropped, since a later split has the texts: %s", dropped)
    if united := _listed(report.get("united_rows", {})):
        logger.info("united with another row of the same text: %s", united)
    before = report["trained_before"]
    for action, counts in (("moved to the training rows", before["moved"]), ("left out", before["left_out"])):
        if held_out := _listed(counts):
            logger.warning("%s, since the checkpoint was trained or calibrated on the texts: %s", action, held_out)
    if before["scores"] == "unverified":
        logger.warning("the checkpoint's training texts are unknown: no rows are split off, and scores are unverified")
    if untrained := report["classes_without_training_rows"]:
        names = ", ".join(map(quote_name, untrained[:LOGGED_CLASSES]))
        logger.warning("%d classes without training rows, such as %s", len(untrained), names)


def _listed(rows: dict[str, int]) -> str:
    return " and ".join(f"{count:,} {split} rows" for split, count in rows.items() if count)


def log_report(report: dict) -> None:
    for split, counts in report["splits"].items():
        line = LOGGED_LABEL_SETS if "labels_per_text" in counts else LOGGED_COUNTS
        logger.info(line + LOGGED_LENGTHS, {"split": split, **counts, **report["lengths"][split]})

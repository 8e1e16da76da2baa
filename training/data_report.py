"""Count what in the data limits any classifier, for data_report.json and the log."""

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
MOST_PAIRS = 20  # of labels that occur together
RAREST = 20
LOGGED_COUNTS = (
    "%(split)s: %(rows)d rows, %(dropped_rows)d dropped, %(normalised_duplicates)d duplicates; %(conflicting_texts)d texts "
    "have several labels, accuracy is at most %(accuracy_ceiling).4f; a text has %(p50)d tokens in the median and at most "
    "%(max)d, %(cut)d texts are truncated at %(max_length)d"
)
LOGGED_LABEL_SETS = (
    "%(split)s: %(rows)d texts, %(dropped_rows)d dropped; %(labels_per_text).2f labels a text, %(texts_without_labels)d "
    "texts have none; a text has %(p50)d tokens in the median and at most %(max)d, %(cut)d texts are truncated at "
    "%(max_length)d"
)


def parts(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Group rows by split, in the order of `SPLITS`."""
    groups = dict(iter(rows.groupby("split")))
    return {split: groups[split] for split in SPLITS if split in groups}


def shared_texts(rows: pd.DataFrame) -> dict[str, int]:
    """Count the texts that each pair of splits shares."""
    texts = {split: set(part["text_id"]) for split, part in parts(rows).items()}
    return {f"{one}, {other}": len(texts[one] & texts[other]) for one, other in combinations(texts, 2)}


def describe(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Count the rows, duplicates, conflicting labels and classes of one split, from which ``dropped`` rows were dropped.

    ``accuracy_ceiling`` is the highest accuracy of any function of the text. It predicts the most common leaf of each
    distinct text, and is measured on rows labelled with a leaf. Labels of a text conflict if they are not on one path.
    """
    counts = rows.groupby(["text_id", "label"], as_index=False).size()
    several = counts[counts.duplicated("text_id", keep=False)].groupby("text_id").agg({"label": list, "size": "sum"})
    deepest = [max(labels, key=lambda label: taxonomy.levels[label]) for labels in several["label"]]
    on_one_path = [{*labels} <= {*taxonomy.path(node)} for labels, node in zip(several["label"], deepest, strict=True)]
    conflicting = several[~np.array(on_one_path, dtype=bool)]
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


def describe_label_sets(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Count the texts, labels and classes of one split, in which a text has any number of labels and one row.

    ``labels_per_text`` and ``texts_by_number_of_labels`` count a text's deepest labels. ``classes`` counts the texts with
    a node or one below. ``rarest_classes`` are those of the least counts, ``pairs`` the deepest labels that most texts share.
    """
    deepest = [taxonomy.deepest(labels) for labels in rows["label"]]
    numbers = Counter(map(len, deepest))
    texts_of = texts_by_node(rows["label"], taxonomy)
    pairs = Counter(chain.from_iterable(combinations(labels, 2) for labels in deepest)).most_common(MOST_PAIRS)
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
    classes: dict[str, dict[str, int]] = {str(level): {} for level in range(1, taxonomy.depth + 1)}
    for node, count in enumerate(counts):
        classes[str(taxonomy.levels[node])][taxonomy.labels[node]] = count
    return classes


def untrained_classes(rows: pd.DataFrame, taxonomy: Taxonomy) -> list[str]:
    """Return the labels of classes without a training row, or none if there is no training split.

    Classes are the leaves; with several labels a text, all nodes.
    """
    train = rows.loc[rows["split"] == "train", "label"].tolist()
    if train and isinstance(train[0], list):
        return [taxonomy.labels[i] for i, count in enumerate(texts_by_node(train, taxonomy)) if not count]
    seen = taxonomy.count_at_or_below(train)
    return [taxonomy.labels[leaf] for leaf in range(taxonomy.num_leaves) if train and not seen[leaf]]


def length_report(lengths: Sequence[int], max_length: int) -> dict:
    """Return percentiles of token counts, and how many texts are truncated at ``max_length``.

    The percentile q is the smallest count that at least q % of the texts do not exceed. Counts include special tokens.
    """
    counts = np.asarray(lengths)
    truncated = int((counts > max_length).sum())
    return {
        **{f"p{q}": int(np.percentile(counts, q, method="inverted_cdf")) for q in (50, 90, 95, 99)},
        "max": int(counts.max()),
        "max_length": max_length,
        "cut": truncated,
        "cut_share": truncated / counts.size,
    }


def log_what_was_done(report: dict) -> None:
    """Log the sources and carved splits, and warn of dropped or moved rows, unknown texts and untrained classes."""
    for source in report["sources"]:
        logger.info("%s rows from %s", source["split"], source["name"])
    if carved := report["split"]["carved"]:
        shares = " and ".join(f"{share:g} for {split}" for split, share in carved.items())
        logger.info("carved from the training texts, identical texts kept together: %s", shares)
    if dropped := _listed({split: counts["dropped_rows"] for split, counts in report["splits"].items()}):
        logger.warning("dropped, since a later split has the texts: %s", dropped)
    if united := _listed(report.get("united_rows", {})):
        logger.info("united with another row of the same text: %s", united)
    before = report["trained_before"]
    if held_out := _listed({split: count for split, count in before["rows"].items() if split != "train"}):
        action = "moved to the training rows" if before["moved"] == "to train" else "left out"
        logger.warning("%s, since the checkpoint was trained on the texts: %s", action, held_out)
    if before["scores"] == "unverified":
        logger.warning(
            "the training texts of the checkpoint are unknown: no rows are carved, and scores are unverified, since "
            "the checkpoint may have been trained on the validation or test texts"
        )
    if untrained := report["classes_without_training_rows"]:
        names = ", ".join(map(quote_name, untrained[:LOGGED_CLASSES]))
        logger.warning("%d classes without training rows, such as %s", len(untrained), names)


def _listed(rows: dict[str, int]) -> str:
    return " and ".join(f"{count:,} {split} rows" for split, count in rows.items() if count)


def log_report(report: dict) -> None:
    """Log what limits any classifier of each split. data_report.json has the classes too."""
    for split, counts in report["splits"].items():
        line = LOGGED_LABEL_SETS if "labels_per_text" in counts else LOGGED_COUNTS
        logger.info(line, {"split": split, **counts, **report["lengths"][split]})

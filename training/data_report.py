"""Count what in the data limits any classifier, for data_report.json and the log."""

import logging
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from taxonomy_hierarchical import Taxonomy, quote_name

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LOGGED_CLASSES = 8
LOGGED_COUNTS = (
    "%(split)s: %(rows)d rows, %(dropped_rows)d dropped, %(normalised_duplicates)d duplicates; %(conflicting_texts)d texts "
    "have several labels, accuracy is at most %(accuracy_ceiling).4f; a text has %(p50)d tokens in the median and at most "
    "%(max)d, %(cut)d texts are truncated at %(max_length)d"
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
    classes: dict[str, dict[str, int]] = {str(level): {} for level in range(1, taxonomy.depth + 1)}
    for node, count in enumerate(taxonomy.count_at_or_below(rows["label"].tolist())):
        classes[str(taxonomy.levels[node])][taxonomy.labels[node]] = count
    return {
        "rows": len(rows),
        "dropped_rows": dropped,
        "normalised_duplicates": len(rows) - int(counts["text_id"].nunique()),
        "conflicting_texts": len(conflicting),
        "conflicting_rows": int(conflicting["size"].sum()),
        "accuracy_ceiling": correct / int(leaves["size"].sum()) if len(leaves) else 1.0,
        "classes": classes,
    }


def untrained_classes(rows: pd.DataFrame, taxonomy: Taxonomy) -> list[str]:
    """Return the labels of leaves without a training row, or none if there is no training split."""
    train = rows.loc[rows["split"] == "train", "label"].tolist()
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
        logger.info(LOGGED_COUNTS, {"split": split, **counts, **report["lengths"][split]})

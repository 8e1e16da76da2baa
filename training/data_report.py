"""Count what in the data limits any classifier, for data_report.json and the log."""

import logging
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from taxonomy_hierarchical import Taxonomy, looks_like_name, quote_name

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LOGGED_CLASSES = 8


def parts(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Group rows by split, in the order of `SPLITS`."""
    groups = dict(iter(rows.groupby("split")))
    return {split: groups[split] for split in SPLITS if split in groups}


def shared_texts(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count the texts that each pair of splits shares, and the rows with such a text."""
    by_split = parts(rows)
    shared = {}
    for pair in combinations(by_split, 2):
        texts = np.intersect1d(*(by_split[split]["text_id"] for split in pair))
        counts = {f"{split}_rows": int(by_split[split]["text_id"].isin(texts).sum()) for split in pair}
        shared[", ".join(pair)] = {"texts": len(texts), **counts}
    return shared


def describe(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Count the rows, duplicates, conflicting labels and classes of one split.

    ``accuracy_ceiling`` is the highest accuracy of any function of the text. It predicts the most common leaf of each
    distinct text, and is measured on rows labelled with a leaf. Labels of a text conflict if they are not on one path.

    Args:
        dropped: number of rows that were dropped from this split.
    """
    counts = rows.groupby(["text_id", "label"]).size()
    by_text = counts.groupby(level="text_id").agg(["size", "sum"])
    several = counts[counts.index.get_level_values("text_id").isin(by_text.index[by_text["size"] > 1])]
    labels_of = several.reset_index().groupby("text_id")["label"].agg(list)
    conflicting = by_text.loc[labels_of.index[[not _on_one_path(labels, taxonomy) for labels in labels_of]]]
    leaves = counts[counts.index.get_level_values("label") < taxonomy.num_leaves]
    ceiling = int(leaves.groupby(level="text_id").max().sum()) / int(leaves.sum()) if len(leaves) else 1.0
    return {
        "rows": len(rows),
        "dropped_rows": dropped,
        "exact_duplicates": len(rows) - int(rows["text"].nunique()),
        "normalised_duplicates": len(rows) - len(by_text),
        "conflicting_texts": len(conflicting),
        "conflicting_rows": int(conflicting["sum"].sum()),
        "accuracy_ceiling": ceiling,
        "classes": _class_counts(rows["label"].to_numpy(), taxonomy),
    }


def _on_one_path(labels: list[int], taxonomy: Taxonomy) -> bool:
    """Return whether all labels are ancestors of the deepest one, or that label itself."""
    return set(labels) <= set(taxonomy.path(max(labels, key=lambda label: taxonomy.levels[label])))


def _class_counts(labels: np.ndarray, taxonomy: Taxonomy) -> dict[str, dict[str, int]]:
    """Count the rows at or below each node, by level and label."""
    classes: dict[str, dict[str, int]] = {str(level): {} for level in range(1, taxonomy.depth + 1)}
    for node, count in enumerate(taxonomy.count_at_or_below(labels.tolist())):
        classes[str(taxonomy.levels[node])][taxonomy.labels[node]] = int(count)
    return classes


def untrained_classes(rows: pd.DataFrame, taxonomy: Taxonomy) -> list[str]:
    """Return the labels of leaves without a training row, or an empty list if there is no training split."""
    train = rows.loc[rows["split"] == "train", "label"].to_numpy()
    if not len(train):
        return []
    seen = taxonomy.count_at_or_below(train.tolist())
    return [taxonomy.labels[leaf] for leaf in range(taxonomy.num_leaves) if not seen[leaf]]


def length_report(lengths: Sequence[int], max_length: int) -> dict:
    """Return percentiles of token counts, and how many texts are truncated at ``max_length``.

    The percentile q is the smallest count that at least q % of the texts do not exceed. Counts include special tokens.

    Raises:
        ValueError: no lengths.
    """
    counts = np.asarray(lengths)
    if not counts.size:
        raise ValueError("no lengths to report on")
    truncated = int((counts > max_length).sum())
    return {
        **{f"p{q}": int(np.percentile(counts, q, method="inverted_cdf")) for q in (50, 90, 95, 99)},
        "max": int(counts.max()),
        "max_length": max_length,
        "cut": truncated,
        "cut_share": truncated / counts.size,
    }


def log_what_was_done(report: dict) -> None:
    """Log the sources, the carved splits, and warnings about shared texts and untrained classes."""
    for source in report["sources"]:
        logger.info("%s rows from %s", source["split"], source["name"])
    if report["split"]["carved"]:
        shares = " and ".join(f"{share:g} for {split}" for split, share in report["split"]["carved"].items())
        logger.info("carved from the training texts, identical texts kept together: %s", shares)
    shared = [
        f"{counts['texts']:,} in {pair.replace(', ', ' and ')}"
        for pair, counts in report["shared_texts"].items()
        if counts["texts"]
    ]
    if shared:
        splits = report["splits"].items()
        dropped = [f"{counts['dropped_rows']:,} {split} rows" for split, counts in splits if counts["dropped_rows"]]
        logger.warning("texts in two splits: %s; dropped: %s", ", ".join(shared), ", ".join(dropped))
    before = report["trained_before"]
    if before["texts"]:
        logger.info(
            "earlier runs of the checkpoint were trained on %s texts; %s training rows with such a text are not carved",
            f"{before['texts']:,}", f"{before['rows'].get('train', 0):,}",
        )  # fmt: skip
    held_out = [f"{count:,} {split} rows" for split, count in before["rows"].items() if count and split != "train"]
    if held_out:
        action = "moved to the training rows" if before["moved"] == "to train" else "left out"
        logger.warning("%s, since the checkpoint was trained on the texts: %s", action, " and ".join(held_out))
    if before["scores"] == "unverified":
        logger.warning(
            "the training texts of the checkpoint are unknown: no rows are carved, and scores are unverified, since "
            "the checkpoint may have been trained on the validation or test texts"
        )
    untrained = report["classes_without_training_rows"]
    if untrained:
        names = ", ".join(map(_quote_unless_name, untrained[:LOGGED_CLASSES]))
        more = f" and {len(untrained) - LOGGED_CLASSES} more" if len(untrained) > LOGGED_CLASSES else ""
        logger.warning("%d classes without training rows: %s%s", len(untrained), names, more)


def _quote_unless_name(name: str) -> str:
    """Return a name as it is; `quote_name` shows only the length of what may be a text about a patient."""
    return name if looks_like_name(name) else quote_name(name)


def log_report(report: dict) -> None:
    """Log the report of `load_splits` as a table, followed by the token counts in ``lengths`` if present."""
    splits = report["splits"]
    logger.info(
        "%-12s%9s%9s%11s%12s%11s%10s",
        "split", "rows", "dropped", "duplicates", "conflicting", "(in rows)", "ceiling",
    )  # fmt: skip
    for split, counts in splits.items():
        logger.info(
            "%-12s%9s%9s%11s%12s%11s%9.1f%%",
            split,
            *(f"{counts[key]:,}" for key in ("rows", "dropped_rows", "normalised_duplicates", "conflicting_texts",
                                             "conflicting_rows")),
            100 * counts["accuracy_ceiling"],
        )  # fmt: skip
    for split, lengths in report.get("lengths", {}).items():
        logger.info(
            "%-12stokens: median %s, 90%% within %s, longest %s; %s texts (%.1f%%) are truncated at %s",
            split, lengths["p50"], lengths["p90"], lengths["max"], f"{lengths['cut']:,}",
            100 * lengths["cut_share"], lengths["max_length"],
        )  # fmt: skip
    first = next(iter(splits.values()))
    for level, classes in first["classes"].items():
        common = sorted(classes, key=lambda name: -classes[name])
        logger.info("level %s: %d classes, rows in %s", level, len(classes), " / ".join(splits))
        for name in common[:LOGGED_CLASSES]:
            logger.info(
                "  %-52s%s",
                _quote_unless_name(name),
                " / ".join(f"{s['classes'][level][name]:,}" for s in splits.values()),
            )
        if len(common) > LOGGED_CLASSES:
            logger.info("  and %d smaller ones", len(common) - LOGGED_CLASSES)

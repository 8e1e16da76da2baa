"""Describe the data by counts that limit any classifier, as data_report.json and as lines of the log."""

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
    """Return the rows of each split, in the usual order."""
    found = dict(iter(rows.groupby("split")))
    return {split: found[split] for split in SPLITS if split in found}


def shared_texts(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count for each two splits the texts in both, and the rows of each that have such a text."""
    by_split = parts(rows)
    shared = {}
    for one, other in combinations(by_split, 2):
        texts = np.intersect1d(by_split[one]["text_id"], by_split[other]["text_id"])
        shared[f"{one}, {other}"] = {
            "texts": len(texts),
            f"{one}_rows": int(by_split[one]["text_id"].isin(texts).sum()),
            f"{other}_rows": int(by_split[other]["text_id"].isin(texts).sum()),
        }
    return shared


def describe(rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
    """Describe one split.

    ``accuracy_ceiling`` is the accuracy, over rows labelled with a leaf, of predicting the most common leaf of each distinct
    text. Texts are compared as `normalise_text` does. No function of the text can do better. Labels of a text conflict if
    they do not lie on one path.
    """
    counts = rows.groupby(["text_id", "label"]).size()
    by_text = counts.groupby(level="text_id").agg(["size", "sum"])
    several = counts[counts.index.get_level_values("text_id").isin(by_text.index[by_text["size"] > 1])]
    found = several.reset_index().groupby("text_id")["label"].agg(list)
    conflicting = by_text.loc[found.index[[not _on_one_path(labels, taxonomy) for labels in found]]]
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
    return set(labels) <= set(taxonomy.path(max(labels, key=lambda label: taxonomy.levels[label])))


def _class_counts(labels: np.ndarray, taxonomy: Taxonomy) -> dict[str, dict[str, int]]:
    classes: dict[str, dict[str, int]] = {str(level): {} for level in range(1, taxonomy.depth + 1)}
    for node, count in enumerate(taxonomy.count_at_or_below(labels.tolist())):
        classes[str(taxonomy.levels[node])][taxonomy.labels[node]] = int(count)
    return classes


def untrained_classes(rows: pd.DataFrame, taxonomy: Taxonomy) -> list[str]:
    """Return the leaves without a training row; none if there are no training rows at all."""
    train = rows.loc[rows["split"] == "train", "label"].to_numpy()
    if not len(train):
        return []
    seen = taxonomy.count_at_or_below(train.tolist())
    return [taxonomy.labels[leaf] for leaf in range(taxonomy.num_leaves) if not seen[leaf]]


def length_report(lengths: Sequence[int], max_length: int) -> dict:
    """Return percentiles of token counts, special tokens included, and how many texts are truncated at ``max_length``.

    A percentile q is the smallest count that at least q % of the texts do not exceed.

    Raises:
        ValueError: no lengths.
    """
    counts = np.asarray(lengths)
    if not counts.size:
        raise ValueError("no lengths to report on")
    cut = int((counts > max_length).sum())
    return {
        **{f"p{q}": int(np.percentile(counts, q, method="inverted_cdf")) for q in (50, 90, 95, 99)},
        "max": int(counts.max()),
        "max_length": max_length,
        "cut": cut,
        "cut_share": cut / counts.size,
    }


def log_what_was_done(report: dict) -> None:
    """Log the sources, what was carved from them, and warnings."""
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
        dropped = [
            f"{found['dropped_rows']:,} {split} rows"
            for split, found in report["splits"].items()
            if found["dropped_rows"]
        ]
        logger.warning("texts in two splits: %s; dropped: %s", ", ".join(shared), ", ".join(dropped))
    before = report["trained_before"]
    if before["texts"]:
        logger.info(
            "earlier runs of the checkpoint were trained on %s texts, which are not carved; of the training rows %s have one",
            f"{before['texts']:,}", f"{before['rows'].get('train', 0):,}",
        )  # fmt: skip
    held_out = [f"{count:,} {split} rows" for split, count in before["rows"].items() if count and split != "train"]
    if held_out:
        done = "moved to the training rows" if before["moved"] == "to train" else "left out"
        logger.warning("of texts that the checkpoint was trained on: %s, %s", " and ".join(held_out), done)
    if before["scores"] == "unverified":
        logger.warning(
            "it is not known which texts the checkpoint was trained on: no rows are carved, and scores of the rows given are "
            "unverified, since they may be of texts that it was trained on"
        )
    untrained = report["classes_without_training_rows"]
    if untrained:
        logger.warning("%d classes without training rows: %s", len(untrained), _some(untrained))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LOGGED_CLASSES} more" if len(names) > LOGGED_CLASSES else ""
    return ", ".join(map(_shown, names[:LOGGED_CLASSES])) + more


def _shown(name: str) -> str:
    return name if looks_like_name(name) else quote_name(name)


def log_report(report: dict) -> None:
    """Log the report of `load_splits` as a table, with the token counts of `tokenize` if ``lengths`` holds them."""
    splits = report["splits"]
    logger.info(
        "%-12s%9s%9s%11s%12s%11s%10s",
        "split", "rows", "dropped", "duplicates", "conflicting", "(in rows)", "ceiling",
    )  # fmt: skip
    for split, found in splits.items():
        logger.info(
            "%-12s%9s%9s%11s%12s%11s%9.1f%%",
            split,
            *(f"{found[key]:,}" for key in ("rows", "dropped_rows", "normalised_duplicates", "conflicting_texts",
                                            "conflicting_rows")),
            100 * found["accuracy_ceiling"],
        )  # fmt: skip
    for split, lengths in report.get("lengths", {}).items():
        logger.info(
            "%-12stokens: median %s, 90%% within %s, longest %s; %s texts (%.1f%%) are cut at %s",
            split, lengths["p50"], lengths["p90"], lengths["max"], f"{lengths['cut']:,}",
            100 * lengths["cut_share"], lengths["max_length"],
        )  # fmt: skip
    first = next(iter(splits.values()))
    for level, classes in first["classes"].items():
        common = sorted(classes, key=lambda name: -classes[name])
        logger.info("level %s: %d classes, rows in %s", level, len(classes), " / ".join(splits))
        for name in common[:LOGGED_CLASSES]:
            logger.info(
                "  %-52s%s", _shown(name), " / ".join(f"{s['classes'][level][name]:,}" for s in splits.values())
            )
        if len(common) > LOGGED_CLASSES:
            logger.info("  and %d smaller ones", len(common) - LOGGED_CLASSES)

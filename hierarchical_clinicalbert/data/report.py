"""Count duplicates, conflicting labels, classes and lengths, for data_report.json and the log."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pandas as pd

from hierarchical_clinicalbert.data.label_forms import RowForm
from taxonomy_hierarchical import LISTED_NAMES, Taxonomy, list_names, normalise, quote_name

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
LOGGED_LENGTHS = (
    "%(p50)d tokens per text in the median, %(max)d at most; %(truncated)d texts truncated at "
    "%(max_length)d"
)


def rows_by_split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Group rows by split, in the order of `SPLITS`."""
    return {split: part for split in SPLITS if len(part := rows[rows["split"] == split])}


def count_by_split(rows: pd.DataFrame) -> dict[str, int]:
    """Count the rows of each split that has any."""
    return {split: len(part) for split, part in rows_by_split(rows).items()}


def describe_split(rows: pd.DataFrame, taxonomy: Taxonomy, form: RowForm, dropped: int) -> dict:
    """Count the rows of a split, from which rows were ``dropped``, and the texts with each node or
    one below it, by level.
    """
    counts = Counter(chain.from_iterable(map(taxonomy.with_ancestors, rows["nodes"])))
    classes: dict[str, dict[str, int]] = {str(level): {} for level in range(1, taxonomy.depth + 1)}
    for node in sorted(counts):
        classes[str(taxonomy.levels[node])][taxonomy.labels[node]] = counts[node]
    return {
        "rows": len(rows),
        "dropped_rows": dropped,
        **form.describe(rows, taxonomy),
        "classes": classes,
    }


def find_look_alikes(rows: pd.DataFrame, taxonomy: Taxonomy) -> list[dict[str, int]]:
    """Return each group of siblings whose names differ in case alone, see `normalise`.

    Returns:
        For each group, the number of rows at or below each of its nodes, by label.
    """
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for node, name in enumerate(taxonomy.names):
        groups[taxonomy.parents[node], normalise(name).casefold()].append(node)
    counts = Counter(chain.from_iterable(map(taxonomy.with_ancestors, rows["nodes"])))
    alike = [nodes for nodes in groups.values() if len(nodes) > 1]
    return [{taxonomy.labels[node]: counts[node] for node in nodes} for nodes in alike]


def length_report(lengths: Sequence[int], max_length: int) -> dict:
    """Return percentiles of token counts, with special tokens, and how many texts are truncated at
    ``max_length``.
    """
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
    if dropped := list_rows(
        {split: counts["dropped_rows"] for split, counts in report["splits"].items()}
    ):
        logger.warning("dropped, since a later split has the texts: %s", dropped)
    if merged := list_rows(report["merged_rows"]):
        logger.info("merged with another row of the same text: %s", merged)
    if left_out := list_rows(report["trained_before"]["left_out"]):
        logger.warning(
            "left out, since the checkpoint was trained or calibrated on the texts: %s", left_out
        )
    if report["trained_before"]["scores"] == "unverified":
        logger.warning(
            "not all training texts of the checkpoint or teacher are known: no rows are split off, "
            "and scores are unverified"
        )
    if texts := report["unlabelled_texts"]:
        logger.info("unlabelled texts, none of them in a split: %s", f"{texts:,}")
    if groups := report["look_alikes"]:
        shown = describe_look_alikes(groups)
        logger.warning("separate classes that differ in case alone, with their rows: %s", shown)
    if untrained := report["classes_without_training_rows"]:
        logger.warning(
            "%d classes without training rows: %s", len(untrained), list_names(untrained)
        )


def describe_look_alikes(groups: list[dict[str, int]]) -> str:
    """List the first groups of `find_look_alikes`, and say what to do."""
    shown = [
        " and ".join(f"{quote_name(label)} ({count:,})" for label, count in group.items())
        for group in groups[:LISTED_NAMES]
    ]
    if len(groups) > LISTED_NAMES:
        shown.append(f"{len(groups) - LISTED_NAMES:,} more in data_report.json")
    return f"{'; '.join(shown)}; if they mean the same, write their labels alike"


def list_rows(rows: dict[str, int]) -> str:
    """Join the numbers of rows of each split that has any."""
    return " and ".join(f"{count:,} {split} rows" for split, count in rows.items() if count)


def log_report(report: dict, lengths: dict[str, dict]) -> None:
    """Log the counts of each split that are not 0, and its `length_report`."""
    for split, counts in report["splits"].items():
        shown = {
            name.replace("_", " "): value
            for name, value in counts.items()
            if np.isscalar(value) and value
        }
        numbers = [f"{name} {value:,.6g}" for name, value in shown.items()]
        logger.info("%s: %s; %s", split, ", ".join(numbers), LOGGED_LENGTHS % lengths[split])

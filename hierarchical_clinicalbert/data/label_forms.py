"""What differs between the two forms of label before training: reading, repeated texts, counts and split-off rows.

`OnePathRows` and `ManyNodesRows` have the same methods. `data.sources` chooses between them. In rows, ``nodes`` are tuples of
node ids: with one path a text, of one id.
"""

import re
from collections import Counter
from itertools import chain, combinations, compress
from typing import Any

import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from decisions_hierarchical import ManyNodes
from hierarchical_clinicalbert.data.report import count_by_level, texts_by_node
from hierarchical_clinicalbert.data.tables import refuse_rows
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy, to_nfc

MAX_PAIRS = 20  # of labels that occur together
ZERO_OR_ONE = {**dict.fromkeys(("0", "0.0", "false"), 0), **dict.fromkeys(("1", "1.0", "true"), 1)}
NO_NAME = "the label is neither text nor a whole number"
# nothing, items in quotation marks, or numbers, in brackets, as Python, JSON and NumPy write them
WRITTEN_LIST = re.compile(r"""[\[{(]+(['"].*['"],?)?[\])}]+|\[[\d\s.,]+\]""", re.DOTALL)

Label = str | tuple[str, ...]  # a name or path as written, or one name per label column, from the root down


# ── The two forms ────────────────────────────────────────────────────────────────────────────────────────────────────


class OnePathRows:
    """Rows with one label each. A text may have several rows, with different labels."""

    problem_type = SINGLE_LABEL

    def read(self, table: pd.DataFrame, columns: list[str], delimiter: str | None) -> list[tuple[Label, ...]]:
        """Return the label of each row, as a tuple of one: the text of a column, or the path from the root in several."""
        paths: list[Any] = list(zip(*(map(label_text, table[column]) for column in columns), strict=True))
        refuse_rows(table, columns, map(label_problem, paths))
        return [(tuple(filter(None, path)),) if len(columns) > 1 else path for path in paths]

    def merge_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows as they are: a text may have several rows."""
        return rows

    def describe(self, rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
        """Count the rows, duplicates, conflicting labels and classes of a split, from which rows were ``dropped``.

        ``accuracy_ceiling`` is the accuracy on rows labelled with a leaf, if each text's most common leaf is predicted.
        """
        counts = count_labels(rows)
        several = (
            counts[counts.duplicated("text_id", keep=False)].groupby("text_id").agg({"nodes": list, "size": "sum"})
        )
        on_one_path = several["nodes"].map(lambda nodes: len(taxonomy.deepest(chain(*nodes))) == 1)
        conflicting = several[~on_one_path.astype(bool)]
        leaves = counts[counts["nodes"].map(max) < taxonomy.num_leaves]
        correct = int(leaves.groupby("text_id")["size"].max().sum())
        return {
            "rows": len(rows),
            "dropped_rows": dropped,
            "normalised_duplicates": len(rows) - int(counts["text_id"].nunique()),
            "conflicting_texts": len(conflicting),
            "conflicting_rows": int(conflicting["size"].sum()),
            "accuracy_ceiling": correct / int(leaves["size"].sum()) if len(leaves) else 1.0,
            "classes": count_by_level(taxonomy, texts_by_node(rows["nodes"], taxonomy)),
        }

    def hold_out(
        self, rows: pd.DataFrame, taxonomy: Taxonomy, count: int, split: str, seed: int, rng: np.random.Generator
    ) -> pd.Index:
        """Return the ids of about ``count`` texts to split off, in proportion to their most common labels.

        Texts of rows that are ``trained``, by an earlier run, stay.
        """
        sizes = count_labels(rows).sort_values(["text_id", "size", "nodes"], ascending=[True, False, True])
        label_of = sizes.drop_duplicates("text_id").set_index("text_id")["nodes"]  # most common, smallest of ties
        strata = np.array([*chain(*label_of)])
        trained = rows.groupby("text_id")["trained"].any()[label_of.index].to_numpy()
        return label_of.index[_sample(strata, count, split, rng, trained)]


class ManyNodesRows:
    """Rows with any number of labels each. A text has one row in a split."""

    problem_type = MULTI_LABEL

    def read(self, table: pd.DataFrame, columns: list[str], delimiter: str | None) -> list[tuple[Label, ...]]:
        """Return the labels of each row: items of a list, parts of a delimited text, or names of the columns that hold 1.

        A missing list, or an empty cell, means no labels.
        """
        if len(columns) > 1:
            problem = "the cell is neither 0 nor 1, as in several label columns; join columns of names to one"
            for name in columns:
                refuse_rows(table, [name], (problem if read_indicator(cell) is None else None for cell in table[name]))
            names = [to_nfc(name.strip()) for name in columns]
            cells = zip(*(map(read_indicator, table[name]) for name in columns), strict=True)
            return [tuple(compress(names, row)) for row in cells]
        rows: list[Any] = []
        for cell in table[columns[0]]:
            rows.append(tuple(label for label in map(label_text, split_cell(cell, delimiter)) if label != ""))
        refuse_rows(table, columns, (NO_NAME if None in row else None for row in rows))
        return rows

    def merge_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Merge the rows of a text within a split into the first of them, with the labels of all."""
        merged: dict[tuple, set[int]] = {}
        keys = ["split", "text_id"]
        for *key, nodes in rows[[*keys, "nodes"]].itertuples(index=False):
            merged.setdefault(tuple(key), set()).update(nodes)
        rows = rows.drop_duplicates(keys, ignore_index=True)
        return rows.assign(nodes=pd.Series([tuple(sorted(nodes)) for nodes in merged.values()], dtype=object))

    def describe(self, rows: pd.DataFrame, taxonomy: Taxonomy, dropped: int) -> dict:
        """Count the texts, labels and classes of a split, from which rows were ``dropped``.

        ``classes`` counts the texts with a node or one below. All other counts are of a text's deepest labels.
        """
        deepest = [taxonomy.deepest(nodes) for nodes in rows["nodes"]]
        pairs = Counter(chain.from_iterable(combinations(nodes, 2) for nodes in deepest)).most_common(MAX_PAIRS)
        names = taxonomy.labels
        return {
            "rows": len(rows),
            "dropped_rows": dropped,
            "labels_per_text": sum(map(len, deepest)) / len(rows),
            "texts_without_labels": sum(not nodes for nodes in deepest),
            "pairs": [{"labels": [names[i], names[j]], "texts": count} for (i, j), count in pairs],
            "classes": count_by_level(taxonomy, texts_by_node(rows["nodes"], taxonomy)),
        }

    def hold_out(
        self, rows: pd.DataFrame, taxonomy: Taxonomy, count: int, split: str, seed: int, rng: np.random.Generator
    ) -> pd.Index:
        """Return the ids of about ``count`` texts to split off, in proportion to all their labels; see `OnePathRows`."""
        labels, is_trained = ManyNodes(taxonomy).targets([*rows["nodes"]]).numpy(), rows["trained"].to_numpy()
        return pd.Index(rows["text_id"].iloc[_sample_by_labels(labels, count, split, seed, is_trained)])


RowForm = OnePathRows | ManyNodesRows


# ── Cells ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def split_cell(cell: Any, delimiter: str | None) -> list[Any]:
    """Return the labels in a cell. A delimited text that is a written list stays whole, for `resolve_labels`."""
    if isinstance(cell, str) and delimiter is not None and not is_written_list(cell, delimiter):
        return cell.split(delimiter)
    return cell if isinstance(cell, list) else [cell]


def read_indicator(cell: Any) -> int | None:
    """Return 0 or 1, or None for anything else."""
    return ZERO_OR_ONE.get(str(cell).strip().casefold())


def label_text(value: Any) -> str | None:
    """Return a label as text, "" if it is missing, or None if it is neither text nor a whole number."""
    # JSON writers store integers as floats if the column has missing values
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    return to_nfc(str(value).strip())


def is_written_list(label: Label, delimiter: str | None) -> bool:
    """Return whether a label is a list written as text. ``[other]``, one bare name in brackets, is a name."""
    return isinstance(label, str) and bool(WRITTEN_LIST.fullmatch(label.strip().replace(delimiter or ",", ",")))


def label_problem(path: tuple[Any, ...]) -> str | None:
    """Return what is wrong with a row's labels, one per column, or None."""
    if None in path:
        return NO_NAME
    if not any(path):
        return f"the label is missing (texts without labels need --problem_type {MULTI_LABEL})"
    if "" in path and any(path[path.index("") :]):
        return "a label column is empty, although the column of a deeper level is filled"
    return None


def count_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Count the rows of each text with each of its labels, in columns ``text_id``, ``nodes`` and ``size``."""
    return rows.groupby(["text_id", "nodes"], as_index=False).size()


# ── Stratified samples of texts ──────────────────────────────────────────────────────────────────────────────────────


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

    ``labels`` are of `ManyNodes.targets`, (N, num_nodes).
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

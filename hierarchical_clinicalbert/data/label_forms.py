"""What differs between the two forms of label before training: reading, repeated texts, counts and split-off rows.

`OnePathRows` and `ManyNodesRows` have the same methods. `data.sources` chooses between them. In rows, ``nodes`` are tuples of
node ids: with one path a text, of one id.
"""

import ast
from itertools import chain, compress
from typing import Any

import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from decisions_hierarchical import ManyNodes
from hierarchical_clinicalbert.data.tables import refuse_rows
from taxonomy_hierarchical import Taxonomy, to_nfc

ZERO_OR_ONE = {**dict.fromkeys(("0", "0.0", "false"), 0), **dict.fromkeys(("1", "1.0", "true"), 1)}
NO_NAME = "the label is neither text nor a whole number"
WRITTEN_LIST = "the label is a list written as text: save the data as .jsonl or .parquet, or join the labels and give --label_delimiter"

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

    def describe(self, rows: pd.DataFrame, taxonomy: Taxonomy) -> dict:
        """Count the duplicates and conflicting labels of a split.

        ``accuracy_ceiling`` is the accuracy on rows labelled with a leaf, if each text's most common leaf is predicted.
        """
        counts = count_labels(rows)
        of_texts = counts.groupby("text_id").agg({"nodes": list, "size": "sum"})
        conflicting = of_texts[[len(taxonomy.deepest(chain(*nodes))) > 1 for nodes in of_texts["nodes"]]]
        leaves = counts[counts["nodes"].map(max) < taxonomy.num_leaves]
        correct = int(leaves.groupby("text_id")["size"].max().sum())
        return {
            "normalised_duplicates": len(rows) - int(counts["text_id"].nunique()),
            "conflicting_texts": len(conflicting),
            "conflicting_rows": int(conflicting["size"].sum()),
            "accuracy_ceiling": correct / int(leaves["size"].sum()) if len(leaves) else 1.0,
        }

    def hold_out(
        self, rows: pd.DataFrame, taxonomy: Taxonomy, count: int, seed: int, rng: np.random.Generator
    ) -> pd.Series:
        """Return the ids of about ``count`` texts to split off, in proportion to their most common labels."""
        sizes = count_labels(rows).sort_values(["text_id", "size", "nodes"], ascending=[True, False, True])
        texts = sizes.drop_duplicates("text_id")  # with the most common label, the smallest of ties
        return texts["text_id"][_sample(np.array([*chain(*texts["nodes"])]), count, rng)]


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
            parts = cell.split(delimiter) if isinstance(cell, str) and delimiter is not None else cell
            labels = map(label_text, parts if isinstance(parts, list) else [parts])
            rows.append(tuple(label for label in labels if label != ""))
        refuse_rows(table, columns, (NO_NAME if None in row else None for row in rows))
        return rows

    def merge_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Merge the rows of a text within a split into the first of them, with the labels of all."""
        keys = ["split", "text_id"]
        merged = rows.groupby(keys, sort=False)["nodes"].sum().map(lambda nodes: tuple(sorted({*nodes})))
        return rows.drop_duplicates(keys, ignore_index=True).assign(nodes=merged.array)

    def describe(self, rows: pd.DataFrame, taxonomy: Taxonomy) -> dict:
        """Count the labels of a split. Of a text's labels, only the deepest count."""
        sizes = [len(taxonomy.deepest(nodes)) for nodes in rows["nodes"]]
        return {"labels_per_text": sum(sizes) / len(rows), "texts_without_labels": sizes.count(0)}

    def hold_out(
        self, rows: pd.DataFrame, taxonomy: Taxonomy, count: int, seed: int, rng: np.random.Generator
    ) -> pd.Series:
        """Return the ids of about ``count`` texts to split off, in proportion to all their labels."""
        labels = ManyNodes(taxonomy).targets([*rows["nodes"]]).numpy()
        return rows["text_id"].iloc[_sample_by_labels(labels, count, seed)]


RowForm = OnePathRows | ManyNodesRows


# ── Cells ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_written_list(cell: Any) -> bool:
    """Return whether a cell is a list written as text. ``[other]``, one bare name in brackets, is a name."""
    if not isinstance(cell, str) or not cell.strip().startswith(("[", "(", "{")):
        return False
    try:
        return isinstance(ast.literal_eval(cell.strip()), (list, tuple, set))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False


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


def _sample(strata: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample ``count`` texts in proportion to their ``strata`` (N,), as a mask (N,). Each stratum keeps a text for training.

    The method is systematic sampling along the texts, sorted by stratum (Cochran, Sampling Techniques, 1977, chapter 8). If
    at most half of the eligible texts are sampled, a text is left in each stratum of two or more. If more are sampled, the
    first text of each stratum is excluded.
    """
    # scikit-learn's StratifiedGroupKFold loops over the groups and makes equal folds only. Its train_test_split
    # refuses a class with a single text, and fewer held-out texts than classes.
    order = _shuffled_strata(strata, rng)
    eligible = (np.bincount(strata) > 1)[strata[order]]  # enough if at most every second text is drawn
    if 2 * count > eligible.sum():
        eligible = np.diff(strata[order], prepend=-1) == 0
    mask = np.zeros(len(strata), dtype=bool)
    mask[order] = _systematic(eligible, count)
    return mask


def _shuffled_strata(strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of texts in which the texts of a stratum follow each other."""
    order = rng.permutation(len(strata))
    rank = rng.permutation(strata.max(initial=0) + 1)
    return order[np.argsort(rank[strata[order]], kind="stable")]


def _systematic(eligible: np.ndarray, count: int) -> np.ndarray:
    """Sample ``count`` of the eligible texts at equal distances, or all, as a mask. Both masks are in the order of the strata."""
    step = min(1.0, count / max(1, eligible.sum()))
    return np.diff(np.floor(np.cumsum(eligible) * step + 0.5), prepend=0) > 0


def _sample_by_labels(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the indices of about ``count`` texts, in proportion to their labels. One text stays.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011, "On the Stratification of Multi-Label Data") assigns
    the texts of the rarest remaining class first. It samples no text of a class with less than half a text to sample. So
    texts with such a rare class are sampled systematically, by their rarest class. A class with one text keeps it for training.

    ``labels`` are of `ManyNodes.targets`, (N, num_nodes).
    """
    num_texts, count = len(labels), min(count, len(labels) - 1)
    if count < 1:
        return np.arange(0)
    # ── Texts with a rare class ──────────────────────────────────────────────────────────────────────────────────────
    frequency = labels.sum(axis=0, dtype=np.int32)
    rarest, least = np.empty((2, num_texts), dtype=np.int64)
    for start in range(0, num_texts, 1024):  # all rows at once would take several times the memory of the labels
        rows = slice(start, start + 1024)
        of_labels = np.where(labels[rows] == 1, frequency, np.int32(num_texts))
        rarest[rows], least[rows] = of_labels.argmin(axis=1), of_labels.min(axis=1)
    is_rare = least < num_texts / count / 2
    rare, others = np.flatnonzero(is_rare), np.flatnonzero(~is_rare)
    rare = rare[_shuffled_strata(rarest[rare], np.random.default_rng(seed))]
    sampled = rare[_systematic(frequency[rarest[rare]] > 1, round(count * is_rare.mean()))]

    # ── All others ───────────────────────────────────────────────────────────────────────────────────────────────────
    if (num_others := min(count - len(sampled), len(others))) == len(others):
        sampled = np.concatenate([sampled, others])
    elif num_others:
        splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=num_others, random_state=seed)
        of_others = labels[others]
        occurring = of_others.any(axis=0)  # the splitter sums all columns once per class
        occurring[:2] = True  # it refuses a single column
        sampled = np.concatenate([sampled, others[next(splitter.split(others, of_others[:, occurring]))[1]]])
    if not len(sampled):  # the splitter returns about as many as requested, possibly none
        sampled = np.random.default_rng(seed).integers(num_texts, size=1)
    return sampled

"""What differs between the two forms of label before training: reading, repeated texts, counts and
split-off rows.

`OnePathRows` and `ManyNodesRows` have the same methods. `data.sources` chooses between them. In
rows, ``nodes`` are tuples of node ids: with one path a text, of one id.
"""

import ast
from collections import Counter
from itertools import chain, compress
from typing import Any

import numpy as np
import pandas as pd

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from hierarchical_clinicalbert.data.tables import refuse_rows
from taxonomy_hierarchical import Taxonomy, normalise, to_nfc

ZERO_OR_ONE = {**dict.fromkeys(("0", "0.0", "false"), 0), **dict.fromkeys(("1", "1.0", "true"), 1)}
NO_NAME = "the label is neither text nor a whole number"
WRITTEN_LIST = (
    "the label is a list written as text: save the data as .jsonl or .parquet, or join the "
    "labels and give --label_delimiter"
)

# a name or path as written, or one name per label column, from the root down
Label = str | tuple[str, ...]


# ── The two forms ─────────────────────────────────────────────────────────────────────────────────


class OnePathRows:
    """Rows with one label each. A text may have several rows, with different labels."""

    problem_type = SINGLE_LABEL

    def read(
        self, table: pd.DataFrame, columns: list[str], delimiter: str | None
    ) -> list[tuple[Label, ...]]:
        """Return the label of each row, as a tuple of one: the text of a column, or the path from
        the root in several.
        """
        paths: list[Any] = list(
            zip(*(map(label_text, table[column]) for column in columns), strict=True)
        )
        refuse_rows(table, columns, map(label_problem, paths))
        return [(tuple(filter(None, path)),) if len(columns) > 1 else path for path in paths]

    def merge_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows as they are: a text may have several rows."""
        return rows

    def describe(self, rows: pd.DataFrame, taxonomy: Taxonomy) -> dict:
        """Count the duplicates and conflicting labels of a split.

        ``accuracy_ceiling`` is the accuracy on rows labelled with a leaf, if each text's most
        common leaf is predicted.
        """
        counts = count_labels(rows)
        of_texts = counts.groupby("text_id").agg({"nodes": list, "size": "sum"})
        conflicting = of_texts[
            [len(taxonomy.deepest(chain(*nodes))) > 1 for nodes in of_texts["nodes"]]
        ]
        leaves = counts[counts["nodes"].map(max) < taxonomy.num_leaves]
        correct = int(leaves.groupby("text_id")["size"].max().sum())
        return {
            "normalised_duplicates": len(rows) - int(counts["text_id"].nunique()),
            "conflicting_texts": len(conflicting),
            "conflicting_rows": int(conflicting["size"].sum()),
            "accuracy_ceiling": correct / int(leaves["size"].sum()) if len(leaves) else 1.0,
        }

    def hold_out(
        self, rows: pd.DataFrame, taxonomy: Taxonomy, count: int, rng: np.random.Generator
    ) -> pd.Series:
        """Return the ids of about ``count`` texts to split off, in proportion to their most common
        labels.
        """
        sizes = count_labels(rows).sort_values(
            ["text_id", "size", "nodes"], ascending=[True, False, True]
        )
        texts = sizes.drop_duplicates("text_id")  # with the most common label, the smallest of ties
        strata = np.array([*chain(*texts["nodes"])])
        order = rng.permutation(len(strata))
        rank = rng.permutation(strata.max(initial=0) + 1)
        order = order[np.argsort(rank[strata[order]], kind="stable")]
        return texts["text_id"].iloc[_sample(strata, np.bincount(strata)[strata], order, count)]


class ManyNodesRows:
    """Rows with any number of labels each. A text has one row in a split."""

    problem_type = MULTI_LABEL

    def read(
        self, table: pd.DataFrame, columns: list[str], delimiter: str | None
    ) -> list[tuple[Label, ...]]:
        """Return the labels of each row: items of a list, parts of a delimited text, or names of
        the columns that hold 1.

        A missing list, or an empty cell, means no labels.
        """
        if len(columns) > 1:
            problem = (
                "the cell is neither 0 nor 1, as in several label columns; join columns of "
                "names to one"
            )
            for name in columns:
                refuse_rows(
                    table,
                    [name],
                    (problem if read_indicator(cell) is None else None for cell in table[name]),
                )
            names = [to_nfc(name.strip()) for name in columns]
            cells = zip(*(map(read_indicator, table[name]) for name in columns), strict=True)
            return [tuple(compress(names, row)) for row in cells]
        rows: list[Any] = []
        for cell in table[columns[0]]:
            parts = (
                cell.split(delimiter) if isinstance(cell, str) and delimiter is not None else cell
            )
            labels = map(label_text, parts if isinstance(parts, list) else [parts])
            rows.append(tuple(label for label in labels if label != ""))
        refuse_rows(table, columns, (NO_NAME if None in row else None for row in rows))
        return rows

    def merge_repeats(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Merge the rows of a text within a split into the first of them, with the labels of
        all.
        """
        keys = ["split", "text_id"]
        merged = (
            rows.groupby(keys, sort=False)["nodes"].sum().map(lambda nodes: tuple(sorted({*nodes})))
        )
        return rows.drop_duplicates(keys, ignore_index=True).assign(nodes=merged.array)

    def describe(self, rows: pd.DataFrame, taxonomy: Taxonomy) -> dict:
        """Count the labels of a split. Of a text's labels, only the deepest count."""
        sizes = [len(taxonomy.deepest(nodes)) for nodes in rows["nodes"]]
        return {"labels_per_text": sum(sizes) / len(rows), "texts_without_labels": sizes.count(0)}

    def hold_out(
        self, rows: pd.DataFrame, taxonomy: Taxonomy, count: int, rng: np.random.Generator
    ) -> pd.Series:
        """Return the ids of about ``count`` texts to split off, in proportion to their rarest
        nodes, and then to all others.
        """
        closed = [taxonomy.with_ancestors(nodes) or {taxonomy.num_nodes} for nodes in rows["nodes"]]
        frequency = Counter(chain.from_iterable(closed))
        keys = [sorted(nodes, key=lambda node: (frequency[node], node)) for nodes in closed]
        order = sorted(rng.permutation(len(keys)).tolist(), key=keys.__getitem__)
        strata, num_texts = np.array([(key[0], frequency[key[0]]) for key in keys]).T
        return rows["text_id"].iloc[_sample(strata, num_texts, np.array(order), count)]


RowForm = OnePathRows | ManyNodesRows


# ── Cells ─────────────────────────────────────────────────────────────────────────────────────────


def is_written_list(cell: Any) -> bool:
    """Return whether a cell is a list written as text.

    ``[other]``, one bare name in brackets, is a name.
    """
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
    """Return a label as text, "" if it is missing or invisible.

    None: it is neither text nor a whole number.
    """
    # JSON writers store integers as floats if the column has missing values
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    label = to_nfc(str(value).strip())
    return label if normalise(label) else ""


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
    """Count the rows of each text with each of its labels, in columns ``text_id``, ``nodes`` and
    ``size``.
    """
    return rows.groupby(["text_id", "nodes"], as_index=False).size()


# ── Stratified samples of texts ───────────────────────────────────────────────────────────────────


def _sample(strata: np.ndarray, num_texts: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Sample ``count`` texts, or fewer, in proportion to their ``strata``, and return their
    indices. A class keeps a text.

    The method is systematic sampling along the texts in an ``order`` in which those of a stratum
    follow each other (Cochran, Sampling Techniques, 1977, chapter 8). If at most half of the
    eligible texts are sampled, a text is left in each stratum of two or more. If more are sampled,
    the first text is excluded of each stratum that has all texts of its class.

    Args:
        strata: of each text, the class whose stratum it is in, (N,).
        num_texts: of each text, how many texts have this class, also in other strata, (N,).
    """
    # scikit-learn's StratifiedGroupKFold loops over the groups and makes equal folds only. Its
    # train_test_split refuses a class with a single text, and fewer held-out texts than classes.
    eligible = num_texts[order] > 1  # enough if at most every second text is drawn
    if 2 * count > eligible.sum():
        is_first = np.diff(strata[order], prepend=-1) != 0
        eligible = ~(is_first & (num_texts == np.bincount(strata)[strata])[order])
    step = min(1.0, count / max(1, eligible.sum()))
    return order[np.diff(np.floor(np.cumsum(eligible) * step + 0.5), prepend=0) > 0]

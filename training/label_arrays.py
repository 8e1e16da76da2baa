"""Convert labels to arrays, and count the outcomes of decisions in multi-label data.

In multi-label data, a text with a node has all its ancestors. Each node is a binary decision given its parent. The decision is
open if the node's label is known, and the text has the parent or the node is a root.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from pyarrow.types import is_nested

from modeling_hierarchical import IGNORED_LABEL, TreeSigmoid
from taxonomy_hierarchical import Taxonomy


def multi_hot(taxonomy: Taxonomy, labels: Sequence[Sequence[int]], incomplete: bool = False) -> np.ndarray:
    """Return the labels of texts as an array (num_texts, num_nodes) of int8: 1 for a text's nodes and their ancestors.

    If ``incomplete``, all nodes below a text's deepest nodes are -100, unknown.
    """
    array = np.zeros((len(labels), taxonomy.num_nodes), dtype=np.int8)
    for row, nodes in zip(array, labels, strict=True):
        row[list(taxonomy.with_ancestors(nodes))] = 1
        if incomplete:
            for node in taxonomy.deepest(nodes):
                row[taxonomy.nodes_below[node]] = IGNORED_LABEL
    return array


def label_arrays(rows: Dataset) -> np.ndarray:
    """Return the column ``labels`` of tokenized rows: node ids (num_rows,), or arrays (num_rows, num_nodes) of int8."""
    column = rows.with_format("arrow")[:].column("labels")
    if not is_nested(column.type):
        return np.array(column.combine_chunks())
    # one chunk at a time: a list array of Arrow holds at most 2^31 values, and rows times nodes may be more
    return np.concatenate([np.asarray(chunk.flatten()) for chunk in column.chunks]).reshape(len(rows), -1)


def open_decisions(taxonomy: Taxonomy, labels: np.ndarray) -> np.ndarray:
    """Return which decisions are open for each row, (num_rows, num_nodes) of bool, from the labels of `multi_hot`."""
    return TreeSigmoid(taxonomy).open_decisions(torch.from_numpy(labels)).numpy()


def open_counts(taxonomy: Taxonomy, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count each node's positive rows of `multi_hot`, and the rows in which its decision is open: (num_nodes,) each."""
    decisions = TreeSigmoid(taxonomy)
    positive, total = np.zeros((2, taxonomy.num_nodes), dtype=np.int64)
    # all rows at once would take several times the memory of the labels
    for rows in torch.from_numpy(labels).split(1024):
        is_open = decisions.open_decisions(rows)
        positive += ((rows == 1) & is_open).sum(0).numpy()
        total += is_open.sum(0).numpy()
    return positive, total


def prior_log_odds(taxonomy: Taxonomy, labels: np.ndarray) -> np.ndarray:
    """Return each node's log-odds given its parent, smoothed by half a row of each outcome: (num_nodes,).

    Biases are initialised to these log-odds. From zero, training would first have to learn these frequencies.
    """
    positive, total = open_counts(taxonomy, labels)
    return np.log((positive + 0.5) / (total - positive + 0.5))

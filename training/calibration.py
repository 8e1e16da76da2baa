"""Probabilities that mean what they say, and thresholds for answers with a guarantee; both fitted on validation rows.

Worth knowing:

1. One temperature a decision (Guo et al., 2017), fitted by scipy on the rows that this decision was taken for. Decisions
   with fewer than 50 such rows share one that is fitted on all decisions together; with fewer than 50 in all it is 1.
2. All is computed from leaf logits. A node's log-probability is the logsumexp of its leaves', and a decision's scores are
   log P(child) - log P(parent), up to a constant that its softmax drops.
3. The thresholds are quantiles of the nonconformity scores of `pipeline_hierarchical`, computed with the temperatures in
   place. Split conformal prediction (Vovk et al., 2005): the k-th smallest of n scores, k = ⌈(n + 1) · coverage⌉, holds a
   new document's score with at least that probability, if it comes from where the validation rows come from.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

from configuration_hierarchical import Taxonomy
from pipeline_hierarchical import conformal_answer, conformal_threshold, nonconformity
from training.metrics import labelled_documents, node_paths

FEWEST_ROWS = 50
RANGE = (0.05, 20.0)  # of temperatures


def node_log_probs(taxonomy: Taxonomy, logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of all nodes, (num_documents, num_nodes) float64, from leaf logits (num_documents, num_leaves)."""
    leaves = log_softmax(logits.astype(np.float64), axis=1)
    inner = [logsumexp(leaves[:, under], axis=1) for under in leaves_under(taxonomy)[taxonomy.num_leaves :]]
    return np.column_stack([leaves, *inner])


def leaves_under(taxonomy: Taxonomy) -> list[list[int]]:
    """The leaves at or below each node."""
    under: list[list[int]] = [[] for _ in range(taxonomy.num_nodes)]
    for leaf in range(taxonomy.num_leaves):
        for node in taxonomy.path(leaf):
            under[node].append(leaf)
    return under


def decisions(taxonomy: Taxonomy) -> list[list[int]]:
    """The nodes among which each decision is taken: the roots, then the children of each inner node."""
    return [taxonomy.children(parent) for parent in (-1, *range(taxonomy.num_leaves, taxonomy.num_nodes))]


def fit_temperatures(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """The temperature of each decision that gives the labels the highest likelihood.

    Args:
        logits: (num_documents, num_leaves), of a model whose temperatures are 1.
        labels: (num_documents,), node ids or -100.

    Returns:
        One number for the roots and for the children of each inner node, between 0.05 and 20.

    Raises:
        InputError: arrays of other shapes, unknown label ids, logits that are not finite.
    """
    logits, labels = labelled_documents(taxonomy, logits, labels)
    log_probs, ancestors = node_log_probs(taxonomy, logits), node_paths(taxonomy)
    taken = []
    for nodes in decisions(taxonomy):
        level = taxonomy.levels[nodes[0]] - 1
        right = ancestors[labels, level]  # the node of each label's path that stands where this decision is taken
        rows = np.isin(right, nodes) if len(nodes) > 1 else np.zeros(len(labels), dtype=bool)
        taken.append((log_probs[rows][:, nodes], np.searchsorted(nodes, right[rows])))
    enough = sum(len(right) for _, right in taken) >= FEWEST_ROWS
    shared = best_temperature([(scores, right) for scores, right in taken if len(right)]) if enough else 1.0
    return [best_temperature([(scores, right)]) if len(right) >= FEWEST_ROWS else shared for scores, right in taken]


def best_temperature(taken: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The temperature with the lowest negative log-likelihood over decisions' (scores, index of the right child)."""

    def loss(log_temperature: float) -> float:
        scaled = [(log_softmax(scores / math.exp(log_temperature), axis=1), right) for scores, right in taken]
        return -sum(scores[np.arange(len(right)), right].sum() for scores, right in scaled)

    found = minimize_scalar(loss, bounds=tuple(map(math.log, RANGE)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def apply_temperatures(taxonomy: Taxonomy, logits: np.ndarray, temperatures: list[float]) -> np.ndarray:
    """The leaf log-probabilities, (num_documents, num_leaves) float64, that the model gives with these temperatures.

    Args:
        logits: (num_documents, num_leaves), of a model whose temperatures are 1.
    """
    log_probs = node_log_probs(taxonomy, logits)
    conditional = np.zeros_like(log_probs)
    for nodes, temperature in zip(decisions(taxonomy), temperatures, strict=True):
        conditional[:, nodes] = log_softmax(log_probs[:, nodes] / temperature, axis=1)
    return np.column_stack([conditional[:, taxonomy.path(leaf)].sum(axis=1) for leaf in range(taxonomy.num_leaves)])


def fit_thresholds(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray) -> list[float | None] | None:
    """Conformal thresholds for coverages of 0.001 … 0.999, as `HierarchicalConfig` keeps them.

    Args:
        logits: (num_documents, num_leaves), of the calibrated model.
        labels: (num_documents,), node ids or -100; only documents labelled with a leaf take part.

    Returns:
        None where no document is labelled with a leaf. None in place of a threshold that so few documents cannot give.
    """
    scores = nonconformity_scores(taxonomy, logits, labels)
    if not len(scores):
        return None
    ranks = [-(-(len(scores) + 1) * place // 1000) for place in range(1, 1000)]  # ⌈(n + 1) · coverage⌉ without rounding
    return [float(scores[rank - 1]) if rank <= len(scores) else None for rank in ranks]


def nonconformity_scores(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The scores of the documents labelled with a leaf, in ascending order."""
    logits, labels = labelled_documents(taxonomy, logits, labels)
    is_leaf = labels < taxonomy.num_leaves
    probabilities = np.exp(node_log_probs(taxonomy, logits[is_leaf])).tolist()
    return np.sort(
        [nonconformity(taxonomy, nodes, label) for nodes, label in zip(probabilities, labels[is_leaf], strict=True)]
    )


def conformal_scores(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, thresholds: list[float | None], coverage: float
) -> dict[str, float]:
    """How answers for a coverage fare on documents labelled with a leaf.

    Returns:
        ``coverage``, the share whose answer holds the label; ``leaves`` and ``nodes``, the mean numbers of them in an
        answer; ``single_leaf``, the share of answers that are one leaf. Empty without such documents.
    """
    logits, labels = labelled_documents(taxonomy, logits, labels)
    is_leaf = labels < taxonomy.num_leaves
    if not is_leaf.any():
        return {}
    threshold, under = conformal_threshold(thresholds, coverage), leaves_under(taxonomy)
    probabilities = np.exp(node_log_probs(taxonomy, logits[is_leaf])).tolist()
    answers = [conformal_answer(taxonomy, nodes, threshold) for nodes in probabilities]
    held = [{leaf for node in answer for leaf in under[node]} for answer in answers]
    return {
        "coverage": float(np.mean([label in leaves for label, leaves in zip(labels[is_leaf], held, strict=True)])),
        "leaves": float(np.mean([len(leaves) for leaves in held])),
        "nodes": float(np.mean([len(answer) for answer in answers])),
        "single_leaf": float(np.mean([len(leaves) == 1 for leaves in held])),
    }

"""Fit temperatures and conformal thresholds on the validation rows.

Worth knowing:

1. One temperature a decision (Guo et al., 2017), fitted by scipy on the rows that this decision was taken for. Few rows, or
   rows that were all decided rightly, say little about it: the maximum of their likelihood may be any number, or lie at a
   temperature of 0. So all is fitted with a prior, in the parameters in which the problem is convex: with β = 1 / T, a
   decision is softmax(β · scores + γ · words). First β and γ of all decisions together, normally distributed about 1 and 0;
   then each decision's own β, about the common one. One standard deviation, 0.25, serves all three; it was chosen by
   `benchmarks/studies/calibration.py`. Biases of classes beside the temperatures (Alexandari et al., 2020), with the same prior, were
   tried and left out: on other rows the log loss of OHSUMED hardly changed, that of Medical Abstracts, whose shares of
   classes differ between training and validation, rose, and hierarchical F1 fell on both.
2. All is computed from leaf logits. A node's log-probability is the logsumexp of its leaves', and a decision's scores are
   log P(child) - log P(parent), up to a constant that its softmax drops. Those of the lexical head, times its weight, are
   added decision by decision. Added to the leaves before all else, its scores reach the upper decisions through the leaves
   alone, with another weight than these need: on OHSUMED that cost a point of level-1 accuracy (`benchmarks/studies/words.py`).
3. The thresholds are quantiles of the nonconformity scores of `pipeline_hierarchical`. Split conformal prediction (Vovk et
   al., 2005): the k-th smallest of n scores, k = ⌈(n + 1) · coverage⌉, holds a new document's score with at least that
   probability, if it comes from where the validation rows come from. That takes scores of a model that was not fitted to
   these rows: each fifth of them is scored by a calibration on the other four (cross-conformal prediction: Vovk, 2015).
   It also takes scores that are exchangeable, which those of several rows of one text are not: see `nonconformity_scores`.
   That the same rows chose the checkpoint is not corrected; evaluation measures the coverage on the test rows.
   A row labelled with an inner node counts as held where every leaf below is: leaving such rows out would choose rows by their
   label, and the answers of others would hold less than was asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp
from sklearn.model_selection import GroupKFold

from evaluation.metrics import UNLABELLED, labelled_documents
from modeling_hierarchical import TreeSoftmax
from pipeline_hierarchical import conformal_answer, conformal_threshold, nonconformity
from taxonomy_hierarchical import Taxonomy

PRIOR = 0.25  # the standard deviation of what is fitted
RANGE = (0.05, 20.0)  # of 1 / temperature
FOLDS = 5


@dataclass(frozen=True)
class Calibration:
    """What is fitted on validation rows.

    Attributes:
        lexical_weight, temperatures: as in `HierarchicalConfig`; a weight of 0 is no lexical head.
    """

    lexical_weight: float
    temperatures: list[float]

    def apply(self, taxonomy: Taxonomy, logits: np.ndarray, lexical_scores: np.ndarray | None) -> np.ndarray:
        """Return the leaf log-probabilities of the model that is served, (num_documents, num_leaves) float64.

        Args:
            logits: (num_documents, num_leaves), of the encoder, of temperatures 1.
            lexical_scores: (num_documents, num_leaves), or None where there is no lexical head.
        """
        scores = node_log_probs(taxonomy, logits)
        if lexical_scores is not None:
            scores = scores + self.lexical_weight * node_log_probs(taxonomy, lexical_scores)
        return apply_temperatures(taxonomy, scores, self.temperatures)


def fit_calibration(
    taxonomy: Taxonomy,
    logits: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    prior: float = PRIOR,
) -> Calibration:
    """Return the MAP estimate of the lexical head's weight and of the temperatures.

    Args:
        logits, lexical_scores: as for `Calibration.apply`.
        labels: (num_documents,), node ids or -100.
        prior: standard deviation of the prior; infinite, the likelihood of the labels alone counts.

    Returns:
        A weight of 0 or more, and a temperature, between 0.05 and 20, for the roots and for the children of each inner node.

    Raises:
        InputError: arrays of other shapes, unknown label ids, logits that are not finite.
    """
    labelled_documents(taxonomy, logits, labels)  # raises
    experts = [node_log_probs(taxonomy, scores) for scores in (logits, lexical_scores) if scores is not None]
    taken = decisions_taken(taxonomy, np.stack(experts, axis=2), labels)  # (documents, children, experts)
    mean, bounds = np.array([1.0, 0.0])[: len(experts)], [RANGE, (0.0, RANGE[1])][: len(experts)]

    def neg_log_posterior(factors: np.ndarray) -> float:
        loss = sum(negative_log_likelihood(scores @ factors, correct) for scores, correct in taken)
        return loss + ((factors - mean) ** 2).sum() / (2 * prior**2)

    factors = minimize(neg_log_posterior, x0=mean, bounds=bounds, method="L-BFGS-B").x
    common, weights = float(factors[0]), factors / factors[0]
    return Calibration(
        lexical_weight=float(weights[1]) if len(experts) == 2 else 0.0,
        temperatures=[1 / inverse_temperature(scores @ weights, correct, prior, common) for scores, correct in taken],
    )


def held_out(
    taxonomy: Taxonomy, logits: np.ndarray, lexical_scores: np.ndarray | None, labels: np.ndarray, texts: np.ndarray
) -> np.ndarray:
    """Cross-validate: calibrate each fifth of the texts by a fit on the others.

    Returns leaf log-probabilities, (num_documents, num_leaves).

    Args:
        logits, lexical_scores, labels: as for `fit_calibration`.
        texts: (num_documents,), the same number for the same text.
    """
    calibrated = np.empty(logits.shape)
    folds = min(FOLDS, len(np.unique(texts)))
    if folds == 1:
        return fit_calibration(taxonomy, logits, lexical_scores, labels).apply(taxonomy, logits, lexical_scores)
    for known, unknown in GroupKFold(folds, shuffle=True, random_state=0).split(logits, groups=texts):
        scores = (None, None) if lexical_scores is None else (lexical_scores[known], lexical_scores[unknown])
        calibration = fit_calibration(taxonomy, logits[known], scores[0], labels[known])
        calibrated[unknown] = calibration.apply(taxonomy, logits[unknown], scores[1])
    return calibrated


def inverse_temperature(scores: np.ndarray, correct: np.ndarray, prior: float, common: float = 1.0) -> float:
    """Return the MAP estimate of one decision's inverse temperature.

    Args:
        scores: (num_documents, num_children).
        correct: (num_documents,), the index of the correct child.
        prior: standard deviation of the normal prior; infinite for none.
        common: mean of the prior.
    """

    def neg_log_posterior(factor: float) -> float:
        return negative_log_likelihood(factor * scores, correct) + (factor - common) ** 2 / (2 * prior**2)

    return float(minimize_scalar(neg_log_posterior, bounds=RANGE, method="bounded", options={"xatol": 1e-5}).x)


def negative_log_likelihood(scores: np.ndarray, correct: np.ndarray) -> float:
    """Return that of the correct children (num_documents,), in nats, under the softmax of scores (num_documents, num_children)."""
    return (
        float(logsumexp(scores, axis=1).sum() - scores[np.arange(len(correct)), correct].sum()) if len(correct) else 0.0
    )


def node_log_probs(taxonomy: Taxonomy, logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities of all nodes, (num_documents, num_nodes) float64, from leaf logits (num_documents, num_leaves)."""
    leaves = torch.tensor(logits, dtype=torch.float64).log_softmax(1)
    padded = torch.nn.functional.pad(leaves, (0, taxonomy.num_nodes - taxonomy.num_leaves))
    return TreeSoftmax(taxonomy).with_inclusive_values(padded).numpy()


def node_probabilities(taxonomy: Taxonomy, logits: np.ndarray) -> Iterator[list[float]]:
    """Yield the probabilities of all nodes, of one document after the other, from leaf logits (num_documents, num_leaves)."""
    for start in range(0, len(logits), 1000):  # Python's numbers take four times the room of an array's
        yield from np.exp(node_log_probs(taxonomy, logits[start : start + 1000])).tolist()


def decisions_taken(taxonomy: Taxonomy, scores: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Collect the scores of each decision, over the documents that it was taken for.

    Args:
        scores: (num_documents, num_nodes, …).
        labels: (num_documents,), node ids or -100.

    Returns:
        For each of `Taxonomy.decisions`, scores (documents, children, …) with the children in the order of ids, and the index of the
        correct one, (documents,); no documents where it has one child.
    """
    scores, labels = scores[labels != UNLABELLED], labels[labels != UNLABELLED]
    ancestors, taken = np.array(taxonomy.ancestors), []
    for nodes in taxonomy.decisions:
        level = taxonomy.levels[nodes[0]] - 1
        correct = ancestors[labels, level]  # the node of each label's path that stands where this decision is taken
        rows = np.isin(correct, nodes) if len(nodes) > 1 else np.zeros(len(labels), dtype=bool)
        taken.append((scores[rows][:, nodes], np.searchsorted(nodes, correct[rows])))
    return taken


def apply_temperatures(taxonomy: Taxonomy, scores: np.ndarray, temperatures: list[float]) -> np.ndarray:
    """Return leaf log-probabilities, (num_documents, num_leaves) float64, of decisions with these temperatures.

    Args:
        scores: (num_documents, num_nodes), which each decision is a softmax of.
    """
    divided = torch.from_numpy(scores / np.array(temperatures)[taxonomy.decision_of])
    return TreeSoftmax(taxonomy).node_log_probs(divided)[:, : taxonomy.num_leaves].numpy()


def fit_thresholds(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray
) -> list[float | None] | None:
    """Fit conformal thresholds for coverages of 0.01 … 0.99, as `HierarchicalConfig` keeps them, rounded up to 6 decimals.

    Args:
        logits: (num_documents, num_leaves), of the calibrated model.
        labels: (num_documents,), node ids or -100.
        texts: (num_documents,), the same number for the same text.

    Returns:
        None where no document is labelled. None in place of a threshold that so few texts cannot give.
    """
    scores = nonconformity_scores(taxonomy, logits, labels, texts)
    if not len(scores):
        return None
    ranks = [-(-(len(scores) + 1) * place // 100) for place in range(1, 100)]  # ⌈(n + 1) · coverage⌉ without rounding
    return [round_up(scores[rank - 1]) if rank <= len(scores) else None for rank in ranks]


def round_up(score: float) -> float:
    """Round a score up to 6 decimals: a larger threshold holds at least the same share."""
    return float(Decimal(float(score)).quantize(Decimal("1e-6"), rounding=ROUND_CEILING))


def nonconformity_scores(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return one score for each labelled text, the largest of its documents', in ascending order.

    Texts are drawn independently of each other; rows are not, since a text that is there several times brings all of its
    rows. So the rank of a new score is uniform among one score a text, not among the rows'. The largest score is a function
    of the text and all its labels, so it is exchangeable with that of a new text; and it is no less than the score of any
    of the new text's rows. Hence the coverage holds for a new text with whichever of its labels. One row a text, chosen by
    a rule, would hold it only for new rows that the same rule chooses.

    Args:
        logits, labels, texts: as for `fit_thresholds`.
    """
    texts = texts[labels != UNLABELLED]
    logits, labels = labelled_documents(taxonomy, logits, labels)
    probabilities = node_probabilities(taxonomy, logits)
    scores = [nonconformity(taxonomy, *document) for document in zip(probabilities, labels.tolist(), strict=True)]
    return np.sort(pd.Series(scores, dtype=float).groupby(texts).max())


def conformal_scores(
    taxonomy: Taxonomy,
    logits: np.ndarray,
    labels: np.ndarray,
    texts: np.ndarray,
    thresholds: list[float | None],
    coverage: float,
) -> dict[str, float]:
    """Measure answers for a coverage on labelled texts, each of which counts once.

    Args:
        logits, labels, texts: as for `fit_thresholds`.

    Returns:
        ``coverage``, the share of texts whose answer holds the label, of an inner node every leaf below it, of a text with
        several labels all of them; ``leaves`` and ``nodes``, the mean numbers of them in an answer; ``single_leaf``, the
        share of answers that are one leaf. Empty without labelled texts.
    """
    texts = texts[labels != UNLABELLED]
    logits, labels = labelled_documents(taxonomy, logits, labels)
    if not len(labels):
        return {}
    threshold, under = conformal_threshold(thresholds, coverage), taxonomy.leaves_below
    probabilities = node_probabilities(taxonomy, logits)
    answers = [conformal_answer(taxonomy, nodes, threshold) for nodes in probabilities]
    held = [{leaf for node in answer for leaf in under[node]} for answer in answers]
    rows = pd.DataFrame(
        {
            "coverage": [leaves.issuperset(under[label]) for label, leaves in zip(labels, held, strict=True)],
            "leaves": [len(leaves) for leaves in held],
            "nodes": [len(answer) for answer in answers],
            "single_leaf": [len(leaves) == 1 for leaves in held],
        },
        dtype=float,
    )
    by_text = rows.groupby(texts)
    return {**by_text.mean().mean(), "coverage": by_text["coverage"].min().mean()}

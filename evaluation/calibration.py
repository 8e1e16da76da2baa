"""Fit temperatures, biases and conformal thresholds on the validation rows.

Worth knowing:

1. Each decision has one temperature T (Guo et al., 2017), and each node one bias b (Alexandari et al., 2020). A decision is fitted
   on the rows whose path takes it. With few rows, or rows that are all correct, maximum likelihood overfits. So all parameters have
   a normal prior, and the fit is a MAP estimate. With β = 1 / T, a decision is softmax(β · encoder scores + γ · lexical scores +
   b), which is convex. First one β and one γ are fitted for all decisions, with prior means 1 and 0. Then each decision's own β and
   biases are fitted, with the common β and 0 as prior means. `benchmarks/studies/calibration.py` chose the standard deviation 0.25.
   The log prior of the classes is subtracted from the lexical scores, since the encoder's scores hold it already and it would count
   twice. It is the same for all rows, so the stored biases contain it.
2. Everything is computed from leaf logits. A decision's scores are log P(child) - log P(parent), up to a constant that the
   softmax cancels. The lexical scores are added per decision. If they were added to the leaf logits instead, upper decisions
   would get the wrong weight. On OHSUMED this cost 0.3 points of level-1 accuracy and 0.012 of log loss, and gained 0.4 points of
   leaf accuracy (`benchmarks/studies/words.py`).
3. The thresholds are quantiles of the nonconformity scores of `pipeline_hierarchical`. Split conformal prediction (Vovk et
   al., 2005) takes the k-th smallest of n scores, k = ⌈(n + 1) · coverage⌉. A new document's score is at most this threshold
   with at least that probability, if the document is drawn like the validation rows. Two conditions follow:
   - The scored model must not be fitted to these rows, hence `calibrate_out_of_fold` (cross-conformal prediction: Vovk,
     2015).
   - The scores must be exchangeable, which scores of several rows of one text are not: see `nonconformity_scores`.
   The selection of the checkpoint on the same rows is not corrected; evaluation measures the coverage on the test rows.
   A row labelled with an inner node counts as covered if the answer contains every leaf below. Leaving such rows out would
   select rows by their label, and the coverage of the other rows would be too low.

In this file ``logits`` and ``lexical_scores`` are leaf logits, (num_rows, num_leaves), the latter None without a lexical
head. ``labels`` are node ids, and ``texts`` the same number for the same text, (num_rows,) each. For multi-label models,
`calibrate_out_of_fold` gets the arrays of `evaluation.multi_label`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.model_selection import GroupKFold

from modeling_hierarchical import TreeSoftmax
from pipeline_hierarchical import conformal_answer, nonconformity
from taxonomy_hierarchical import Taxonomy

PRIOR_STD = 0.25  # standard deviation of every prior
SCALE_BOUNDS = (0.05, 20.0)  # bounds of 1 / temperature
FOLDS = 5


@dataclass(frozen=True)
class Calibration:
    """The fitted parameters, as in `HierarchicalConfig`; a lexical weight of 0 means no lexical head."""

    lexical_weight: float
    temperatures: list[float]
    node_biases: list[float]

    def apply(self, taxonomy: Taxonomy, logits: np.ndarray, lexical_scores: np.ndarray | None) -> np.ndarray:
        """Return the calibrated leaf log-probabilities, (num_rows, num_leaves) float64."""
        scores = node_log_probs(taxonomy, logits)
        if lexical_scores is not None:
            scores = scores + self.lexical_weight * node_log_probs(taxonomy, lexical_scores)
        temperatures = np.array(self.temperatures)[taxonomy.decision_of]
        calibrated = torch.from_numpy(scores / temperatures + np.array(self.node_biases))
        return TreeSoftmax(taxonomy).node_log_probs(calibrated)[:, : taxonomy.num_leaves].numpy()


def fit_calibration(
    taxonomy: Taxonomy,
    logits: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    prior: float = PRIOR_STD,
    bias_prior: float = PRIOR_STD,
    log_prior: np.ndarray | None = None,
) -> Calibration:
    """Return the MAP estimate of the lexical head's weight, at least 0, and of temperatures, in [0.05, 20], and biases.

    An infinite standard deviation of a prior gives maximum likelihood, and a ``bias_prior`` of 0 no biases. ``log_prior`` is that
    of `LexicalClassifier`, (num_nodes,).
    """
    experts = [node_log_probs(taxonomy, scores) for scores in (logits, lexical_scores) if scores is not None]
    if lexical_scores is not None and log_prior is not None:
        experts[1] = experts[1] - log_prior
    per_decision = [  # scores (num_rows, num_children, num_experts), and the indices of the correct children
        (np.stack([scores[np.ix_(rows, nodes)] for scores in experts], axis=2), correct)
        for nodes, rows, correct in rows_by_decision(taxonomy, labels)
    ]
    taken = [(scores, correct) for scores, correct in per_decision if len(correct)]
    mean = np.array([1.0, 0.0])[: len(experts)]  # of β and γ
    bounds = [SCALE_BOUNDS, (0.0, SCALE_BOUNDS[1])][: len(experts)]

    def neg_log_posterior(factors: np.ndarray) -> float:
        loss = sum(negative_log_likelihood(scores @ factors, correct) for scores, correct in taken)
        return loss + ((factors - mean) ** 2).sum() / (2 * prior**2)

    factors = minimize(neg_log_posterior, x0=mean, bounds=bounds, method="L-BFGS-B").x
    common, weights = float(factors[0]), factors / factors[0]  # common · (encoder's scores + weight · lexical scores)
    temperatures, biases = [], np.zeros(taxonomy.num_nodes)
    for nodes, (scores, correct) in zip(taxonomy.decisions, per_decision, strict=True):
        inverse, biases[nodes] = fit_decision(scores @ weights, correct, prior, bias_prior, common)
        temperatures.append(1 / inverse)
        if len(experts) == 2 and log_prior is not None:
            biases[nodes] -= inverse * weights[1] * log_prior[nodes]
    lexical_weight = float(weights[1]) if len(experts) == 2 else 0.0
    return Calibration(lexical_weight, temperatures, biases.tolist())


def calibrate_out_of_fold(
    fit: Callable[..., Any],
    taxonomy: Taxonomy,
    logits: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    texts: np.ndarray,
) -> np.ndarray:
    """Calibrate each fifth of the texts with parameters that ``fit`` estimates on the other fifths.

    With fewer than five texts there is one fold per text. A single text is calibrated by its own fit. Returns logits of the
    same shape, in float64.
    """
    folds = min(FOLDS, len(np.unique(texts)))
    if folds == 1:
        return fit(taxonomy, logits, lexical_scores, labels).apply(taxonomy, logits, lexical_scores)
    calibrated = np.empty(logits.shape)
    for fitted, scored in GroupKFold(folds, shuffle=True, random_state=0).split(logits, groups=texts):
        lexical = (None, None) if lexical_scores is None else (lexical_scores[fitted], lexical_scores[scored])
        calibration = fit(taxonomy, logits[fitted], lexical[0], labels[fitted])
        calibrated[scored] = calibration.apply(taxonomy, logits[scored], lexical[1])
    return calibrated


def fit_decision(
    scores: np.ndarray, correct: np.ndarray, prior: float, bias_prior: float, common: float = 1.0
) -> tuple[float, np.ndarray]:
    """Return the MAP estimates of one decision's inverse temperature and biases, with prior means ``common`` and 0.

    Scores are (num_rows, num_children), and ``correct`` the indices of the correct children.
    """
    if not len(correct):
        return common, np.zeros(scores.shape[1])
    mean = np.array([common, *[0.0] * scores.shape[1]])
    deviations = np.array([prior, *[bias_prior or np.inf] * scores.shape[1]])
    bounds = [SCALE_BOUNDS, *[(None, None) if bias_prior else (0.0, 0.0)] * scores.shape[1]]

    def neg_log_posterior(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits, shift = parameters[0] * scores + parameters[1:], (parameters - mean) / deviations
        errors = softmax(logits, axis=1)
        errors[np.arange(len(correct)), correct] -= 1
        slope = np.array([(errors * scores).sum(), *errors.sum(0)]) + shift / deviations
        return negative_log_likelihood(logits, correct) + (shift**2).sum() / 2, slope

    inverse, *biases = minimize(neg_log_posterior, x0=mean, jac=True, bounds=bounds, method="L-BFGS-B").x
    return float(inverse), np.array(biases)


def negative_log_likelihood(scores: np.ndarray, correct: np.ndarray) -> float:
    """Return -Σ log P(correct child) in nats from scores (num_rows, num_children) and the children's indices."""
    return float(logsumexp(scores, axis=1).sum() - scores[np.arange(len(correct)), correct].sum())


def node_log_probs(taxonomy: Taxonomy, logits: np.ndarray) -> np.ndarray:
    """Compute log-probabilities of all nodes, (num_rows, num_nodes) float64."""
    leaves = torch.tensor(logits, dtype=torch.float64).log_softmax(1)
    padded = torch.nn.functional.pad(leaves, (0, taxonomy.num_nodes - taxonomy.num_leaves))
    return TreeSoftmax(taxonomy).with_inclusive_values(padded).numpy()


def node_probabilities(taxonomy: Taxonomy, logits: np.ndarray) -> Iterator[list[float]]:
    """Yield the probabilities of all nodes for each document."""
    for start in range(0, len(logits), 1000):  # a list of floats takes four times the memory of an array
        yield from np.exp(node_log_probs(taxonomy, logits[start : start + 1000])).tolist()


def rows_by_decision(taxonomy: Taxonomy, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield each decision's nodes, the rows whose path takes it, and the index of the correct node for each of them.

    A decision with one node has no rows.
    """
    paths = np.array(taxonomy.padded_paths)[labels]  # (num_rows, depth)
    rows, levels = np.nonzero(paths < taxonomy.num_nodes)
    correct = paths[rows, levels]
    decision = np.array(taxonomy.decision_of)[correct]
    order = np.argsort(decision, kind="stable")
    ends = np.searchsorted(decision[order], np.arange(len(taxonomy.decisions) + 1))
    for nodes, (start, end) in zip(taxonomy.decisions, pairwise(ends), strict=True):
        pairs = order[start : end if len(nodes) > 1 else start]
        yield nodes, rows[pairs], np.searchsorted(nodes, correct[pairs])


def fit_conformal_thresholds(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray
) -> list[float | None]:
    """Fit conformal thresholds to calibrated logits, for the coverages 0.01, …, 0.99; None where it needs more texts."""
    scores = nonconformity_scores(taxonomy, logits, labels, texts)
    ranks = [-(-(len(scores) + 1) * percent // 100) for percent in range(1, 100)]  # ⌈(n + 1) · coverage⌉ in integers
    return [round_up(scores[rank - 1]) if rank <= len(scores) else None for rank in ranks]


def round_up(score: float) -> float:
    """Round a threshold up to 6 decimals: a larger one covers at least as much."""
    return float(Decimal(float(score)).quantize(Decimal("1e-6"), rounding=ROUND_CEILING))


def nonconformity_scores(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Compute one score per distinct text, the maximum over its rows, in ascending order.

    Texts are drawn independently. Rows are not, because a repeated text brings all its rows. A text's maximum is exchangeable
    with that of a new text, and no row's score is above it. Hence the coverage holds for a new text with any of its labels.
    """
    rows = zip(node_probabilities(taxonomy, logits), labels.tolist(), strict=True)
    scores = pd.Series([nonconformity(taxonomy, nodes, label) for nodes, label in rows])
    return np.sort(scores.groupby(texts).max())


def coverage_scores(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: float
) -> dict[str, float]:
    """Measure the answers for a threshold. Each text counts once.

    Returns:
        coverage: share of texts whose answers contain all their labels.
        single_leaf: share of answers that are one leaf.
        leaves, nodes: mean number of leaves in an answer, and of nodes that it names.
    """
    rows, leaves_at_or_below = [], taxonomy.leaves_at_or_below
    for nodes, label in zip(node_probabilities(taxonomy, logits), labels.tolist(), strict=True):
        answer = conformal_answer(taxonomy, nodes, threshold)
        leaves = {leaf for node in answer for leaf in leaves_at_or_below[node]}
        rows.append((leaves.issuperset(leaves_at_or_below[label]), len(leaves), len(answer), len(leaves) == 1))
    by_text = pd.DataFrame(rows, columns=["coverage", "leaves", "nodes", "single_leaf"], dtype=float).groupby(texts)
    return {**by_text.mean().mean(), "coverage": by_text["coverage"].min().mean()}

"""Fit the calibration of the decision scores on the validation rows.

Worth knowing:

1. A decision has one scale (an inverse temperature: Guo et al., 2017), and each node one bias (Alexandari et al., 2020). A
   decision is fitted on the rows whose path takes it. With few rows, or rows that are all correct, maximum likelihood
   overfits. So all parameters have a normal prior, and the fit is a MAP estimate, which is convex. The scores are
   scale · (own + weight · lexical) + bias. First one scale and one weight are fitted for all decisions, with prior means 1 and
   0. Then each decision's own scale and biases are fitted, with the common scale and 0 as prior means.
2. The log prior of the classes is subtracted from the lexical scores, since the encoder's scores hold it already and it would
   count twice. It is the same for all rows, so the stored biases contain it.
3. The lexical scores are added per decision. If they were added to the leaf logits instead, upper decisions would get the wrong
   weight.

In this file ``scores`` and ``lexical_scores`` are decision scores, (num_rows, num_nodes), the latter None without a lexical head.
``labels`` are the arrays of `Decisions.targets`, and ``texts`` the same number for the same text, (num_rows,).
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.model_selection import GroupKFold

from configuration_hierarchical import Calibration
from decisions_hierarchical import Decisions, calibrate
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.metrics import FOLDS

PRIOR_STD = 0.25  # standard deviation of every prior
SCALE_BOUNDS = (0.05, 20.0)


def calibrated_logits(
    decisions: Decisions, calibration: Calibration, scores: np.ndarray, lexical_scores: np.ndarray | None
) -> np.ndarray:
    """Return the logits (num_rows, num_classes) of calibrated decision scores, in float64."""
    scales, biases = np.array(calibration.scales), np.array(calibration.biases)
    calibrated = calibrate(scores.astype(np.float64), lexical_scores, calibration.lexical_weight, scales, biases)
    return decisions(torch.from_numpy(calibrated))[1].numpy()


def map_estimate(
    neg_log_likelihood: Callable[[np.ndarray], tuple[float, np.ndarray]], mean: np.ndarray, bounds: list
) -> np.ndarray:
    """Minimise a function that returns its value and gradient, plus the negative log of a normal prior with this mean."""

    def neg_log_posterior(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        shift = (parameters - mean) / PRIOR_STD
        value, slope = neg_log_likelihood(parameters)
        return value + (shift**2).sum() / 2, slope + shift / PRIOR_STD

    return minimize(neg_log_posterior, x0=mean, jac=True, bounds=bounds, method="L-BFGS-B").x


def fit_calibration(
    form: Form,
    scores: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    log_prior: np.ndarray | float = 0.0,
) -> Calibration:
    """Return the MAP estimate of the lexical head's weight, at least 0, and of scales, in [0.05, 20], and biases.

    A decision without rows has the prior means. ``log_prior`` is that of `LexicalClassifier`, (num_nodes,).
    """
    parts = [scores.astype(np.float64)]
    if lexical_scores is not None:
        parts.append(lexical_scores - log_prior)
    per_decision = [  # nodes, scores (num_rows, num_children, num_parts) and targets (num_rows, num_children)
        (nodes, np.stack([part[np.ix_(rows, nodes)] for part in parts], axis=2), targets)
        for nodes, rows, targets in form.decisions_of(labels)
    ]

    # ── Common to all decisions ──────────────────────────────────────────────────────────────────────────────────────
    by_size = defaultdict(list)  # decisions of one number of children are one array
    for nodes, features, targets in per_decision:
        by_size[len(nodes)].append((features, targets))
    taken = [tuple(map(np.concatenate, zip(*same, strict=True))) for same in by_size.values()]

    def of_common(factors: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = 0.0, np.zeros(len(factors))
        for features, targets in taken:
            loss, errors = neg_log_likelihood(form, features @ factors, targets)
            value, slope = value + loss, slope + np.einsum("rc,rcp->p", errors, features)
        return value, slope

    bounds = [SCALE_BOUNDS, (0.0, SCALE_BOUNDS[1])]
    factors = map_estimate(of_common, np.array([1.0, 0.0])[: len(parts)], bounds[: len(parts)])
    common, weights = float(factors[0]), factors / factors[0]  # common · (encoder's scores + weight · lexical scores)

    # ── Each decision's own ──────────────────────────────────────────────────────────────────────────────────────────
    scales, biases = np.full(scores.shape[1], common), np.zeros(scores.shape[1])
    for nodes, features, targets in per_decision:
        scales[nodes], biases[nodes] = fit_decision(form, features @ weights, targets, common)
    if lexical_scores is None:
        return Calibration(scales=scales.tolist(), biases=biases.tolist())
    biases -= scales * weights[1] * log_prior
    return Calibration(lexical_weight=float(weights[1]), scales=scales.tolist(), biases=biases.tolist())


def fit_decision(form: Form, scores: np.ndarray, targets: np.ndarray, common: float) -> tuple[float, np.ndarray]:
    """Return the MAP estimate of one decision's scale and biases, with prior means ``common`` and 0.

    Scores and targets are (num_rows, num_children).
    """
    num_children = scores.shape[1]
    if not len(targets):
        return common, np.zeros(num_children)

    def of_decision(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        loss, errors = neg_log_likelihood(form, parameters[0] * scores + parameters[1:], targets)
        return loss, np.array([(errors * scores).sum(), *errors.sum(0)])

    bounds = [SCALE_BOUNDS, *[(None, None)] * num_children]
    scale, *biases = map_estimate(of_decision, np.array([common, *[0.0] * num_children]), bounds)
    return float(scale), np.array(biases)


def neg_log_likelihood(form: Form, logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Return -Σ log P(target) in nats, and its gradient (num_rows, num_children), of decisions with these logits."""
    log_normaliser, probabilities = form.normalise(logits)
    return float(log_normaliser - (targets * logits).sum()), probabilities - targets


def calibrate_out_of_fold(
    form: Form,
    scores: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    texts: np.ndarray,
    log_prior: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Calibrate each fifth of the texts by `fit_calibration` on the other fifths (cross-conformal: Vovk, 2015).

    With fewer than five texts there is one fold per text. A single text is calibrated by its own fit. Returns logits
    (num_rows, num_classes), in float64.
    """
    folds, splits = min(FOLDS, len(np.unique(texts))), [(slice(None), slice(None))]
    if folds > 1:
        splits = GroupKFold(folds, shuffle=True, random_state=0).split(scores, groups=texts)
    calibrated = np.empty((len(scores), form.decisions.num_classes))
    for fitted, scored in splits:
        lexical = (None, None) if lexical_scores is None else (lexical_scores[fitted], lexical_scores[scored])
        calibration = fit_calibration(form, scores[fitted], lexical[0], labels[fitted], log_prior)
        calibrated[scored] = calibrated_logits(form.decisions, calibration, scores[scored], lexical[1])
    return calibrated

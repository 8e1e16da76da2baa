"""Fit the calibration of the decision scores on the validation rows.

Worth knowing:

1. A decision has one scale (an inverse temperature: Guo et al., 2017), and each node one bias
   (Alexandari et al., 2020). A decision is fitted on the rows whose path takes it. With few rows,
   or rows that are all correct, maximum likelihood overfits. So all parameters have a normal prior,
   and the fit is a MAP estimate, which is convex. The scores are scale · (own + weight · lexical) +
   bias. First one scale and one weight are fitted for all decisions, and a bias for each level,
   with prior means 1, 0 and 0. Then the decisions' own scales and biases are fitted, with these as
   prior means. A scale's standard deviation is relative to its mean: an encoder that overfits needs
   a small scale, and its nodes few deviations from it. With several labels, the common ones are
   fitted on open decisions, and the others so that P(node) is right for all texts: on open
   decisions alone, words of a node's name would count for too much where its parent is wrong.
2. The log prior of the classes is subtracted from the lexical scores, since the encoder's scores
   hold it already and it would count twice. It is the same for all rows, so the stored biases
   contain it.
3. The lexical scores are added per decision. If they were added to the leaf logits instead, upper
   decisions would get the wrong weight.

In this file ``scores`` and ``lexical_scores`` are decision scores, (num_rows, num_nodes), the
latter None without a lexical head. ``labels`` are the arrays of `Decisions.targets`, and ``texts``
the same number for the same text, (num_rows,).
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from configuration_hierarchical import Calibration
from decisions_hierarchical import Decisions, calibrate
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.metrics import split_texts

PRIOR_STD = 0.25  # of every prior; for scales, relative to the mean
SCALE_BOUNDS = (0.05, 20.0)


def calibrated_logits(
    decisions: Decisions,
    calibration: Calibration,
    scores: np.ndarray,
    lexical_scores: np.ndarray | None,
) -> np.ndarray:
    """Return the logits (num_rows, num_classes) of calibrated decision scores, in float64."""
    scales = np.array(calibration.scales)
    biases = np.array(calibration.biases)
    calibrated = calibrate(
        scores.astype(np.float64), lexical_scores, calibration.lexical_weight, scales, biases
    )
    return decisions(torch.from_numpy(calibrated))[1].numpy()


def compose(correction: Calibration, stored: Calibration) -> Calibration:
    """Return the calibration that corrects a stored one, whose scores ``correction`` is fitted to.

    The lexical head keeps its weight.
    """
    scales = np.array(correction.scales)
    return replace(
        correction,
        lexical_weight=stored.lexical_weight,
        scales=(scales * stored.scales).tolist(),
        biases=(scales * stored.biases + correction.biases).tolist(),
    )


def fit_calibration(
    form: Form,
    scores: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    log_prior: np.ndarray | float = 0.0,
) -> Calibration:
    """Return the MAP estimate of the lexical head's weight, at least 0, and of scales, in [0.05,
    20], and biases.

    Without lexical scores, that weight is 0. A decision without rows has the prior means.
    ``log_prior`` is that of `LexicalClassifier`, (num_nodes,).
    """
    decisions = form.decisions
    targets = torch.from_numpy(labels)
    own = torch.from_numpy(scores.astype(np.float64))
    words = (
        torch.zeros_like(own)
        if lexical_scores is None
        else torch.from_numpy(lexical_scores - log_prior)
    )

    # ── Common to all decisions: scale · (encoder's scores + weight · lexical scores) + bias of the
    # level
    (common, factor), level_biases = fit_common(form, [own, words], targets)
    weight = factor / common

    # ── Each decision's own scale, then the biases of all nodes ───────────────────────────────────
    number = decisions.outcome_decision[: decisions.num_nodes]  # of each node's decision
    combined = own + weight * words
    count = int(number.max()) + 1
    mean = torch.cat([common.expand(count), level_biases])
    std = PRIOR_STD * torch.cat([common.expand(count), torch.ones_like(level_biases)])
    bounds = [SCALE_BOUNDS] * count + [(None, None)] * decisions.num_nodes

    def loss(parameters: Tensor) -> Tensor:
        return decisions.loss(
            parameters[:count][number] * combined + parameters[count:], targets, 1
        )

    fitted = map_estimate(loss, mean, std, bounds)
    scales = fitted[:count][number].numpy()
    biases = fitted[count:].numpy()
    biases = biases - scales * float(weight) * log_prior
    return Calibration(lexical_weight=float(weight), scales=scales.tolist(), biases=biases.tolist())


def fit_phrases(
    form: Form,
    scores: np.ndarray,
    lexical_scores: np.ndarray,
    phrase_scores: np.ndarray,
    labels: np.ndarray,
) -> float:
    """Return the weight of `LexicalClassifier.phrase_scores` relative to the lexical scores, which
    are without their log prior.
    """
    parts = [
        torch.from_numpy(part.astype(np.float64))
        for part in (scores, lexical_scores, phrase_scores)
    ]
    (_, lexical, phrases), _ = fit_common(form, parts, torch.from_numpy(labels))
    return float(phrases / lexical) if lexical > 0 else 0.0


def fit_common(form: Form, parts: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fit what all decisions have in common.

    Returns:
        The MAP estimates of a factor for each part of the decision scores, and of the bias of each
        node's level, (num_nodes,). The first factor is a scale, and the others are at least 0.
    """
    levels = torch.tensor(form.tree.levels) - 1
    count = len(parts)
    mean = torch.zeros(count + form.tree.depth, dtype=torch.float64)
    mean[0] = 1.0

    def neg_log_likelihood(given: Tensor) -> Tensor:
        summed = torch.stack(
            [factor * part for factor, part in zip(given[:count], parts, strict=True)]
        ).sum(0)
        return -form.decisions.log_likelihood(summed + given[count:][levels], targets).sum()

    bounds = [
        SCALE_BOUNDS,
        *[(0.0, SCALE_BOUNDS[1])] * (count - 1),
        *[(None, None)] * form.tree.depth,
    ]
    fitted = map_estimate(neg_log_likelihood, mean, torch.full_like(mean, PRIOR_STD), bounds)
    return fitted[:count], fitted[count:][levels]


def map_estimate(
    loss: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor, bounds: list
) -> Tensor:
    """Minimise a function, plus the negative log of a normal prior with this mean and standard
    deviation.
    """

    def neg_log_posterior(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        given = torch.from_numpy(parameters).requires_grad_()
        value = loss(given) + ((given - mean) / std).square().sum() / 2
        (slope,) = torch.autograd.grad(value, given)
        return value.item(), slope.numpy()

    options = {"ftol": 1e-13, "gtol": 1e-4}
    return torch.from_numpy(
        minimize(neg_log_posterior, mean, jac=True, bounds=bounds, options=options).x
    )


def calibrate_out_of_fold(
    form: Form,
    scores: np.ndarray,
    lexical_scores: np.ndarray | None,
    labels: np.ndarray,
    texts: np.ndarray,
    log_prior: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Calibrate each fifth of the texts by `fit_calibration` on the other fifths (cross-conformal:
    Vovk, 2015).

    With fewer than five texts there is one fold per text. A single text is calibrated by its own
    fit. Returns logits (num_rows, num_classes), in float64.
    """
    calibrated = np.empty((len(scores), form.decisions.num_classes))
    for fitted, scored in split_texts(texts):
        lexical = (
            (None, None)
            if lexical_scores is None
            else (lexical_scores[fitted], lexical_scores[scored])
        )
        calibration = fit_calibration(form, scores[fitted], lexical[0], labels[fitted], log_prior)
        calibrated[scored] = calibrated_logits(
            form.decisions, calibration, scores[scored], lexical[1]
        )
    return calibrated

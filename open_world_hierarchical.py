"""Estimate how frequent the classes are in other texts than a model was fitted to.

Worth knowing:

1. Probabilities are calibrated for the class frequencies of the validation rows, the *prior*. `Decisions.adapt` corrects them
   for another prior. It assumes label shift: texts of one class look the same in both populations.
2. `estimate_prior` needs no labels. `benchmarks/shift.py` measures what it gains, and that it does no harm where nothing shifted.
"""

from collections.abc import Mapping
from numbers import Real
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

try:
    from .configuration_hierarchical import Calibration
    from .decisions_hierarchical import Decisions
    from .taxonomy_hierarchical import quote_name
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from configuration_hierarchical import Calibration
    from decisions_hierarchical import Decisions
    from taxonomy_hierarchical import quote_name

MAX_STEPS = 1000  # of the EM algorithm
TOLERANCE = 1e-6  # largest change of a frequency in its last step
FITTED_TEXTS = 7.0  # with as many validation texts a class, the fitted prior counts as much as the new texts
SIGNIFICANCE = 0.05  # of a shift, corrected for the number of classes (Bonferroni)


def fitted_prior(calibration: Calibration) -> Tensor:
    """Return the class frequencies for which the probabilities are calibrated, (num_classes,). ValueError: there are none."""
    if calibration.prior is None:
        raise ValueError(
            "this checkpoint does not store the class frequencies of its validation rows, which prior needs"
        )
    return torch.tensor(calibration.prior, dtype=torch.float64)


def read_prior(decisions: Decisions, calibration: Calibration, given: Any) -> Tensor:
    """Return given class frequencies as (num_classes,), scaled to a sum of 1 where a text has one class.

    Args:
        given: a list in the order of the classes, or a mapping from their labels.

    Raises:
        ValueError: the frequencies do not fit the classes, or see `fitted_prior`.
    """
    num_classes = len(fitted_prior(calibration))
    labels = decisions.tree.labels[:num_classes]
    if isinstance(given, Mapping):
        for label in [*(label for label in labels if label not in given), *(given.keys() - {*labels})]:
            raise ValueError(f"prior needs the frequency of each class, and of nothing else: see {quote_name(label)}")
        given = [given[label] for label in labels]
    if not isinstance(given, (list, tuple)) or len(given) != num_classes:
        raise ValueError(f"prior must be a list of {num_classes} frequencies, or a mapping from the classes' labels")
    if not all(isinstance(share, Real) and 0 <= float(share) < float("inf") for share in given):
        raise ValueError("prior: the frequency of a class must be a number of at least 0")
    return decisions.check_prior(torch.tensor(given, dtype=torch.float64))


def estimate_prior(decisions: Decisions, calibration: Calibration, probabilities: Tensor) -> Tensor:
    """Estimate the class frequencies of unlabelled texts, (num_classes,), from calibrated probabilities (B, num_classes).

    This is the EM algorithm of Saerens, Latinne and Decaestecker, 2002, "Adjusting the outputs of a classifier to new a priori
    probabilities", with a prior distribution: with few validation texts, small errors of the calibration would look like other
    frequencies. For the same reason, the frequencies stay those of the fit unless the mean probability of a class differs
    significantly (Lipton, Wang and Smola, 2018, "Detecting and correcting for label shift with black box predictors").
    """
    fitted, num_fitted, num_texts = fitted_prior(calibration), calibration.num_texts or 1, len(probabilities)

    # ── Is there a shift? ────────────────────────────────────────────────────────────────────────────────────────────
    gaps = (probabilities.double().mean(0) - fitted).abs()
    noise = (
        fitted * (1 - fitted) * (1 / num_texts + 1 / num_fitted)
    ).sqrt()  # at most: probabilities vary less than labels
    if (gaps <= NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * len(fitted))) * noise).all():
        return fitted

    # ── Expectation and maximisation ─────────────────────────────────────────────────────────────────────────────────
    weight = FITTED_TEXTS * len(fitted) / num_fitted  # of the fitted frequencies, relative to the texts
    prior = fitted
    for _ in range(MAX_STEPS):
        # all rows at once would take several times their memory
        of_rows = (decisions.adapt_classes(rows.double(), fitted, prior).sum(0) for rows in probabilities.split(1024))
        last, prior = prior, (sum(of_rows) / num_texts + weight * fitted) / (1 + weight)
        if (prior - last).abs().max() < TOLERANCE:
            break
    return prior

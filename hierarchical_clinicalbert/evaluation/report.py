"""Calibrate a scored model, measure it, and write the files that show the result.

Worth knowing:

1. The calibration and the thresholds are fitted on the validation rows, from decision scores that are computed once.
2. Validation scores are cross-validated: a calibration on four fifths of the rows scores the other fifth. With
   ``--load_best_model_at_end`` these rows also select the checkpoint, so their scores are optimistic
   (`benchmarks/selection.py`). In multi-label data, the thresholds are fitted on the scored rows, so F1 is optimistic too.
3. Rows are in the order in which they were scored, sorted by length. `ScoredSplit.rows` gives their place in the source.

In this file ``splits`` are `ScoredSplit`s by name, ``validation`` and ``test``, of which one may be missing.
"""

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix

from configuration_hierarchical import Calibration
from decisions_hierarchical import threshold_index
from hierarchical_clinicalbert.evaluation.calibration import calibrate_out_of_fold, calibrated_logits, fit_calibration
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.lexical import LexicalClassifier
from hierarchical_clinicalbert.evaluation.metrics import PREFIXES, per_class_report

logger = logging.getLogger(__name__)

MEASURED_TARGET = 0.9  # coverage or recall of the prediction sets in metrics.json


@dataclass(frozen=True)
class ScoredSplit:
    """A split as a model scored it.

    Attributes:
        scores: decision scores of the model, (num_rows, num_nodes).
        logits: (num_rows, num_classes).
        labels: the arrays of `Decisions.targets`.
        texts: the same number for the same text, (num_rows,).
        rows: numbers in the source, (num_rows,).
        token_counts: how often each token occurs, (num_rows, V).
    """

    scores: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    rows: np.ndarray
    token_counts: csr_matrix


# ── Calibrate ────────────────────────────────────────────────────────────────────────────────────────────────────────


def calibrate_splits(
    form: Form, splits: dict[str, ScoredSplit], classifier: LexicalClassifier | None
) -> tuple[Calibration, dict[str, ScoredSplit], dict[str, float]]:
    """Fit the lexical head's weight, the calibration and the thresholds on the validation rows.

    The model that scored the splits has no calibration.

    Returns:
        The calibration. The splits with calibrated logits, of the validation rows out of fold. Metrics after calibration, and
        without the lexical head if there is one (``without_lexical_head_…``).
    """
    lexical = (
        {}
        if classifier is None
        else {name: classifier.decision_scores(split.token_counts) for name, split in splits.items()}
    )
    log_prior = 0.0 if classifier is None else classifier.log_prior
    calibration, calibrated = _calibrate(form, splits, lexical, log_prior)
    weight = calibration.lexical_weight or None
    sets = form.fit_sets(*_arrays(calibrated["validation"]), calibrated["validation"].texts)
    scales = calibration.scales or [1.0]
    shown = f"scales of the scores from {min(scales):.2f} to {max(scales):.2f}"
    logger.info("calibrated on the validation rows: %s; weight of the lexical head %.2f", shown, weight or 0)
    metrics = {"lexical_weight": weight or 0.0, **measure(form, calibrated, calibration.thresholds)}
    if weight:
        without, uncorrected = _calibrate(form, splits, {}, log_prior)
        measured = measure(form, uncorrected, without.thresholds)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    return dataclasses.replace(calibration, lexical_weight=weight, **sets), calibrated, metrics


def _calibrate(
    form: Form, splits: dict[str, ScoredSplit], lexical: dict[str, np.ndarray], log_prior: np.ndarray | float
) -> tuple[Calibration, dict[str, ScoredSplit]]:
    """Fit a calibration with its thresholds, and calibrate the splits. ``lexical`` are decision scores of each split, or empty."""
    fit, validation = partial(fit_calibration, form, log_prior=log_prior), splits["validation"]
    rows = validation.scores, lexical.get("validation"), validation.labels
    calibration = fit(*rows)
    logits = {
        name: calibrated_logits(form.decisions, calibration, split.scores, lexical.get(name))
        for name, split in splits.items()
    }
    logits["validation"] = calibrate_out_of_fold(fit, form.decisions, *rows, validation.texts)
    thresholds = form.fit_thresholds(logits["validation"], validation.labels)
    calibrated = {name: dataclasses.replace(split, logits=logits[name]) for name, split in splits.items()}
    return dataclasses.replace(calibration, thresholds=thresholds), calibrated


def _arrays(split: ScoredSplit) -> tuple[np.ndarray, np.ndarray]:
    return split.logits, split.labels


# ── Measure ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(form: Form, splits: dict[str, ScoredSplit], thresholds: Any) -> dict[str, float]:
    """Compute each split's metrics, ``eval_…`` and ``test_…``."""
    metrics = {}
    for name, split in splits.items():
        measured = form.measure(*_arrays(split), split.texts, thresholds)
        metrics |= {f"{PREFIXES[name]}_{metric}": value for metric, value in measured.items()}
    return metrics


def measure_sets(form: Form, splits: dict[str, ScoredSplit], set_thresholds: list | None) -> dict[str, float]:
    """Measure the prediction sets for `MEASURED_TARGET` on the test rows, from calibrated logits: ``test_answer_…``."""
    # None if there were too few validation rows for the target
    threshold = (set_thresholds or [None] * 99)[threshold_index(MEASURED_TARGET)]
    if "test" not in splits or threshold is None:
        return {}
    scores = form.set_scores(*_arrays(splits["test"]), splits["test"].texts, threshold)
    return {f"test_answer_{name}": value for name, value in scores.items()}


def reported_split(splits: dict[str, ScoredSplit]) -> str:
    """Return the name of the split that plots and class scores show: test before validation."""
    return "test" if "test" in splits else "validation"


def class_scores(form: Form, splits: dict[str, ScoredSplit], thresholds: Any) -> dict[str, Any]:
    """Compute scores and 95 % intervals of the classes for metrics.json, on the `reported_split`."""
    if not splits:
        return {}
    name = reported_split(splits)
    outcomes = form.class_outcomes(*_arrays(splits[name]), splits[name].texts, thresholds)
    rows, intervals = per_class_report(form.tree.labels[: form.decisions.num_classes], *outcomes)
    prefixed = {f"{PREFIXES[name]}_{key.replace('micro_f1', form.micro_f1)}": ends for key, ends in intervals.items()}
    return {"per_class": rows, "intervals": prefixed} if rows else {}


# ── Show ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_plots(form: Form, splits: dict[str, ScoredSplit], per_class: list[dict]) -> dict[str, Figure | None]:
    """Draw the figures of the `reported_split`, by file name."""
    if not splits:
        return {}
    figures = form.plots(*_arrays(splits[reported_split(splits)]), per_class)
    return figures | {"reliability_diagram": draw_reliability(form, splits)}


def draw_reliability(form: Form, splits: dict[str, ScoredSplit]) -> Figure | None:
    """Draw the reliability diagram of the `reported_split`."""
    return form.reliability_diagram(*_arrays(splits[reported_split(splits)]))


def write_predictions(form: Form, splits: dict[str, ScoredSplit], thresholds: Any, folder: Path) -> None:
    """Write ``<split>_predictions.csv``: each scored row's number in its source, labels, predictions and probabilities."""
    for name, split in splits.items():
        columns = form.prediction_columns(*_arrays(split), thresholds)
        table = pd.DataFrame({"row": split.rows, **columns}).sort_values("row", kind="stable")
        table.to_csv(folder / f"{name}_predictions.csv", index=False, float_format="%.6f")


def log_metrics(metrics: dict[str, float]) -> None:
    """Log a table of the metrics, with one column per scored split."""
    split_of = {prefix: split for split, prefix in PREFIXES.items() if f"{prefix}_log_loss" in metrics}
    table: dict[str, dict[str, float]] = {split: {} for split in split_of.values()}
    for key, value in metrics.items():
        prefix, _, name = key.partition("_")
        if prefix in split_of and not name.endswith(("_per_second", "_time", "runtime")):
            table[split_of[prefix]][name] = value
    if table:  # rows were scored
        logger.info("scores\n%s", pd.DataFrame(table).to_string(float_format="%.4f", na_rep=""))

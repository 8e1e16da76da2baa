"""The table of metrics, F1 from counts, bootstrap intervals, and the calibration error, for both forms of label.

To add a metric, add a row to the table of a form: `one_path.METRICS` or `many_nodes.METRICS`. Evaluation, the selection of the
checkpoint, plots, card and Hub read these tables.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

BINS = 15  # of the calibration error
FOLDS = 5  # of cross-validation
PREFIXES = {"validation": "eval", "test": "test"}  # of a split's metrics


@dataclass(frozen=True)
class Metric:
    """A row of a form's table of metrics.

    Attributes:
        compute: takes the form's predictions and, if the name holds ``{}``, a ``level`` from 1. It returns None if the scored rows
            do not define the metric.
        title: in the card and the training curves.
        hub_type: the metric's type on the Hub, see hf.co/metrics.
        direction: 1 if higher is better, -1 if lower is, and 0 if the metric cannot select a checkpoint.
        is_key: whether it is in the log, in the first table of the card and, if higher is better, among the training curves.
    """

    compute: Callable[..., Any]
    title: str
    hub_type: str
    direction: int = 1
    is_key: bool = False


def of_all_levels(table: dict[str, Metric], depth: int) -> dict[str, Metric]:
    """Return the metrics by name, with one for each level in place of those whose name holds ``{}``, after all others."""
    metrics = {name: metric for name, metric in table.items() if "{}" not in name}
    for level in range(1, depth + 1):
        for name, metric in table.items():
            if "{}" in name:
                compute, title = partial(metric.compute, level=level), f"level {level} {metric.title}"
                metrics[name.format(level)] = replace(metric, compute=compute, title=title)
    return metrics


def scores_by_split(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each scored split, without the prefix of their names."""
    splits = {
        split: {
            name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(f"{prefix}_")
        }
        for split, prefix in PREFIXES.items()
    }
    return {split: scores for split, scores in splits.items() if "log_loss" in scores}


def confusion_counts(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Count each class's true positives, predictions and labels: (3, num_classes).

    ``labels``, 1 or 0, and the predictions ``chosen``, bool, are (num_rows, num_classes).
    """
    true = labels == 1
    return np.stack([pairs.sum(axis=0) for pairs in (true & chosen, chosen, true)])


def node_f1(counts: np.ndarray) -> np.ndarray:
    """Compute F1 (…, num_classes) from counts (3, …, num_classes); NaN for a class in no label and no prediction."""
    occurring = counts[1] + counts[2]
    return np.where(occurring > 0, 2 * counts[0] / np.maximum(occurring, 1), np.nan)


def micro_f1(counts: np.ndarray) -> float:
    """Compute F1 over all pairs from counts (3, num_classes); 0 without a label and a prediction."""
    return float(2 * counts[0].sum() / max(counts[1:].sum(), 1))


def macro_f1(counts: np.ndarray) -> float:
    """Compute the mean F1 of the classes in labels or predictions from counts (3, num_classes); 0 if there is none."""
    return float(np.nanmean(node_f1(counts))) if counts.any() else 0.0


def one_hot(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Return ids (num_rows,) as an array (num_rows, num_classes) of bool."""
    return ids[:, None] == np.arange(num_classes)


def bootstrap_intervals(
    labels: np.ndarray, chosen: np.ndarray, texts: np.ndarray | None = None, resamples: int = 1000
) -> dict[str, np.ndarray]:
    """Compute 95 % percentile bootstrap intervals over texts (Efron and Tibshirani, 1993, chapter 13).

    A resample lacks some classes with few rows, which lowers its macro-F1. With 200 classes of three rows, the interval lay below
    the score itself. So the resampled values of macro-F1 are shifted until their mean is the score.

    Args:
        labels, chosen: as for `confusion_counts`.
        texts: ids of the rows' texts, (num_rows,). All rows of a text are drawn together. By default each row is a text.

    Returns:
        Lower and upper ends: ``micro_f1`` and ``macro_f1``, (2,); ``f1``, (2, num_classes), over the resamples in which the class
        occurs, NaN if there are none. With one label per row, ``micro_f1`` is the accuracy.
    """
    true = labels == 1
    columns = csr_matrix(np.hstack([true & chosen, chosen, true]), dtype=np.float64).T
    ids, text_of_row = np.unique(np.arange(len(labels)) if texts is None else texts, return_inverse=True)
    generator, size = np.random.default_rng(0), len(ids)
    draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(resamples))
    resampled = [(columns @ times[text_of_row]).reshape(3, -1) for times in draws]
    macro = np.array([macro_f1(counts) for counts in resampled])
    macro = (macro + macro_f1(confusion_counts(labels, chosen)) - macro.mean()).clip(0, 1)
    micro = np.array([micro_f1(counts) for counts in resampled])
    samples = {"micro_f1": micro, "macro_f1": macro, "f1": np.array([node_f1(counts) for counts in resampled])}
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # for classes in no resample
        return {name: np.nanpercentile(values, (2.5, 97.5), axis=0) for name, values in samples.items()}


def per_class_report(
    names: list[str], labels: np.ndarray, chosen: np.ndarray, texts: np.ndarray | None = None
) -> tuple[list[dict], dict[str, list[float]]]:
    """Compute one row per class with precision, recall and F1, and the intervals of micro- and macro-F1.

    Arguments are those of `bootstrap_intervals`. ``support`` is the number of labels, and ``f1_interval`` is None for a class that
    does not occur. A ratio with denominator 0 is 0. Rows and intervals are empty without labels.
    """
    if not labels.size:
        return [], {}
    counts, intervals = confusion_counts(labels, chosen), bootstrap_intervals(labels, chosen, texts)
    precision, recall = counts[0] / np.maximum(counts[1:], 1)
    columns = {
        "label": names,
        "support": counts[2],
        "precision": precision,
        "recall": recall,
        "f1": np.nan_to_num(node_f1(counts)),
        "f1_interval": [ends.tolist() if np.isfinite(ends).all() else None for ends in intervals.pop("f1").T],
    }
    return pd.DataFrame(columns).to_dict("records"), {name: ends.tolist() for name, ends in intervals.items()}


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, variance: np.ndarray | float = 0.0) -> pd.DataFrame:
    """Sum up documents by confidence in 15 bins (Guo et al., 2017), and count them: one row per bin with documents.

    Row m holds confidences in (m / 15, (m + 1) / 15]. ``variance`` is the variance of ``correct`` if the probabilities are
    correct. All arguments are (num_rows,).
    """
    columns = {"confidence": confidence, "correct": correct, "variance": variance, "count": 1}
    return pd.DataFrame(columns, dtype=float).groupby(bin_index(confidence)).sum()


def bin_index(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence, 0 to 14."""
    return np.digitize(confidence, np.arange(1, BINS) / BINS, right=True)


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Compute the mean over documents of their bin's |accuracy - confidence| (Guo et al., 2017, equation 3)."""
    return (bins["correct"] - bins["confidence"]).abs().sum() / bins["count"].sum()


def calibration_error_by_chance(bins: pd.DataFrame) -> float:
    """Compute the expected value of `expected_calibration_error` if the probabilities are correct.

    The number of correct predictions in a bin has the variance v of the bin. Its mean absolute deviation is √(2 v / π) in
    the normal approximation.
    """
    return np.sqrt(2 * bins["variance"].clip(lower=0) / np.pi).sum() / bins["count"].sum()


def of_bins(error: Callable[[pd.DataFrame], float]) -> Callable[..., float | None]:
    """Return the function that computes an error from predictions' ``calibration_bins``; None if there are no bins."""

    def compute(p: Any, level: int | None = None) -> float | None:
        bins = p.calibration_bins(level)
        return None if bins is None else error(bins)

    return compute


# rows of both tables
ECE = Metric(of_bins(expected_calibration_error), "expected calibration error", "ece", direction=-1, is_key=True)
ECE_BY_CHANCE = Metric(
    of_bins(calibration_error_by_chance), "expected calibration error if perfectly calibrated", "ece", direction=0
)

"""The tables of metrics, F1 from counts, bootstrap intervals, and the calibration error, for both
forms of label.

To add a metric, add a row to a table: `ONE_PATH` or `MANY_NODES`. Evaluation, the selection of the
checkpoint, plots, card and Hub read these tables.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold

BINS = 15  # of the calibration error
FOLDS = 5  # of cross-validation
PREFIXES = {"validation": "eval", "test": "test"}  # of a split's metrics


class Predictions:
    """The labels and predictions of rows, as metrics, tables and plots read them.

    Attributes:
        form: an `evaluation.forms.Form`.
        logits: (num_rows, num_classes) in float64.
        labels: the arrays of `Decisions.targets`.
        texts: ids of the rows' texts, (num_rows,), or None.
        log_probs, probabilities: of all nodes, (num_rows, num_nodes) in float64.
        true, chosen: the labelled and the predicted nodes, with their ancestors,
            (num_rows, num_nodes) of bool.
        known: the nodes that the label says to be present or absent, (num_rows, num_nodes) of bool.
        counts: the `confusion_counts` of all known nodes.
    """

    def __init__(
        self,
        form: Any,
        logits: np.ndarray,
        labels: np.ndarray,
        thresholds: Any = None,
        texts: np.ndarray | None = None,
    ):
        decisions = form.decisions
        self.form = form
        self.labels = labels
        self.texts = texts
        self.num_leaves = decisions.num_leaves
        self.levels = np.array(form.tree.levels)
        self.logits = logits.astype(np.float64)
        self.log_probs = decisions.log_probs(torch.from_numpy(self.logits)).numpy()
        self.probabilities = np.exp(self.log_probs)
        targets = decisions.outcome_targets(torch.from_numpy(labels))
        self.true = targets[:, : decisions.num_nodes].numpy() == 1
        self.known = form.known_nodes(labels)
        thresholds = form.common_threshold(logits, labels) if thresholds is None else thresholds
        self.chosen = decisions.predict(torch.from_numpy(self.probabilities), thresholds).numpy()
        self.counts = confusion_counts(self.true, self.chosen & self.known)

    def score(self, nodes: Any, score: Callable[[np.ndarray], float]) -> float | None:
        """Return a score of the counts of some nodes, over the rows in which all of them are
        known; None without a label.
        """
        rows = self.known[:, nodes].all(axis=1)
        counts = confusion_counts(self.true[rows][:, nodes], self.chosen[rows][:, nodes])
        return score(counts) if counts[2].any() else None

    def of_leaves(self, score: Callable[[np.ndarray], float]) -> float | None:
        return self.score(slice(self.num_leaves), score)

    def of_level(self, level: int, score: Callable[[np.ndarray], float]) -> float | None:
        """Return a score of a level's nodes.

        A leaf above the level counts as "no node at this level".
        """
        return self.score(self.levels == level, score)


# ── F1 from counts ────────────────────────────────────────────────────────────────────────────────


def confusion_counts(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Count each class's true positives, predictions and labels: (3, num_classes).

    ``labels``, 1 or 0, and the predictions ``chosen``, bool, are (num_rows, num_classes).
    """
    true = labels == 1
    return np.stack([pairs.sum(axis=0) for pairs in (true & chosen, chosen, true)])


def node_f1(counts: np.ndarray) -> np.ndarray:
    """Compute F1 (…, num_classes) from counts (3, …, num_classes); NaN for a class in no label
    and no prediction.
    """
    occurring = counts[1] + counts[2]
    return np.where(occurring > 0, 2 * counts[0] / np.maximum(occurring, 1), np.nan)


def micro_f1(counts: np.ndarray) -> float:
    """Compute F1 over all pairs from counts (3, num_classes); 0 without a label and a
    prediction.
    """
    return float(2 * counts[0].sum() / max(counts[1:].sum(), 1))


def macro_f1(counts: np.ndarray) -> float:
    """Compute the mean F1 of the classes in labels or predictions from counts (3, num_classes);
    0 if there is none.
    """
    return float(np.nanmean(node_f1(counts))) if counts.any() else 0.0


def weighted_f1(counts: np.ndarray) -> float:
    """Compute the mean F1 of the classes, weighted by their labels, from counts
    (3, num_classes).
    """
    return float(np.average(np.nan_to_num(node_f1(counts)), weights=counts[2]))


def one_hot(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Return ids (num_rows,) as an array (num_rows, num_classes) of bool."""
    return ids[:, None] == np.arange(num_classes)


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────


def level_accuracy(p: Predictions, level: int) -> float | None:
    """Compute the share of the rows whose true path reaches the level with the same node in the
    predicted path.
    """
    shared, _, true = p.counts[:, p.levels == level].sum(axis=1)
    return shared / true if true else None


def leaf_labels(p: Predictions) -> float | None:
    """Compute the share of the rows whose label is a leaf, which accuracy counts alone.

    None: all are.
    """
    is_leaf = p.true[:, : p.num_leaves].any(axis=1)
    return None if is_leaf.all() else is_leaf.mean()


def any_label_accuracy(p: Predictions) -> float | None:
    """Compute the share of rows whose predicted leaf is the label of any row with the same text."""
    rows = p.true[:, : p.num_leaves].any(axis=1)
    if p.texts is None or not rows.any():
        return None
    _, text_of = np.unique(p.texts[rows], return_inverse=True)
    true = np.zeros((text_of.max() + 1, p.num_leaves), dtype=bool)
    np.logical_or.at(true, text_of, p.true[rows, : p.num_leaves])
    return (true[text_of] & p.chosen[rows, : p.num_leaves]).any(axis=1).mean()


def example_f1(p: Predictions) -> float:
    """Compute the mean F1 of the texts; 1 where neither the labels nor the prediction has a
    node.
    """
    return np.nan_to_num(node_f1(confusion_counts(p.true.T, p.chosen.T)), nan=1.0).mean()


def mean_average_precision(p: Predictions) -> float | None:
    """Compute the mean of scikit-learn's average precision over the nodes with a label."""
    occurring = np.flatnonzero(p.true.any(axis=0))
    precisions = [average_precision_score(p.true[:, node], p.logits[:, node]) for node in occurring]
    return np.mean(precisions) if precisions else None


def expected_calibration_error(p: Predictions) -> float | None:
    """Compute the mean over `Form.scored_pairs` of their bin's |accuracy - confidence| (Guo et
    al., 2017, equation 3).
    """
    bins = calibration_bins(*p.form.scored_pairs(p))
    return (
        (bins["correct"] - bins["confidence"]).abs().sum() / bins["count"].sum()
        if len(bins)
        else None
    )


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Sum up predictions by confidence in 15 bins (Guo et al., 2017), and count them: one row per
    bin with predictions.

    Row m holds confidences in (m / 15, (m + 1) / 15]. Both arguments are (num_predictions,).
    """
    index = np.digitize(confidence, np.arange(1, BINS) / BINS, right=True)
    return (
        pd.DataFrame({"confidence": confidence, "correct": correct, "count": 1}, dtype=float)
        .groupby(index)
        .sum()
    )


def split_texts(texts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows to fit and to score in each of five folds of the texts, or in fewer.

    A single text is in both.
    """
    folds = min(FOLDS, len(np.unique(texts)))
    rows = np.arange(len(texts))
    return (
        [*GroupKFold(folds, shuffle=True, random_state=0).split(rows, groups=texts)]
        if folds > 1
        else [(rows, rows)]
    )


@dataclass(frozen=True)
class Metric:
    """A row of a form's table of metrics.

    Attributes:
        compute: takes the form's predictions and, if the name holds ``{}``, a ``level`` from 1. It
            returns None if the scored rows do not define the metric.
        title: in the card and the training curves.
        hub_type: the metric's type on the Hub, see hf.co/metrics.
        direction: 1 if higher is better, -1 if lower is, and 0 if the metric cannot select a
            checkpoint.
        is_key: whether it is in the log, in the first table of the card and, if higher is better,
            among the training curves.
    """

    compute: Callable[..., Any]
    title: str
    hub_type: str
    direction: int = 1
    is_key: bool = False


ECE = Metric(
    expected_calibration_error, "expected calibration error", "ece", direction=-1, is_key=True
)
ONE_PATH = {
    "accuracy": Metric(lambda p: p.of_leaves(micro_f1), "accuracy", "accuracy", is_key=True),
    "leaf_labels": Metric(
        leaf_labels, "share of labels that are leaves", "leaf_labels", direction=0
    ),
    "any_label_accuracy": Metric(
        any_label_accuracy, "accuracy, counting any label of a repeated text as correct", "accuracy"
    ),
    # over the leaves that occur as label or prediction
    "macro_f1": Metric(lambda p: p.of_leaves(macro_f1), "macro F1", "f1", is_key=True),
    "weighted_f1": Metric(lambda p: p.of_leaves(weighted_f1), "weighted F1", "f1"),
    # over the nodes of all paths (Kiritchenko, Matwin and Famili, 2005)
    "hierarchical_precision": Metric(
        lambda p: p.counts[0].sum() / p.counts[1].sum(), "hierarchical precision", "precision"
    ),
    "hierarchical_recall": Metric(
        lambda p: p.counts[0].sum() / p.counts[2].sum(), "hierarchical recall", "recall"
    ),
    "hierarchical_f1": Metric(lambda p: micro_f1(p.counts), "hierarchical F1", "f1", is_key=True),
    # the probability of a label is the least one on its path
    "log_loss": Metric(
        lambda p: -np.where(p.true, p.log_probs, 0).min(axis=1).mean(),
        "log loss (nats)",
        "log_loss",
        direction=-1,
        is_key=True,
    ),
    "ece": ECE,
    "level_{}_accuracy": Metric(level_accuracy, "accuracy", "accuracy"),
    "level_{}_macro_f1": Metric(lambda p, level: p.of_level(level, macro_f1), "macro F1", "f1"),
}
MANY_NODES = {
    # with closed sets, micro-F1 is the hierarchical F1 (Kiritchenko, Matwin and Famili, 2005)
    "micro_f1": Metric(lambda p: micro_f1(p.counts), "micro F1", "f1", is_key=True),
    # over the nodes that occur in labels or predictions
    "macro_f1": Metric(lambda p: macro_f1(p.counts), "macro F1", "f1", is_key=True),
    "leaf_micro_f1": Metric(lambda p: p.of_leaves(micro_f1), "micro F1 of the leaves", "f1"),
    "leaf_macro_f1": Metric(lambda p: p.of_leaves(macro_f1), "macro F1 of the leaves", "f1"),
    "example_f1": Metric(example_f1, "example-based F1", "f1"),
    "mean_average_precision": Metric(
        mean_average_precision, "mean average precision", "mean_average_precision", is_key=True
    ),
    # the mean binary cross-entropy over all pairs
    "log_loss": Metric(
        lambda p: (np.logaddexp(0, p.logits) - p.true * p.logits).mean(),
        "log loss of a node (nats)",
        "log_loss",
        direction=-1,
        is_key=True,
    ),
    # a model without probable nodes has no calibration error, so it cannot select a checkpoint
    "ece": replace(ECE, direction=0),
    "level_{}_micro_f1": Metric(lambda p, level: p.of_level(level, micro_f1), "micro F1", "f1"),
}


def of_all_levels(table: dict[str, Metric], depth: int) -> dict[str, Metric]:
    """Return the metrics by name, with one for each level in place of those whose name holds
    ``{}``, after all others.
    """
    metrics = {name: metric for name, metric in table.items() if "{}" not in name}
    for level in range(1, depth + 1):
        for name, metric in table.items():
            if "{}" in name:
                compute = partial(metric.compute, level=level)
                title = f"level {level} {metric.title}"
                metrics[name.format(level)] = replace(metric, compute=compute, title=title)
    return metrics


def scores_by_split(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each scored split, without the prefix of their names."""
    splits = {
        split: {
            name.removeprefix(f"{prefix}_"): value
            for name, value in metrics.items()
            if name.startswith(f"{prefix}_")
        }
        for split, prefix in PREFIXES.items()
    }
    return {split: scores for split, scores in splits.items() if "log_loss" in scores}


# ── Intervals ─────────────────────────────────────────────────────────────────────────────────────


def bootstrap_intervals(
    labels: np.ndarray, chosen: np.ndarray, texts: np.ndarray | None = None, resamples: int = 1000
) -> dict[str, np.ndarray]:
    """Compute 95 % percentile bootstrap intervals over texts (Efron and Tibshirani, 1993, chapter
    13).

    A resample lacks some classes with few rows, which lowers its macro-F1. With 200 classes of
    three rows, the interval lay below the score itself. So the resampled values of macro-F1 are
    shifted until their mean is the score.

    Args:
        labels, chosen: as for `confusion_counts`.
        texts: ids of the rows' texts, (num_rows,). All rows of a text are drawn together. By
            default each row is a text.

    Returns:
        Lower and upper ends: ``micro_f1`` and ``macro_f1``, (2,); ``f1``, (2, num_classes), over
        the resamples in which the class occurs, NaN if there are none. With one label per row,
        ``micro_f1`` is the accuracy.
    """
    true = labels == 1
    columns = csr_matrix(np.hstack([true & chosen, chosen, true]), dtype=np.float64).T
    ids, text_of_row = np.unique(
        np.arange(len(labels)) if texts is None else texts, return_inverse=True
    )
    generator = np.random.default_rng(0)
    size = len(ids)
    draws = (
        np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(resamples)
    )
    resampled = [(columns @ times[text_of_row]).reshape(3, -1) for times in draws]
    macro = np.array([macro_f1(counts) for counts in resampled])
    macro = (macro + macro_f1(confusion_counts(labels, chosen)) - macro.mean()).clip(0, 1)
    micro = np.array([micro_f1(counts) for counts in resampled])
    samples = {
        "micro_f1": micro,
        "macro_f1": macro,
        "f1": np.array([node_f1(counts) for counts in resampled]),
    }
    # for classes in no resample
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return {
            name: np.nanpercentile(values, (2.5, 97.5), axis=0) for name, values in samples.items()
        }

"""Flat, hierarchical and per-level scores, the log loss, the calibration error, and bootstrap intervals.

Worth knowing:

1. The scored prediction is the most probable leaf with its ancestors, so a predicted path always reaches a leaf.
2. A label that is an inner node ("specific disease", child unknown) counts in all scores but the flat ones.
3. A score without documents (no label is a leaf, or reaches the level) is left out, so no score is NaN.
4. Data of `HierarchicalF1` stay in memory: the processes of a distributed run would share one file.
"""

import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from errors import InputError
from evaluation.calibration import node_log_probs
from metrics.hierarchical_f1.hierarchical_f1 import HierarchicalF1
from modeling_hierarchical import IGNORED_LABEL
from taxonomy_hierarchical import Taxonomy

BINS = 15  # of the calibration error


def build_compute_metrics(taxonomy: Taxonomy) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's ``compute_metrics`` for a taxonomy.

    The returned function takes leaf logits (num_rows, num_leaves), and node ids (num_rows,) or -100 for documents to
    leave out. It raises InputError for logits that are not finite. It returns:

    - ``accuracy``, ``macro_f1``, ``weighted_f1``: of scikit-learn, over documents labelled with a leaf. The F1 scores
      average over leaves that occur as label or prediction.
    - ``ece``, ``ece_by_chance``: see `expected_calibration_error` and `calibration_error_by_chance`. If the label is an
      inner node, a prediction below it scores P(prediction given label), because the true leaf is unknown. Leaving such
      documents out would select documents by their label, and make correct probabilities look wrong.
    - ``hierarchical_precision``, ``hierarchical_recall``, ``hierarchical_f1`` (Kiritchenko, Matwin and Famili, 2005). With a
      label that is an inner node, the predicted path is truncated at the label's level.
    - ``log_loss``: the mean of -log P(label) in nats. An inner node's probability is the sum over its leaves.
    - ``level_k_accuracy``: over the documents whose true path reaches level k, the share whose predicted path has the same
      node there. A shorter predicted path counts as wrong.
    - ``level_k_macro_f1``: over the nodes of the level that occur in a true or predicted path. A leaf above the level counts
      as "no node at this level", a class that is not averaged. A document labelled with an inner node above the level is
      left out, because its node there is unknown.
    - ``level_k_ece``, ``level_k_ece_by_chance``: for the tree truncated below the level. A leaf above stands for itself.
    """
    with tempfile.TemporaryDirectory() as folder:  # the module makes a data folder even with keep_in_memory
        hierarchical_f1 = HierarchicalF1(keep_in_memory=True, cache_dir=folder)
    levels, paths = np.array(taxonomy.levels), np.array(taxonomy.padded_paths)
    paths[paths == taxonomy.num_nodes] = -1

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        check_finite(logits)
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        predictions, is_leaf = logits.argmax(axis=1), labels < taxonomy.num_leaves
        at_label = paths[predictions, levels[labels] - 1]  # the predicted node at the label's level, or -1
        beyond = ~is_leaf & (at_label >= 0)  # which node is correct below the label is unknown
        log_probs = node_log_probs(taxonomy, logits)
        metrics: dict[str, float] = {}

        def log_probability(nodes: np.ndarray) -> np.ndarray:  # of one node for each document
            return np.take_along_axis(log_probs, nodes[:, None], axis=1)[:, 0]

        def calibration_errors(level: int) -> tuple[float, float]:
            # in the tree truncated below the level, a path that ends above stands for its last node
            true, predicted = (
                np.where(paths[ids, level] >= 0, paths[ids, level], ids) for ids in (labels, predictions)
            )
            # below a label that is an inner node, the correct node is unknown: judge the prediction at the label
            judged = np.where(beyond & (levels[predicted] > levels[labels]), at_label, predicted)
            confidence, p_judged = np.exp(log_probability(predicted)), np.exp(log_probability(judged))
            correct = np.where(judged == true, confidence / p_judged, 0.0)
            bins = calibration_bins(confidence, correct, variance=confidence**2 * (1 / p_judged - 1))
            return expected_calibration_error(bins), calibration_error_by_chance(bins)

        # ── All levels at once ───────────────────────────────────────────────────────────────────────────────────────
        if is_leaf.any():
            flat = labels[is_leaf], predictions[is_leaf]
            metrics["accuracy"] = accuracy_score(*flat)
            metrics["macro_f1"] = f1_score(*flat, average="macro", zero_division=0)
            metrics["weighted_f1"] = f1_score(*flat, average="weighted", zero_division=0)
            metrics["ece"], metrics["ece_by_chance"] = calibration_errors(taxonomy.depth - 1)
        truncated = np.where(beyond, at_label, predictions)
        metrics |= hierarchical_f1.compute(predictions=truncated, references=labels, parents=taxonomy.parents)
        metrics["log_loss"] = -log_probability(labels).mean()

        # ── Each level ───────────────────────────────────────────────────────────────────────────────────────────────
        for level in range(taxonomy.depth):
            true, predicted = paths[labels, level], paths[predictions, level]
            reached = true >= 0
            if not reached.any():
                continue
            prefix, known = f"level_{level + 1}", reached | is_leaf
            occurring = np.union1d(true[known], predicted[known])
            metrics[f"{prefix}_accuracy"] = accuracy_score(true[reached], predicted[reached])
            metrics[f"{prefix}_macro_f1"] = f1_score(
                true[known], predicted[known], labels=occurring[occurring >= 0], average="macro", zero_division=0
            )
            metrics[f"{prefix}_ece"], metrics[f"{prefix}_ece_by_chance"] = calibration_errors(level)
        return {name: float(score) for name, score in metrics.items()}

    return compute_metrics


def check_finite(logits: np.ndarray) -> None:
    """Raise InputError for logits that are not finite, (num_rows, num_classes)."""
    infinite = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if infinite.size:
        where = f"{infinite.size} of {len(logits)} documents"
        raise InputError(f"the model's logits are not finite for {where}: training diverged; lower --learning_rate")


def any_label_accuracy(logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> float | None:
    """Compute the share of documents whose predicted leaf is the label of any document with the same text.

    Only documents labelled with a leaf count; None without any. ``texts`` are numbers, the same for the same text.
    """
    is_leaf = labels < logits.shape[1]
    pairs = (pd.MultiIndex.from_arrays([texts[is_leaf], ids[is_leaf]]) for ids in (labels, logits.argmax(axis=1)))
    true, predicted = pairs
    return float(predicted.isin(true).mean()) if len(true) else None


def outcomes(labels: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, predictions and labels, each (num_rows, num_classes) of bool.

    ``labels`` and the predictions ``chosen`` are (num_rows, num_classes). Unknown labels, -100, do not count.
    """
    true, chosen = labels == 1, chosen & (labels != IGNORED_LABEL)
    return true & chosen, chosen, true


def confusion_counts(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Count each class's true positives, predictions and labels, see `outcomes`: (3, num_classes)."""
    return np.stack([pairs.sum(axis=0) for pairs in outcomes(labels, chosen)])


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
        labels, chosen: as for `outcomes`.
        texts: ids of the rows' texts, (num_rows,). All rows of a text are drawn together. By default each row is a text.

    Returns:
        Lower and upper ends: ``micro_f1`` and ``macro_f1``, (2,); ``f1``, (2, num_classes), over the resamples in which the class
        occurs, NaN if there are none. With one label per row, ``micro_f1`` is the accuracy.
    """
    columns = csr_matrix(np.hstack(outcomes(labels, chosen)), dtype=np.float64).T
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

    Labels and predictions are those of `outcomes`, texts those of `bootstrap_intervals`. ``support`` is the number of labels,
    and ``f1_interval`` is None for a class that does not occur. A ratio with denominator 0 is 0. Rows and intervals are empty
    if no label is known.
    """
    if not (labels != IGNORED_LABEL).any():
        return [], {}
    counts, intervals = confusion_counts(labels, chosen), bootstrap_intervals(labels, chosen, texts)
    precision, recall = counts[0] / np.maximum(counts[1:], 1)
    columns = {
        **{"label": names, "support": counts[2], "precision": precision, "recall": recall},
        "f1": np.nan_to_num(node_f1(counts)),
        "f1_interval": [ends.tolist() if np.isfinite(ends).all() else None for ends in intervals["f1"].T],
    }
    return pd.DataFrame(columns).to_dict("records"), {
        name: intervals[name].tolist() for name in ("micro_f1", "macro_f1")
    }


def predicted_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each document's most probable leaf, (num_rows,), from leaf logits."""
    # scipy's logsumexp copies the array several times
    return np.exp(logits.max(axis=1) - np.logaddexp.reduce(logits, axis=1, dtype=np.float64))


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

"""Flat, hierarchical and per-level scores, the log loss, and the calibration error.

Worth knowing:

1. The scored prediction is the most probable leaf with its ancestors, so a predicted path always reaches a leaf.
2. A label is a node id. A leaf counts in all scores. An inner node ("specific disease", child unknown) counts in the
   hierarchical, per-level, calibration and log-loss scores.
3. A score without documents (no label is a leaf, or reaches the level) is left out, so no score is NaN.
4. `hierarchical_f1` is a module of the `evaluate` library in this repository, which imports a copy of it from
   HF_MODULES_CACHE. The path is absolute, because `evaluate` looks up unknown relative paths on the Hub. The data is kept in
   memory, because the processes of a distributed run would share one file.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from transformers import EvalPrediction

from errors import InputError
from taxonomy_hierarchical import Taxonomy

HIERARCHICAL_F1 = Path(__file__).resolve().parents[1] / "metrics" / "hierarchical_f1"
BINS = 15  # of the calibration error


def build_compute_metrics(taxonomy: Taxonomy) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's ``compute_metrics`` for a taxonomy.

    The returned function takes ``predictions``, leaf logits (num_documents, num_leaves), and ``label_ids``, node ids
    (num_documents,), or -100 for documents to leave out. It returns:

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

    Raises:
        InputError: `evaluate` cannot write its copy of the module. The returned function raises InputError for logits that
            are not finite.
    """
    hierarchical_f1 = _load_hierarchical_f1()
    levels, paths = np.array(taxonomy.levels), np.array(taxonomy.ancestors)
    paths[paths == taxonomy.num_nodes] = -1
    leaves_under = np.zeros((taxonomy.num_nodes, taxonomy.num_leaves), dtype=bool)
    for node, leaves in enumerate(taxonomy.leaves_below):
        leaves_under[node, leaves] = True

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        infinite = np.count_nonzero(~np.isfinite(logits).all(axis=1))
        if infinite:
            raise InputError(
                f"the model's logits are not finite for {infinite} of {len(logits)} documents: training has diverged; "
                "lower --learning_rate"
            )
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        predictions, is_leaf = logits.argmax(axis=1), labels < taxonomy.num_leaves
        at_label = paths[predictions, levels[labels] - 1]  # the predicted node at the label's level, or -1
        beyond = ~is_leaf & (at_label >= 0)  # which node is correct below the label is unknown
        total = _logsumexp(logits)
        metrics: dict[str, float] = {}

        def probability(nodes: np.ndarray) -> np.ndarray:
            return np.exp(_logsumexp(logits, leaves_under[nodes]) - total)

        def calibration_errors(level: int) -> tuple[float, float]:
            """Return the calibration error of the tree truncated below a level, and its value by chance."""
            # a path that ends above the level stands for its last node
            true, nodes = (np.where(paths[ids, level] >= 0, paths[ids, level], ids) for ids in (labels, predictions))
            known = np.where(beyond & (levels[nodes] > levels[labels]), at_label, nodes)
            confidence, of_known = probability(nodes), probability(known)
            correct = np.where(known == true, confidence / of_known, 0.0)
            bins = calibration_bins(confidence, correct, variance=confidence**2 * (1 / of_known - 1))
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
        metrics["log_loss"] = (total - _logsumexp(logits, leaves_under[labels])).mean()

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


def any_label_accuracy(logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> float | None:
    """Compute the share of documents whose predicted leaf is the label of any document with the same text.

    Corpora repeat texts under several labels. `accuracy` counts a prediction as wrong even if another row has that label.

    Only documents labelled with a leaf count. Without any, None is returned. ``texts`` are numbers, the same for the same text.
    """
    is_leaf = labels < logits.shape[1]
    true, predicted = (
        zip(texts[is_leaf].tolist(), ids[is_leaf].tolist(), strict=True) for ids in (labels, logits.argmax(1))
    )
    correct = set(true)
    hits = [pair in correct for pair in predicted]
    return float(np.mean(hits)) if hits else None


def bootstrap_intervals(
    labels: np.ndarray, predictions: np.ndarray, num_leaves: int, resamples: int = 1000
) -> dict[str, np.ndarray]:
    """Compute 95 % percentile bootstrap intervals over documents (Efron and Tibshirani, 1993, chapter 13).

    Resampling lowers macro-F1 if classes have few documents, because a resample lacks some of them. With 200 classes of three
    documents the score itself was above its interval. So the resamples of macro-F1 are shifted to have the score as mean.

    Returns:
        Lower and upper end: (2,) for ``accuracy`` and for ``macro_f1`` over the leaves that occur as label or prediction;
        (2, num_leaves) for ``f1`` of each leaf, over the resamples that contain the leaf, NaN if none does.
    """

    def scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
        correct = np.bincount(true[true == predicted], minlength=num_leaves)
        occurring = np.bincount(true, minlength=num_leaves) + np.bincount(predicted, minlength=num_leaves)
        f1 = np.where(occurring > 0, 2 * correct / np.maximum(occurring, 1), np.nan)
        return {"accuracy": correct.sum() / len(true), "macro_f1": np.nanmean(f1), "f1": f1}

    generator = np.random.default_rng(0)
    draws = (generator.integers(len(labels), size=len(labels)) for _ in range(resamples))
    resampled = [scores(labels[rows], predictions[rows]) for rows in draws]
    values = {name: np.array([sample[name] for sample in resampled]) for name in resampled[0]}
    values["macro_f1"] += scores(labels, predictions)["macro_f1"] - values["macro_f1"].mean()
    values["macro_f1"] = values["macro_f1"].clip(0, 1)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # for leaves in no resample
        return {name: np.nanpercentile(samples, (2.5, 97.5), axis=0) for name, samples in values.items()}


def per_class_report(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray
) -> tuple[list[dict], dict[str, list[float]]]:
    """Compute scikit-learn's precision, recall and F1 of each leaf, over the documents labelled with a leaf.

    Returns:
        One row per leaf: ``label``, ``support`` (its number of documents), ``precision``, ``recall``, ``f1`` and
        ``f1_interval``, the interval of `bootstrap_intervals` or None. A ratio with denominator 0 is 0. Then the intervals
        of ``accuracy`` and ``macro_f1``. Both are empty if no document is labelled with a leaf.
    """
    is_leaf = labels < taxonomy.num_leaves
    if not is_leaf.any():
        return [], {}
    labels, predictions = labels[is_leaf], logits[is_leaf].argmax(axis=1)
    leaves = range(taxonomy.num_leaves)
    columns = precision_recall_fscore_support(labels, predictions, labels=leaves, zero_division=0)
    intervals = bootstrap_intervals(labels, predictions, taxonomy.num_leaves)
    rows = [
        {
            **{"label": taxonomy.labels[leaf], "support": int(support)},
            **{"precision": float(precision), "recall": float(recall), "f1": float(f1)},
            "f1_interval": ends.tolist() if np.isfinite(ends).all() else None,
        }
        for leaf, precision, recall, f1, support, ends in zip(leaves, *columns, intervals["f1"].T, strict=True)
    ]
    return rows, {name: intervals[name].tolist() for name in ("accuracy", "macro_f1")}


def predicted_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each document's most probable leaf, (num_documents,), from leaf logits."""
    return np.exp(logits.max(axis=1) - _logsumexp(logits))


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, variance: np.ndarray | float = 0.0) -> pd.DataFrame:
    """Sum up documents by confidence, in 15 bins of equal width (Guo et al., 2017), and count them.

    Args:
        confidence, correct: (num_documents,), the probability of each prediction, and whether it is correct.
        variance: (num_documents,), the variance of ``correct`` if the probabilities are correct.

    Returns:
        One row per bin with documents. Row m holds confidences in (m / 15, (m + 1) / 15].
    """
    index = np.digitize(confidence, np.arange(1, BINS) / BINS, right=True)
    columns = {"confidence": confidence, "correct": correct, "variance": variance, "count": 1}
    return pd.DataFrame(columns, dtype=float).groupby(index).sum()


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Compute the mean over documents of their bin's |accuracy - confidence| (Guo et al., 2017, equation 3)."""
    return (bins["correct"] - bins["confidence"]).abs().sum() / bins["count"].sum()


def calibration_error_by_chance(bins: pd.DataFrame) -> float:
    """Compute the expected value of `expected_calibration_error` if the probabilities are correct.

    The number of correct predictions in a bin has the variance v of the bin. Its mean absolute deviation is √(2 v / π) in
    the normal approximation.
    """
    return np.sqrt(2 * bins["variance"].clip(lower=0) / np.pi).sum() / bins["count"].sum()


def _logsumexp(logits: np.ndarray, leaves: np.ndarray | bool = True) -> np.ndarray:
    """Compute the logsumexp over leaves, or over chosen ones, in float64. scipy's copies the array several times."""
    return np.logaddexp.reduce(logits, axis=1, where=leaves, dtype=np.float64)


def _load_hierarchical_f1() -> evaluate.EvaluationModule:
    with tempfile.TemporaryDirectory() as folder:  # the module makes a data folder even with keep_in_memory
        try:
            return evaluate.load(str(HIERARCHICAL_F1), keep_in_memory=True, cache_dir=folder)
        except OSError as error:
            raise InputError(
                f"the `evaluate` library cannot copy {HIERARCHICAL_F1} into {evaluate.config.HF_MODULES_CACHE} "
                f"({error.strerror or error}); set HF_MODULES_CACHE to a writable folder"
            ) from error

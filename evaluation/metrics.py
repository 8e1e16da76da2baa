"""Flat, hierarchical and per-level scores, the log loss, and the calibration error.

Worth knowing:

1. The scored prediction is the most probable leaf with its ancestors, so a predicted path always reaches a leaf.
2. A label is a node id, or -100 for none. A leaf counts in all scores. An inner node ("specific disease", child unknown)
   counts in the hierarchical, per-level, calibration and log-loss scores. -100 counts in none.
3. A score without documents (no label is a leaf, or reaches the level) is left out, so no score is NaN.
4. `hierarchical_f1` is a module of the `evaluate` library in this repository. The path is absolute, because `evaluate` looks
   up unknown relative paths on the Hub. The module keeps its data in memory, because the processes of a distributed run
   would share one file. `evaluate` imports a copy of the module, which it writes into HF_MODULES_CACHE.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluate
import numpy as np
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from transformers import EvalPrediction

from errors import InputError
from taxonomy_hierarchical import Taxonomy

UNLABELLED = -100
HIERARCHICAL_F1 = Path(__file__).resolve().parents[1] / "metrics" / "hierarchical_f1"
_BLOCK = 2**22  # float64 numbers per block: 100,000 documents with 5,000 leaves would need 4 GB at once


def build_compute_metrics(taxonomy: Taxonomy) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's ``compute_metrics`` for a taxonomy.

    The returned function takes ``predictions``, leaf logits (num_documents, num_leaves), and ``label_ids``, node ids or -100
    (num_documents,). It returns:

    - ``accuracy``, ``macro_f1``, ``weighted_f1``: of scikit-learn, over documents labelled with a leaf. The F1 scores
      average over leaves that occur as label or prediction.
    - ``ece``: see `expected_calibration_error`; ``ece_by_chance``: its expected value for correct probabilities, see
      `calibration_error_by_chance`. Both are over all labelled documents. If the label is an inner node, a prediction
      below it scores P(prediction given label), because the true leaf is unknown. Leaving such documents out would
      select documents by their label, and make correct probabilities look wrong.
    - ``hierarchical_precision``, ``hierarchical_recall``, ``hierarchical_f1`` (Kiritchenko, Matwin and Famili, 2005): over
      all labelled documents. A prediction below a label that is an inner node is truncated at the label.
    - ``log_loss``: the mean of -log P(label) in nats. An inner node's probability is the sum over its leaves.
    - For each level k that some label reaches:

      - ``level_k_accuracy``: over the documents whose true path reaches the level, the share whose predicted path has the
        same node there. A shorter predicted path counts as wrong.
      - ``level_k_macro_f1``: over the nodes of the level that occur in a true or predicted path. A leaf above the level
        counts as "no node at this level", a class that is not averaged. A document labelled with an inner node above
        the level is left out, because its node there is unknown.
      - ``level_k_ece``, ``level_k_ece_by_chance``: as above, for the tree truncated below the level, where a leaf above
        the level stands for itself.

    Raises:
        InputError: `evaluate` cannot write its copy of the module. The returned function raises InputError for arrays of
            wrong shapes, unknown label ids, logits that are not finite, and no labelled document.
    """
    hierarchical_f1 = _load_hierarchical_f1()
    levels, paths = np.array(taxonomy.levels), np.array(taxonomy.ancestors)
    paths[paths == taxonomy.num_nodes] = -1
    leaves_under = np.zeros((taxonomy.num_nodes, taxonomy.num_leaves), dtype=bool)
    for node, leaves in enumerate(taxonomy.leaves_below):
        leaves_under[node, leaves] = True

    def calibration_errors(
        level: int, labels: np.ndarray, predictions: np.ndarray, logits: np.ndarray
    ) -> tuple[float, float]:
        """Return the calibration error of the tree truncated below a level, counted from 0, and its value by chance."""
        # a path that ends above the level stands for its last node
        true, nodes = (np.where(paths[ids, level] >= 0, paths[ids, level], ids) for ids in (labels, predictions))
        at_label = paths[predictions, levels[labels] - 1]
        unknown = (labels >= taxonomy.num_leaves) & (at_label >= 0) & (levels[nodes] > levels[labels])
        known = np.where(unknown, at_label, nodes)
        probability = np.exp(_log_probability(logits, nodes, leaves_under))
        known_probability = probability.copy()  # `known` differs from `nodes` for few documents
        if unknown.any():
            known_probability[unknown] = np.exp(_log_probability(logits[unknown], known[unknown], leaves_under))
        correct = np.where(known == true, probability / known_probability, 0.0)
        error = expected_calibration_error(_bin(probability, correct, bins=15))
        return error, calibration_error_by_chance(probability, probability**2 * (1 / known_probability - 1))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = labelled_documents(taxonomy, prediction.predictions, prediction.label_ids)
        if not labels.size:
            raise InputError("no document to be scored has a label; give a file with labels")
        predictions, _ = predicted_leaves(logits)
        is_leaf = labels < taxonomy.num_leaves
        metrics: dict[str, float] = {}
        if is_leaf.any():
            metrics |= _flat_scores(labels[is_leaf], predictions[is_leaf])
        at_label = paths[predictions, levels[labels] - 1]
        known = np.where(is_leaf | (at_label < 0), predictions, at_label)
        metrics |= hierarchical_f1.compute(predictions=known, references=labels, parents=taxonomy.parents)
        metrics["log_loss"] = float(-_log_probability(logits, labels, leaves_under).mean())
        metrics |= _level_scores(paths[labels], paths[predictions], is_leaf)
        reached = {f"level_{level + 1}_": level for level in range(taxonomy.depth) if (paths[labels, level] >= 0).any()}
        for prefix, level in {**({"": taxonomy.depth - 1} if is_leaf.any() else {}), **reached}.items():
            errors = calibration_errors(level, labels, predictions, logits)
            metrics |= dict(zip((f"{prefix}ece", f"{prefix}ece_by_chance"), errors, strict=True))
        return metrics

    return compute_metrics


def any_label_accuracy(logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> float | None:
    """Compute the share of documents whose predicted leaf is the label of any document with the same text.

    Corpora repeat texts under several labels. `accuracy` counts a prediction as wrong even if another row has that label.

    Args:
        logits: (num_documents, num_leaves).
        labels: (num_documents,), node ids or -100; only documents labelled with a leaf count.
        texts: (num_documents,), the same number for the same text.

    Returns:
        None if no document is labelled with a leaf.
    """
    is_leaf = (labels >= 0) & (labels < logits.shape[1])
    if not is_leaf.any():
        return None
    correct = set(zip(texts[is_leaf].tolist(), labels[is_leaf].tolist(), strict=True))
    predictions = zip(texts[is_leaf].tolist(), logits[is_leaf].argmax(axis=1).tolist(), strict=True)
    return float(np.mean([prediction in correct for prediction in predictions]))


def bootstrap_intervals(
    labels: np.ndarray, predictions: np.ndarray, num_leaves: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, np.ndarray]:
    """Compute percentile bootstrap intervals over documents (Efron and Tibshirani, 1993, chapter 13).

    Resampling lowers macro-F1 if classes have few documents, because a resample lacks some of them. With 200 classes of three
    documents the score itself was above its interval. So the resamples of macro-F1 are shifted to have the score as mean.

    Args:
        labels, predictions: (num_documents,), leaf ids; at least one document.
        level: the share of resamples inside the interval.

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
    ends = (50 * (1 - level), 50 * (1 + level))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # for leaves in no resample
        return {name: np.nanpercentile(samples, ends, axis=0) for name, samples in values.items()}


def per_class_report(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray
) -> tuple[list[dict], dict[str, list[float]]]:
    """Compute scikit-learn's precision, recall and F1 of each leaf, over the documents labelled with a leaf.

    Args:
        logits: (num_documents, num_leaves).
        labels: (num_documents,), node ids or -100.

    Returns:
        One row per leaf, in the order of ids: ``label``, ``support`` (its number of documents), ``precision``, ``recall``,
        ``f1`` and ``f1_interval``, the 95 % interval of `bootstrap_intervals` or None. A ratio with denominator 0 is 0.
        Then the intervals of ``accuracy`` and ``macro_f1``. Both are empty if no document is labelled with a leaf.

    Raises:
        InputError: arrays of wrong shapes, unknown label ids, logits that are not finite.
    """
    logits, labels = labelled_documents(taxonomy, logits, labels)
    is_leaf = labels < taxonomy.num_leaves
    if not is_leaf.any():
        return [], {}
    labels, predictions = labels[is_leaf], logits[is_leaf].argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(taxonomy.num_leaves), zero_division=0
    )
    intervals = bootstrap_intervals(labels, predictions, taxonomy.num_leaves)
    ends = intervals["f1"]
    rows = [
        {
            "label": taxonomy.labels[leaf],
            "support": int(support[leaf]),
            "precision": float(precision[leaf]),
            "recall": float(recall[leaf]),
            "f1": float(f1[leaf]),
            "f1_interval": ends[:, leaf].tolist() if np.isfinite(ends[:, leaf]).all() else None,
        }
        for leaf in range(taxonomy.num_leaves)
    ]
    return rows, {name: intervals[name].tolist() for name in ("accuracy", "macro_f1")}


def calibration_bins(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Bin documents by the predicted leaf's probability, in bins of equal width (Guo et al., 2017).

    Bin m of M holds the probabilities in ((m - 1) / M, m / M]. Only documents labelled with a leaf count.

    Args:
        logits: (num_documents, num_leaves).
        labels: (num_documents,), node ids or -100.
        bins: M.

    Returns:
        ``confidence`` and ``accuracy``, the mean in each bin (NaN in an empty bin), and ``count``; (bins,) each.

    Raises:
        InputError: arrays of wrong shapes, logits that are not finite.
    """
    _check_arrays(logits, labels)
    is_leaf = (labels >= 0) & (labels < logits.shape[1])
    predictions, confidence = predicted_leaves(logits[is_leaf])
    return _bin(confidence, predictions == labels[is_leaf], bins)


def expected_calibration_error(bins: dict[str, np.ndarray]) -> float:
    """Compute the mean over documents of their bin's |accuracy - confidence| (Guo et al., 2017, equation 3).

    Args:
        bins: from `calibration_bins`, with at least one document.
    """
    filled = bins["count"] > 0
    gaps = np.abs(bins["accuracy"][filled] - bins["confidence"][filled])
    return float(np.average(gaps, weights=bins["count"][filled]))


def calibration_error_by_chance(confidence: np.ndarray, variance: np.ndarray | None = None, bins: int = 15) -> float:
    """Compute the expected value of `expected_calibration_error` if the probabilities are correct.

    In a bin with probabilities p, the number of correct predictions has the variance v = Σ p (1 - p). Its mean absolute
    deviation is √(2 v / π) in the normal approximation.

    Args:
        confidence: (num_documents,), the probability of each prediction; at least one document.
        variance: (num_documents,); p (1 - p) by default.
    """
    variance = confidence * (1 - confidence) if variance is None else variance
    variances = np.bincount(_bin_index(confidence, bins), weights=variance, minlength=bins)
    return float(np.sqrt(2 * np.maximum(variances, 0) / np.pi).sum() / len(confidence))


def labelled_documents(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check the arrays, and return the logits and labels of the labelled documents.

    Args:
        logits: (num_documents, num_leaves).
        labels: (num_documents,), node ids or -100.

    Raises:
        InputError: arrays of wrong shapes, unknown label ids, logits that are not finite.
    """
    _check_arrays(logits, labels)
    if logits.shape[1] != taxonomy.num_leaves:
        raise InputError(
            f"the logits have {logits.shape[1]} columns, but the taxonomy has {taxonomy.num_leaves} leaves"
        )
    wrong = np.flatnonzero((labels != UNLABELLED) & ((labels < 0) | (labels >= taxonomy.num_nodes)))
    if wrong.size:
        raise InputError(
            f"document {wrong[0]} has the label id {labels[wrong[0]]}; the taxonomy has nodes 0 to "
            f"{taxonomy.num_nodes - 1}, and {UNLABELLED} stands for no label"
        )
    has_label = labels != UNLABELLED
    return logits[has_label], labels[has_label]


def predicted_leaves(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable leaf of each document and its probability: (num_documents,) each.

    Args:
        logits: (num_documents, num_leaves).
    """
    confidence = np.concatenate([np.exp(block.max(axis=1)) for _, block in _log_probs(logits)] or [np.empty(0)])
    return logits.argmax(axis=1), confidence


def _check_arrays(logits: np.ndarray, labels: np.ndarray) -> None:
    shapes = [getattr(array, "shape", type(array).__name__) for array in (logits, labels)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise InputError(
            f"expected logits of shape (num_documents, num_leaves) and one label id a document, not {shapes[0]} and "
            f"{shapes[1]}; list other outputs of the model in its configuration's keys_to_ignore_at_inference"
        )
    if labels.dtype.kind not in "iu":
        raise InputError(f"label ids must be integers, not {labels.dtype}")
    infinite = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if infinite.size:
        raise InputError(
            f"the model's logits are not finite for {infinite.size} of {len(logits)} documents, the first at row {infinite[0]}: "
            "training has diverged; lower --learning_rate"
        )


def _load_hierarchical_f1() -> evaluate.EvaluationModule:
    with tempfile.TemporaryDirectory() as folder:  # the module makes a data folder even with keep_in_memory
        try:
            return evaluate.load(str(HIERARCHICAL_F1), keep_in_memory=True, cache_dir=folder)
        except OSError as error:
            raise InputError(
                f"the `evaluate` library cannot copy {HIERARCHICAL_F1} into {evaluate.config.HF_MODULES_CACHE} "
                f"({error.strerror or error}); set HF_MODULES_CACHE to a writable folder"
            ) from error


def _log_probs(logits: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of documents: their rows, and their leaf log-probabilities (block, num_leaves) in float64."""
    size = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        yield rows, log_softmax(logits[rows].astype(np.float64), axis=1)


def _flat_scores(true: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(true, predictions)),
        "macro_f1": float(f1_score(true, predictions, average="macro", zero_division=0)),
        "weighted_f1": float(f1_score(true, predictions, average="weighted", zero_division=0)),
    }


def _log_probability(logits: np.ndarray, nodes: np.ndarray, leaves_under: np.ndarray) -> np.ndarray:
    """Compute the log-probability of one node per document, (num_documents,), from leaf logits."""
    blocks = _log_probs(logits)
    return np.concatenate(
        [logsumexp(np.where(leaves_under[nodes[rows]], log_probs, -np.inf), axis=1) for rows, log_probs in blocks]
    )


def _level_scores(true: np.ndarray, predicted: np.ndarray, is_leaf: np.ndarray) -> dict[str, float]:
    """Compute accuracy and macro-F1 of each level.

    Args:
        true, predicted: paths, (num_documents, depth), -1 below their ends.
        is_leaf: (num_documents,), whether the label is a leaf.
    """
    scores = {}
    for level, (nodes, predictions) in enumerate(zip(true.T, predicted.T, strict=True), start=1):
        reached = nodes >= 0
        if not reached.any():
            continue
        known = reached | is_leaf
        occurring = np.union1d(nodes[known], predictions[known])
        classes = occurring[occurring >= 0]
        f1 = f1_score(nodes[known], predictions[known], labels=classes, average="macro", zero_division=0)
        scores[f"level_{level}_accuracy"] = float(accuracy_score(nodes[reached], predictions[reached]))
        scores[f"level_{level}_macro_f1"] = float(f1)
    return scores


def _bin_index(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.digitize(confidence, np.arange(1, bins) / bins, right=True)


def _bin(confidence: np.ndarray, correct: np.ndarray, bins: int) -> dict[str, np.ndarray]:
    index = _bin_index(confidence, bins)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is an empty bin
        return {
            "confidence": np.bincount(index, weights=confidence, minlength=bins) / count,
            "accuracy": np.bincount(index, weights=correct, minlength=bins) / count,
            "count": count,
        }

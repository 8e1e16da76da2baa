"""Calibrate and score hierarchical multi-label predictions; fit thresholds, and answers with a guaranteed recall.

Worth knowing:

1. Each node is a decision with a score z, given its parent: P(node) = P(parent) · σ(z). A decision is open for a text if the
   text has the parent, or the node is a root. Only open decisions tell how well z is calibrated, so z is fitted on these
   pairs of text and node, never on marginal probabilities.
2. The calibration is z = a · (s + γ · w) + b, with the encoder's score s and the lexical score w. First one a and one γ are
   fitted for all nodes, with prior means 1 and 0. Then each node's own a and b are fitted, with the common a and 0 as prior
   means. All priors are normal with the standard deviation of `evaluation.calibration`. Both fits are convex.
3. The thresholds shrink to a common one. A node's own threshold is the one of best F1. It is fitted from the deepest level
   upwards, because a chosen child brings its parent. A node with few positives gets a threshold near the common one.
4. The guarantee is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, 2022). The loss of a text is the share
   of its true nodes that the set {P(node) >= t} misses. Texts without true nodes have no such share, and do not count. The
   scores must come from a model that was not fitted to these texts, hence `held_out`.
5. Labels are (num_texts, num_nodes): 1, 0, or -100 for unknown; a node with the label 1 has it at all ancestors too. Unknown
   pairs count in no fit and in no score. Marginal logits u are those whose sigmoid is P(node).
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from itertools import accumulate

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.model_selection import GroupKFold, KFold
from transformers import EvalPrediction

from errors import InputError
from evaluation.calibration import FOLDS, PRIOR, RANGE
from evaluation.metrics import _bin as calibration_bins
from evaluation.metrics import calibration_error_by_chance, expected_calibration_error
from modeling_hierarchical import IGNORED_LABEL, TreeSigmoid
from taxonomy_hierarchical import Taxonomy

LEAST_PROBABILITY = 0.1  # pairs below it are not in the calibration error: nearly all pairs have a probability near 0
BINS = 15
STRENGTHS = (math.inf, 100, 50, 20, 10, 5, 2, 0)  # of the shrinkage of thresholds, in positives


# Calibration


@dataclass(frozen=True)
class MultiLabelCalibration:
    """The parameters of z = a · (s + γ · w) + b.

    Attributes:
        lexical_weight: γ; 0 means no lexical head.
        node_scales, node_biases: a and b, (num_nodes,) each, as in `HierarchicalConfig`.
    """

    lexical_weight: float
    node_scales: list[float]
    node_biases: list[float]

    def apply(self, taxonomy: Taxonomy, z: np.ndarray, lexical: np.ndarray | None) -> np.ndarray:
        """Return the calibrated marginal logits, (num_texts, num_nodes) float64.

        Args:
            z: (num_texts, num_nodes), the encoder's conditional scores.
            lexical: (num_texts, num_nodes), or None without a lexical head.
        """
        scores = z.astype(np.float64)
        if lexical is not None:
            scores += self.lexical_weight * lexical
        return marginal_logits(taxonomy, np.array(self.node_scales) * scores + np.array(self.node_biases))


def marginal_logits(taxonomy: Taxonomy, z: np.ndarray) -> np.ndarray:
    """Compute marginal logits from conditional scores, both (num_texts, num_nodes), in float64."""
    return TreeSigmoid(taxonomy).marginal_logits(torch.tensor(z, dtype=torch.float64)).numpy()


def open_decisions(taxonomy: Taxonomy, labels: np.ndarray) -> np.ndarray:
    """Return whether a node is open for a text, (num_texts, num_nodes): its label is known, and its parent's is 1 or it is a root."""
    return TreeSigmoid(taxonomy).open_decisions(torch.from_numpy(labels)).numpy()


def fit_calibration(
    taxonomy: Taxonomy, z: np.ndarray, lexical: np.ndarray | None, labels: np.ndarray
) -> MultiLabelCalibration:
    """Return the MAP estimate of the calibration on the open decisions.

    Args:
        z, lexical: as for `MultiLabelCalibration.apply`.
        labels: (num_texts, num_nodes).

    Returns:
        A weight of at least 0, scales in [0.05, 20], and biases. A node without open decisions has the prior means: the common
        scale and the bias 0.
    """
    is_open = open_decisions(taxonomy, labels)
    true = labels == 1
    experts = [scores.astype(np.float64) for scores in (z, lexical) if scores is not None]

    # common to all nodes
    features = np.column_stack([scores[is_open] for scores in experts])
    mean, bounds = np.array([1.0, 0.0])[: len(experts)], [RANGE, (0.0, RANGE[1])][: len(experts)]
    common = map_estimate(features, true[is_open], mean, bounds)
    weights = common / common[0]
    scores = sum(weight * expert for weight, expert in zip(weights, experts, strict=True))

    # each node's own
    fitted = np.empty((taxonomy.num_nodes, 2))
    for node in range(taxonomy.num_nodes):
        rows = is_open[:, node]
        features = np.column_stack([scores[rows, node], np.ones(np.count_nonzero(rows))])
        fitted[node] = map_estimate(features, true[rows, node], np.array([common[0], 0.0]), [RANGE, (None, None)])
    return MultiLabelCalibration(
        lexical_weight=float(weights[1]) if len(experts) == 2 else 0.0,
        node_scales=fitted[:, 0].tolist(),
        node_biases=fitted[:, 1].tolist(),
    )


def map_estimate(features: np.ndarray, true: np.ndarray, mean: np.ndarray, bounds: list[tuple]) -> np.ndarray:
    """Return the MAP estimate of a logistic regression with normal priors.

    Args:
        features: (num_decisions, num_parameters).
        true: (num_decisions,), bool.
        mean: (num_parameters,), of the priors; their standard deviation is `PRIOR`.
        bounds: (least, greatest) of each parameter, None for none.
    """

    def neg_log_posterior(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits, shift = features @ parameters, parameters - mean
        value = (np.logaddexp(0, logits) - true * logits).sum() + (shift**2).sum() / (2 * PRIOR**2)
        return value, features.T @ (expit(logits) - true) + shift / PRIOR**2

    if not len(true):
        return mean
    return minimize(neg_log_posterior, x0=mean, jac=True, bounds=bounds, method="L-BFGS-B").x


def held_out(
    taxonomy: Taxonomy, z: np.ndarray, lexical: np.ndarray | None, labels: np.ndarray, texts: np.ndarray
) -> np.ndarray:
    """Calibrate each fifth of the texts with parameters fitted on the other fifths (cross-validation).

    Args:
        z, lexical, labels: as for `fit_calibration`.
        texts: (num_texts,), the same number for the same text.

    Returns:
        Marginal logits, (num_texts, num_nodes).
    """
    calibrated = np.empty(z.shape)
    folds = min(FOLDS, len(np.unique(texts)))
    if folds == 1:
        return fit_calibration(taxonomy, z, lexical, labels).apply(taxonomy, z, lexical)
    for fitted, scored in GroupKFold(folds, shuffle=True, random_state=0).split(z, groups=texts):
        words = (None, None) if lexical is None else (lexical[fitted], lexical[scored])
        calibration = fit_calibration(taxonomy, z[fitted], words[0], labels[fitted])
        calibrated[scored] = calibration.apply(taxonomy, z[scored], words[1])
    return calibrated


# Thresholds


def choose(taxonomy: Taxonomy, probabilities: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Return the chosen nodes: those that reach their thresholds, and their ancestors.

    Args:
        probabilities: (num_texts, num_nodes).
        thresholds: (num_nodes,), or one for all nodes.

    Returns:
        (num_texts, num_nodes) bool, closed upwards.
    """
    paths = [taxonomy.path(node) for node in range(taxonomy.num_nodes)]
    pointers = np.cumsum([0, *map(len, paths)])
    indices = np.concatenate(paths)
    lineage = csr_matrix((np.ones(len(indices), np.float32), indices, pointers), shape=(taxonomy.num_nodes,) * 2)
    return (csr_matrix(probabilities >= thresholds, dtype=np.float32) @ lineage).toarray() > 0


def best_threshold(scores: np.ndarray, true: np.ndarray, forced: int = 0, forced_true: int = 0) -> float | None:
    """Return the threshold of best F1, halfway between two scores (half a unit beyond the first or last one).

    Args:
        scores, true: (num_pairs,); a pair is chosen if its score reaches the threshold.
        forced, forced_true: the number of further pairs that are chosen whatever the threshold, and of true ones among them.

    Returns:
        None if no pair is true, or if there is nothing to choose. The greatest threshold of equally good ones.
    """
    if not len(scores) or not (true.any() or forced_true):
        return None
    order = np.argsort(-scores)
    padded = np.concatenate([[scores[order[0]] + 1], scores[order], [scores[order[-1]] - 1]])
    found = forced_true + np.concatenate([[0], np.cumsum(true[order])])
    f1 = 2 * found / (forced + np.arange(len(found)) + found[-1])
    f1[padded[:-1] == padded[1:]] = -1  # no threshold separates equal scores
    best = np.argmax(f1)
    return float(padded[best] + padded[best + 1]) / 2


def fit_node_thresholds(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fit the threshold of each node, (num_nodes,) probabilities.

    A node's own threshold is the one of best F1, given the choices below it. It is averaged with the common threshold of
    best micro-F1, in logits, with weights k and m: k is the node's number of positives. m is the value of `STRENGTHS` with the
    greatest sum of micro- and macro-F1 in cross-validation; of equally good ones the greatest.

    Args:
        u: (num_texts, num_nodes), calibrated marginal logits that were not fitted to these texts.
        labels: (num_texts, num_nodes).

    Returns:
        0.5 for all nodes if no label is 1.
    """
    if len(u) > 1:
        totals = dict.fromkeys(STRENGTHS, np.zeros((3, taxonomy.num_nodes)))
        for fitted, scored in KFold(min(FOLDS, len(u)), shuffle=True, random_state=0).split(u):
            for strength, thresholds in shrunk_thresholds(taxonomy, u[fitted], labels[fitted], STRENGTHS).items():
                chosen = choose(taxonomy, expit(u[scored]), thresholds)
                totals[strength] = totals[strength] + node_counts(chosen, labels[scored])
        best = max(STRENGTHS, key=lambda strength: micro_f1(totals[strength]) + macro_f1(totals[strength]))
    else:
        best = math.inf
    return shrunk_thresholds(taxonomy, u, labels, (best,))[best]


def shrunk_thresholds(
    taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray, strengths: tuple[float, ...]
) -> dict[float, np.ndarray]:
    """Fit the thresholds of all nodes for each strength of the shrinkage, see `fit_node_thresholds`."""
    u, labels = np.asfortranarray(u), np.asfortranarray(labels)  # columns are read one by one
    known, true = labels != IGNORED_LABEL, labels == 1
    common = best_threshold(u[known], true[known])
    if common is None:
        return dict.fromkeys(strengths, np.full(taxonomy.num_nodes, 0.5))
    positives, deepest_first = true.sum(axis=0), np.argsort(-np.array(taxonomy.levels), kind="stable")
    of_leaves = [
        best_threshold(u[rows, node], true[rows, node]) for node, rows in enumerate(known.T[: taxonomy.num_leaves])
    ]

    fitted = {}
    for strength in strengths:
        thresholds, chosen = np.full(taxonomy.num_nodes, common), np.zeros(u.shape, dtype=bool, order="F")
        for node in deepest_first:
            rows, forced = known[:, node], chosen[:, taxonomy.children(node)].any(axis=1)
            if math.isfinite(strength):
                own = of_leaves[node] if node < taxonomy.num_leaves else best_threshold(
                    u[rows & ~forced, node], true[rows & ~forced, node],
                    np.count_nonzero(rows & forced), np.count_nonzero(true[forced, node]),
                )  # fmt: skip
                if own is not None and positives[node]:
                    total = positives[node] + strength
                    thresholds[node] = (positives[node] * own + strength * common) / total
            chosen[:, node] = forced | (u[:, node] >= thresholds[node])
        fitted[strength] = expit(thresholds)
    return fitted


# Answers with a guaranteed recall


def fit_recall_thresholds(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray) -> tuple[list[float | None], int]:
    """Fit the thresholds of answers for the recalls 0.01, …, 0.99, see `HierarchicalConfig`.

    The threshold of a recall is the greatest t with (Σ loss + 1) / (n + 1) <= 1 - recall. A text's loss is the share of its
    true nodes with P(node) < t. The sum changes at probabilities of true nodes only, and is computed in integers, so that t
    is exact. It is rounded down to 6 decimals, which misses no more.

    Args:
        u: (num_texts, num_nodes), calibrated marginal logits that were not fitted to these texts.
        labels: (num_texts, num_nodes). Only texts with a label 1 count.

    Returns:
        The thresholds; a single one is None if its recall needs more texts: 1 / (n + 1) > 1 - recall. Then n.
    """
    true = labels == 1
    sizes = true.sum(axis=1)
    num_texts = int(np.count_nonzero(sizes))  # Python's integers below have no limit
    rows, nodes = np.nonzero(true)
    probabilities = expit(u[rows, nodes].astype(np.float64))
    order = np.argsort(probabilities)
    # losses in units of which each true node of any text is a whole number; the loss of a text that misses all is `whole`
    whole = math.lcm(*np.unique(sizes[sizes > 0]).tolist())
    losses = list(accumulate(whole // size for size in sizes[rows[order]].tolist()))  # at t just above each probability

    thresholds: list[float | None] = []
    for percent in range(1, 100):
        budget = ((100 - percent) * (num_texts + 1) - 100) * whole // 100
        thresholds.append(None if budget < 0 else round_down(probabilities[order[bisect_right(losses, budget)]]))
    return thresholds, num_texts


def round_down(probability: float) -> float:
    """Round a probability down to 6 decimals: a smaller threshold misses no more."""
    return float(Decimal(float(probability)).quantize(Decimal("1e-6"), rounding=ROUND_FLOOR))


def recall_scores(u: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """Measure the answers {P(node) >= threshold} on the texts with a label 1.

    Args:
        u, labels: (num_texts, num_nodes).

    Returns:
        ``recall``, the mean share of a text's true nodes in its answer, and ``nodes``, the mean number of nodes in an answer.
        Empty without such texts.
    """
    true = labels == 1
    has_label = true.any(axis=1)
    if not has_label.any():
        return {}
    true, answers = true[has_label], expit(u[has_label].astype(np.float64)) >= threshold
    recall = (true & answers).sum(axis=1) / true.sum(axis=1)
    return {"recall": float(recall.mean()), "nodes": float(answers.sum(axis=1).mean())}


# Metrics


def build_multi_label_metrics(
    taxonomy: Taxonomy, thresholds: np.ndarray | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's ``compute_metrics`` for a taxonomy and several labels a text.

    The returned function takes ``predictions``, marginal logits (num_texts, num_nodes) or a tuple that begins with them, and
    ``label_ids`` (num_texts, num_nodes). Predictions and labels are closed upwards. It returns:

    - ``micro_f1``: over all pairs of text and node. With closed sets this is the hierarchical F1 (Kiritchenko, Matwin and
      Famili, 2005). ``macro_f1``: the mean over nodes that occur in labels or predictions.
    - ``leaf_micro_f1``, ``leaf_macro_f1``, ``level_k_micro_f1``: the same over the leaves, and over the nodes of each level
      that some label reaches.
    - ``example_f1``: the mean over texts with a known label; 1 where neither the labels nor the prediction has a node.
    - ``mean_average_precision``: of scikit-learn's average precision, over nodes with a label 1; left out if there is none.
    - ``log_loss``: the mean binary cross-entropy of the marginals over pairs, in nats.
    - ``ece``, ``ece_by_chance``: the calibration error, see `expected_calibration_error`, and its expected value for correct
      probabilities, over pairs with P(node) >= 0.1. Left out if there is none.

    Args:
        thresholds: (num_nodes,), probabilities; by default the common one that maximises micro-F1 on the scored texts.

    Raises:
        InputError: by the returned function, for logits that are not finite and if no label is known.
    """
    levels = np.array(taxonomy.levels)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        u = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        u, labels = u.astype(np.float64), prediction.label_ids
        known, true = labels != IGNORED_LABEL, labels == 1
        if not known.any():
            raise InputError("no document to be scored has a label; give a file with labels")
        infinite = np.flatnonzero(~np.isfinite(u).all(axis=1))
        if infinite.size:
            raise InputError(
                f"the model's logits are not finite for {infinite.size} of {len(u)} documents, the first at row "
                f"{infinite[0]}: training has diverged; lower --learning_rate"
            )
        chosen = choose(taxonomy, expit(u), common_threshold(u, labels) if thresholds is None else thresholds)

        counts = node_counts(chosen, labels)
        leaves = counts[:, : taxonomy.num_leaves]
        metrics = {
            **{"micro_f1": micro_f1(counts), "macro_f1": macro_f1(counts)},
            **{"leaf_micro_f1": micro_f1(leaves), "leaf_macro_f1": macro_f1(leaves)},
            "example_f1": example_f1(chosen, labels),
        }
        if true.any():
            metrics["mean_average_precision"] = float(np.nanmean(average_precisions(u, labels)))
        metrics["log_loss"] = float((np.logaddexp(0, u) - true * u)[known].mean())
        for level in range(1, taxonomy.depth + 1):
            if true[:, levels == level].any():
                metrics[f"level_{level}_micro_f1"] = micro_f1(counts[:, levels == level])
        confidence, correct = likely_pairs(u, labels)
        if len(confidence):
            metrics["ece"] = expected_calibration_error(calibration_bins(confidence, correct, BINS))
            metrics["ece_by_chance"] = calibration_error_by_chance(confidence, confidence * (1 - confidence))
        return metrics

    return compute_metrics


def common_threshold(u: np.ndarray, labels: np.ndarray) -> float:
    """Return the one probability from which nodes are chosen with the best micro-F1; 0.5 if no label is 1."""
    known = labels != IGNORED_LABEL
    threshold = best_threshold(u[known], labels[known] == 1)
    return 0.5 if threshold is None else float(expit(threshold))


def node_counts(chosen: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count each node's true positives, predictions and labels: (3, num_nodes). Unknown labels do not count."""
    true, chosen = labels == 1, chosen & (labels != IGNORED_LABEL)
    return np.stack([pairs.sum(axis=0) for pairs in (true & chosen, chosen, true)])


def node_f1(counts: np.ndarray) -> np.ndarray:
    """Compute F1 (…, num_nodes) from counts (3, …, num_nodes); NaN for a node in no label and no prediction."""
    occurring = counts[1] + counts[2]
    return np.where(occurring > 0, 2 * counts[0] / np.maximum(occurring, 1), np.nan)


def micro_f1(counts: np.ndarray) -> float:
    """Compute F1 over all pairs from counts (3, num_nodes); 0 without a label and a prediction."""
    return float(2 * counts[0].sum() / max(counts[1:].sum(), 1))


def macro_f1(counts: np.ndarray) -> float:
    """Compute the mean F1 of the nodes that occur in labels or predictions from counts (3, num_nodes); 0 if none does."""
    return float(np.nanmean(node_f1(counts))) if counts.any() else 0.0


def example_f1(chosen: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean F1 of texts with a known label; 1 where neither the labels nor the prediction has a node."""
    is_known = (labels != IGNORED_LABEL).any(axis=1)
    f1 = node_f1(node_counts(chosen[is_known].T, labels[is_known].T))
    return float(np.nan_to_num(f1, nan=1.0).mean())


def average_precisions(u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute scikit-learn's average precision of each node, (num_nodes,); NaN for a node without a label 1."""
    precisions = np.full(u.shape[1], np.nan)
    for node, (scores, truth) in enumerate(zip(u.T, labels.T, strict=True)):
        positive = np.sort(scores[truth == 1])
        if len(positive):
            ranked = np.sort(scores[truth != IGNORED_LABEL])
            found = len(positive) - np.searchsorted(positive, positive)  # at or above each positive
            precisions[node] = (found / (len(ranked) - np.searchsorted(ranked, positive))).mean()
    return precisions


def likely_pairs(u: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return P(node) and whether the label is 1, of the pairs with a known label and P(node) >= 0.1: (num_pairs,) each."""
    probabilities = expit(u.astype(np.float64))
    likely = (labels != IGNORED_LABEL) & (probabilities >= LEAST_PROBABILITY)
    return probabilities[likely], labels[likely] == 1


def per_node_report(
    taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray, thresholds: np.ndarray
) -> tuple[list[dict], dict[str, list[float]]]:
    """Compute precision, recall and F1 of each node, with 95 % intervals.

    Args:
        u, labels: (num_texts, num_nodes).
        thresholds: (num_nodes,), probabilities.

    Returns:
        One row per node, in the order of ids: ``label``, ``support`` (its number of labels), ``precision``, ``recall``, ``f1``
        and ``f1_interval``, the interval of `bootstrap_intervals` or None. A ratio with denominator 0 is 0. Then the intervals
        of ``micro_f1`` and ``macro_f1``. Both are empty if no label is known.
    """
    if not (labels != IGNORED_LABEL).any():
        return [], {}
    chosen = choose(taxonomy, expit(u.astype(np.float64)), thresholds)
    counts, intervals = node_counts(chosen, labels), bootstrap_intervals(chosen, labels)
    precision, recall = counts[0] / np.maximum(counts[1:], 1)
    f1, ends = np.nan_to_num(node_f1(counts)), intervals["f1"]
    rows = [
        {
            "label": label,
            "support": int(counts[2, node]),
            "precision": float(precision[node]),
            "recall": float(recall[node]),
            "f1": float(f1[node]),
            "f1_interval": ends[:, node].tolist() if np.isfinite(ends[:, node]).all() else None,
        }
        for node, label in enumerate(taxonomy.labels)
    ]
    return rows, {name: intervals[name].tolist() for name in ("micro_f1", "macro_f1")}


def bootstrap_intervals(chosen: np.ndarray, labels: np.ndarray, resamples: int = 1000) -> dict[str, np.ndarray]:
    """Compute 95 % percentile bootstrap intervals over texts (Efron and Tibshirani, 1993, chapter 13).

    The resamples of macro-F1 are shifted to have the score as mean, see `evaluation.metrics.bootstrap_intervals`.

    Args:
        chosen, labels: (num_texts, num_nodes).

    Returns:
        Lower and upper end: (2,) for ``micro_f1`` and ``macro_f1``, (2, num_nodes) for ``f1`` of each node, over the resamples
        in which the node occurs, NaN if it never does.
    """
    true, chosen = labels == 1, chosen & (labels != IGNORED_LABEL)
    pairs = [csr_matrix(array, dtype=np.float64) for array in (true & chosen, chosen, true)]
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(labels), size=len(labels)) for _ in range(resamples))
    times = np.stack([np.bincount(rows, minlength=len(labels)) for rows in draws]).astype(np.float64)
    counts = np.stack([times @ array for array in pairs])  # (3, resamples, num_nodes)
    f1 = node_f1(counts)
    samples = {
        "micro_f1": np.array([micro_f1(sample) for sample in counts.swapaxes(0, 1)]),
        "macro_f1": np.array([macro_f1(sample) for sample in counts.swapaxes(0, 1)]),
    }
    samples["macro_f1"] += macro_f1(node_counts(chosen, labels)) - samples["macro_f1"].mean()
    samples["macro_f1"] = samples["macro_f1"].clip(0, 1)
    intervals = {name: np.percentile(values, (2.5, 97.5)) for name, values in samples.items()}
    ends = np.full((2, labels.shape[1]), np.nan)
    occurring = ~np.isnan(f1).all(axis=0)
    if occurring.any():
        ends[:, occurring] = np.nanpercentile(f1[:, occurring], (2.5, 97.5), axis=0)
    return {**intervals, "f1": ends}

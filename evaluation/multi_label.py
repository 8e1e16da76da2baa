"""Calibrate and score hierarchical multi-label predictions; fit thresholds, and answers with a guaranteed recall.

Worth knowing:

1. Each node is a decision with a score z, given its parent: P(node) = P(parent) · σ(z). It is open for a text that has the
   parent, or if the node is a root. Only open decisions show how well z is calibrated, so z is fitted on these pairs.
2. The calibration is z = a · (s + γ · w) + b, with the encoder's score s and the lexical score w. First one a and one γ are
   fitted for all nodes, with prior means 1 and 0. Then each node's own a and b are fitted, with the common a and 0 as prior
   means. All priors are normal with the standard deviation of `evaluation.calibration`. Both fits are convex.
3. Each node's threshold of best F1 is shrunk towards a common one, most if the node has few positives. Thresholds are fitted
   from the deepest level upwards, because the parent of a predicted node is predicted, too.
4. The guarantee is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, 2022). The loss of a text is the share
   of its true nodes that the set {P(node) >= t} misses. Texts without true nodes do not count. The scores must come from a
   model that was not fitted to these texts, hence `evaluation.calibration.calibrate_out_of_fold`.
5. With ``--incomplete_labels``, a node is unknown only in texts that have a node above it. So its known pairs hold too many
   texts without that node, and P(node) is judged by open decisions, see `judged_pairs`.

In this file ``labels`` are 1, 0, or -100 for unknown; a node with the label 1 has it at all ancestors too. Unknown pairs count
in no fit and in no score. ``z`` and ``lexical`` are conditional scores, the latter None without a lexical head, and ``u``
marginal logits, whose sigmoid is P(node). All are (num_texts, num_nodes), and ``thresholds`` are probabilities, (num_nodes,).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context
from itertools import accumulate

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import average_precision_score
from sklearn.model_selection import RepeatedKFold
from transformers import EvalPrediction

from evaluation.calibration import FOLDS, PRIOR_STD, SCALE_BOUNDS
from evaluation.metrics import (
    bin_index,
    calibration_bins,
    calibration_error_by_chance,
    check_finite,
    confusion_counts,
    expected_calibration_error,
    macro_f1,
    micro_f1,
    node_f1,
)
from modeling_hierarchical import IGNORED_LABEL, ROOT_PARENT_LOGIT, TreeSigmoid
from taxonomy_hierarchical import Taxonomy
from training.label_arrays import open_decisions

SIX_DIGITS_DOWN = Context(prec=6, rounding=ROUND_FLOOR)
MIN_PROBABILITY = 0.1  # pairs below it are not in the calibration error: nearly all pairs have a probability near 0
PAIRS_AT_ONCE = 256  # of a text, compared with all its pairs: tens of thousands at once would take many gigabytes
SMALLEST_GAP = 1e-9  # between the logits of a node and its parent, where float32 makes them equal
STRENGTHS = (math.inf, 100, 50, 20, 10, 5, 2, 0)  # of the shrinkage of thresholds, in positives
REPEATS = 6  # of the cross-validation that chooses the strength; a single one is too noisy


# ── Calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MultiLabelCalibration:
    """The parameters γ, a and b, as in `HierarchicalConfig`; a lexical weight of 0 means no lexical head."""

    lexical_weight: float
    node_scales: list[float]
    node_biases: list[float]

    def apply(self, taxonomy: Taxonomy, z: np.ndarray, lexical: np.ndarray | None) -> np.ndarray:
        """Return the calibrated marginal logits, in float64."""
        scores = z.astype(np.float64)
        if lexical is not None:
            scores += self.lexical_weight * lexical
        return marginal_logits(taxonomy, np.array(self.node_scales) * scores + np.array(self.node_biases))


def marginal_logits(taxonomy: Taxonomy, z: np.ndarray) -> np.ndarray:
    """Compute marginal logits from conditional scores, in float64."""
    return TreeSigmoid(taxonomy).marginal_logits(torch.tensor(z, dtype=torch.float64)).numpy()


def fit_multi_label_calibration(
    taxonomy: Taxonomy, z: np.ndarray, lexical: np.ndarray | None, labels: np.ndarray
) -> MultiLabelCalibration:
    """Return the MAP estimate on the open decisions: a weight of at least 0, scales in [0.05, 20], and biases.

    A node without open decisions has the prior means: the common scale and the bias 0.
    """
    is_open, true = open_decisions(taxonomy, labels), labels == 1
    experts = [scores.astype(np.float64) for scores in (z, lexical) if scores is not None]

    # common to all nodes
    features = np.column_stack([scores[is_open] for scores in experts])
    mean, bounds = np.array([1.0, 0.0])[: len(experts)], [SCALE_BOUNDS, (0.0, SCALE_BOUNDS[1])][: len(experts)]
    common = map_estimate(features, true[is_open], mean, bounds)
    weights = common / common[0]
    scores = sum(weight * expert for weight, expert in zip(weights, experts, strict=True))

    # each node's own
    fitted = np.tile([common[0], 0.0], (taxonomy.num_nodes, 1))
    for node in np.flatnonzero(is_open.any(axis=0)):
        rows = is_open[:, node]
        features = np.column_stack([scores[rows, node], np.ones(np.count_nonzero(rows))])
        fitted[node] = map_estimate(
            features, true[rows, node], np.array([common[0], 0.0]), [SCALE_BOUNDS, (None, None)]
        )
    return MultiLabelCalibration(
        lexical_weight=float(weights[1]) if len(experts) == 2 else 0.0,
        node_scales=fitted[:, 0].tolist(),
        node_biases=fitted[:, 1].tolist(),
    )


def map_estimate(features: np.ndarray, true: np.ndarray, mean: np.ndarray, bounds: list[tuple]) -> np.ndarray:
    """Return the MAP estimate of a logistic regression with normal priors of the given means.

    Features are (num_decisions, num_parameters). Bounds are (least, greatest) of each parameter, None for none.
    """

    def neg_log_posterior(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits, shift = features @ parameters, parameters - mean
        value = (np.logaddexp(0, logits) - true * logits).sum() + (shift**2).sum() / (2 * PRIOR_STD**2)
        return value, features.T @ (expit(logits) - true) + shift / PRIOR_STD**2

    if not len(true):
        return mean
    return minimize(neg_log_posterior, x0=mean, jac=True, bounds=bounds, method="L-BFGS-B").x


# ── Thresholds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def predict_nodes(
    taxonomy: Taxonomy, probabilities: np.ndarray, thresholds: np.ndarray | list[float] | float
) -> np.ndarray:
    """Return the nodes that reach their thresholds, and their ancestors: (num_texts, num_nodes) bool."""
    chosen = probabilities >= thresholds
    for parents, children, starts in siblings_by_level(taxonomy):
        chosen[:, parents] |= np.logical_or.reduceat(chosen[:, children], starts, axis=1)
    return chosen


def siblings_by_level(taxonomy: Taxonomy) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, from the deepest level upwards, a level's inner nodes, their children, and where each one's children start."""
    parents, levels = np.array(taxonomy.parents), np.array(taxonomy.levels)
    for level in range(taxonomy.depth, 1, -1):
        children = np.flatnonzero(levels == level)
        children = children[np.argsort(parents[children], kind="stable")]
        above, starts = np.unique(parents[children], return_index=True)
        yield above, children, starts


def best_threshold(scores: np.ndarray, true: np.ndarray, forced: int = 0, forced_true: int = 0) -> float | None:
    """Return the greatest threshold of best F1: halfway between two scores, or half a unit beyond the first or last one.

    Args:
        scores, true: (num_pairs,).
        forced: number of further pairs that are predicted at any threshold, because a node below is predicted.
        forced_true: how many of these are true.

    Returns:
        None if no pair is true, or if there are no scores.
    """
    if not len(scores) or not (true.any() or forced_true):
        return None
    order = np.argsort(-scores)
    padded = np.concatenate([[scores[order[0]] + 1], scores[order], [scores[order[-1]] - 1]])
    true_positives = forced_true + np.concatenate([[0], np.cumsum(true[order])])
    f1 = 2 * true_positives / (forced + np.arange(len(true_positives)) + true_positives[-1])
    f1[padded[:-1] == padded[1:]] = -1  # no threshold separates equal scores
    best = np.argmax(f1)
    return float(padded[best] + padded[best + 1]) / 2


def fit_node_thresholds(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fit one threshold per node, a probability (num_nodes,); 0.5 for all if no label is 1.

    A node's own threshold has the best F1, given the predictions below it. The common threshold has the best micro-F1. The result
    is their weighted mean in logits. The weights are the node's number of positives, and the strength of `choose_strength`. The
    logits must be calibrated by parameters that were fitted to other texts.
    """
    strength = choose_strength(taxonomy, u, labels)
    return shrunk_thresholds(taxonomy, u, labels, (strength,))[strength]


def choose_strength(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray, repeats: int = REPEATS) -> float:
    """Return the value of `STRENGTHS` with the greatest sum of micro- and macro-F1 in repeated cross-validation.

    In a tie, the greatest is returned. With one text, infinity is returned: all nodes get the common threshold.
    """
    if len(u) < 2:
        return math.inf
    totals = dict.fromkeys(STRENGTHS, np.zeros((3, taxonomy.num_nodes)))
    folds = RepeatedKFold(n_splits=min(FOLDS, len(u)), n_repeats=repeats, random_state=0)
    for fitted, scored in folds.split(u):
        for strength, thresholds in shrunk_thresholds(taxonomy, u[fitted], labels[fitted], STRENGTHS).items():
            chosen = predict_nodes(taxonomy, expit(u[scored]), thresholds)
            totals[strength] = totals[strength] + confusion_counts(labels[scored], chosen)
    return max(STRENGTHS, key=lambda strength: micro_f1(totals[strength]) + macro_f1(totals[strength]))


def shrunk_thresholds(
    taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray, strengths: tuple[float, ...]
) -> dict[float, np.ndarray]:
    """Fit the thresholds of all nodes for each strength of the shrinkage, see `fit_node_thresholds`."""
    u, labels = np.asfortranarray(u), np.asfortranarray(labels)  # columns are read one by one
    known, true = labels != IGNORED_LABEL, labels == 1
    common = best_threshold(u[known], true[known])
    if common is None:
        return dict.fromkeys(strengths, np.full(taxonomy.num_nodes, 0.5))

    def own_threshold(node: int, forced: np.ndarray) -> float | None:
        free, forced = known[:, node] & ~forced, known[:, node] & forced
        counts = np.count_nonzero(forced), np.count_nonzero(true[forced, node])
        return best_threshold(u[free, node], true[free, node], *counts)

    def shrunk(node: int, own: float | None, strength: float) -> float:
        return common if own is None else (positives[node] * own + strength * common) / (positives[node] + strength)

    positives, none = true.sum(axis=0), np.zeros(len(u), dtype=bool)
    # a node without positives has no threshold of its own
    with_positives = np.flatnonzero(positives[: taxonomy.num_leaves])
    of_leaves = {leaf: own_threshold(leaf, none) for leaf in with_positives}  # the same for all strengths
    levels, fitted = [*siblings_by_level(taxonomy)], {}
    for strength in strengths:
        thresholds = np.full(taxonomy.num_nodes, common)
        if math.isfinite(strength):
            for leaf, own in of_leaves.items():
                thresholds[leaf] = shrunk(leaf, own, strength)
            chosen = u >= thresholds  # of the nodes below the level that is fitted
            for parents, children, starts in levels:
                # the parent of a chosen node is chosen, too
                forced = np.logical_or.reduceat(chosen[:, children], starts, axis=1)
                for i in np.flatnonzero(positives[parents]):
                    own = own_threshold(parents[i], forced[:, i])
                    thresholds[parents[i]] = shrunk(parents[i], own, strength)
                chosen[:, parents] = forced | (u[:, parents] >= thresholds[parents])
        fitted[strength] = expit(thresholds)
    return fitted


# ── Answers with a guaranteed recall ─────────────────────────────────────────────────────────────────────────────────


def fit_recall_thresholds(u: np.ndarray, labels: np.ndarray) -> tuple[list[float | None], int]:
    """Fit the thresholds of answers for the recalls 0.01, …, 0.99, to logits whose calibration was fitted to other texts.

    The threshold of a recall is the greatest t with (Σ loss + 1) / (n + 1) <= 1 - recall, over the n texts with a label 1.
    The sum changes at probabilities of true nodes only, and is computed in integers, so that t is exact. It is rounded down
    to 6 significant digits, which misses no more.

    Returns:
        The thresholds, None where 1 / (n + 1) > 1 - recall: the recall needs more texts. Then n.
    """
    true = labels == 1
    sizes = true.sum(axis=1)
    num_texts = int(np.count_nonzero(sizes))  # Python's integers below have no limit
    rows, nodes = np.nonzero(true)
    probabilities = expit(u[rows, nodes].astype(np.float64))
    order = np.argsort(probabilities)
    # in integers, so that sums are exact: a text that misses all its s nodes costs `whole`, and each of them whole // s
    whole = math.lcm(*np.unique(sizes[sizes > 0]).tolist())
    losses = list(accumulate(whole // size for size in sizes[rows[order]].tolist()))  # at t just above each probability

    thresholds: list[float | None] = []
    for percent in range(1, 100):
        allowed = ((100 - percent) * (num_texts + 1) - 100) * whole // 100  # the greatest sum of losses
        place = bisect_right(losses, allowed)  # of the first node that must not be missed
        threshold = None
        if allowed >= 0:
            threshold = float(SIX_DIGITS_DOWN.create_decimal_from_float(float(probabilities[order[place]])))
        thresholds.append(threshold)
    return thresholds, num_texts


def recall_scores(u: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """Measure the answers {P(node) >= threshold} on the texts with a label 1.

    ``recall`` is the mean share of a text's true nodes in its answer, ``nodes`` the mean number of nodes in an answer.
    Without such texts, an empty dict is returned.
    """
    has_label = (labels == 1).any(axis=1)
    if not has_label.any():
        return {}
    true, answers = labels[has_label] == 1, expit(u[has_label].astype(np.float64)) >= threshold
    recall = (true & answers).sum(axis=1) / true.sum(axis=1)
    return {"recall": float(recall.mean()), "nodes": float(answers.sum(axis=1).mean())}


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_multi_label_metrics(
    taxonomy: Taxonomy, thresholds: np.ndarray | list[float] | float | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's ``compute_metrics`` for a taxonomy and multi-label data.

    The returned function takes ``predictions``, marginal logits or a tuple that begins with them, and ``label_ids``. It raises
    InputError for logits that are not finite. It returns, with predictions closed upwards:

    - ``micro_f1``: over all pairs of text and node. With closed sets this is the hierarchical F1 (Kiritchenko, Matwin and
      Famili, 2005). ``macro_f1``: the mean over nodes that occur in labels or predictions.
    - ``leaf_micro_f1``, ``leaf_macro_f1``, ``level_k_micro_f1``: the same over the leaves, and over the nodes of each level
      that some label reaches.
    - ``example_f1``: the mean over texts; 1 where neither the labels nor the prediction has a node.
    - ``mean_average_precision``: of scikit-learn's average precision, over nodes with a label 1; left out if there is none.
    - ``log_loss``: the mean binary cross-entropy of the pairs of `judged_pairs`, in nats.
    - ``ece``, ``ece_by_chance``: the calibration error, see `expected_calibration_error`, and its expected value for correct
      probabilities, over the `likely_pairs`. Left out if there is none.

    Without thresholds, nodes are chosen by the common one that maximises micro-F1 on the scored texts.
    """
    levels = np.array(taxonomy.levels)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        u = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        u, labels = u.astype(np.float64), prediction.label_ids
        known, true = labels != IGNORED_LABEL, labels == 1
        check_finite(u)
        chosen = predict_nodes(taxonomy, expit(u), common_threshold(u, labels) if thresholds is None else thresholds)

        counts, of_texts = confusion_counts(labels, chosen), confusion_counts(labels.T, chosen.T)
        leaves = counts[:, : taxonomy.num_leaves]
        metrics = {
            "micro_f1": micro_f1(counts),
            "macro_f1": macro_f1(counts),
            "leaf_micro_f1": micro_f1(leaves),
            "leaf_macro_f1": macro_f1(leaves),
            "example_f1": float(np.nan_to_num(node_f1(of_texts), nan=1.0).mean()),
        }
        occurring = np.flatnonzero(true.any(axis=0))
        if len(occurring):
            pairs = ((known[:, node], node) for node in occurring)
            precisions = [average_precision_score(true[of_node], u[of_node]) for of_node in pairs]
            metrics["mean_average_precision"] = float(np.mean(precisions))
        logits, judged = judged_pairs(taxonomy, u, labels)
        entropy = np.logaddexp(0, logits) - (judged == 1) * logits
        metrics["log_loss"] = float(entropy[judged != IGNORED_LABEL].mean())
        for level in range(1, taxonomy.depth + 1):
            if true[:, levels == level].any():
                metrics[f"level_{level}_micro_f1"] = micro_f1(counts[:, levels == level])
        confidence, correct, variance = likely_pairs(taxonomy, u, labels)
        if len(confidence):
            bins = calibration_bins(confidence, correct, variance)
            metrics["ece"] = float(expected_calibration_error(bins))
            metrics["ece_by_chance"] = float(calibration_error_by_chance(bins))
        return metrics

    return compute_metrics


def common_threshold(u: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold for all nodes with the best micro-F1, a probability; 0.5 if no label is 1."""
    known = labels != IGNORED_LABEL
    threshold = best_threshold(u[known], labels[known] == 1)
    return 0.5 if threshold is None else float(expit(threshold))


def judged_pairs(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits and labels by which probabilities are scored: (num_texts, num_nodes) each.

    If all labels are known, these are the arguments, for P(node) of all pairs. Else they are the logits of P(node | parent) and
    the labels of the open decisions, with -100 for other pairs.
    """
    if (labels != IGNORED_LABEL).all():
        return u, labels
    marginal = torch.from_numpy(u)
    above = TreeSigmoid(taxonomy).of_parents(marginal, ROOT_PARENT_LOGIT)
    # 1 + exp(-z) = (1 + exp(-u)) / (1 + exp(-u_parent)), so with d = u_parent - u: exp(-z) = (exp(d) - 1) / (1 + exp(u_parent))
    gap = (above - marginal).clamp(min=SMALLEST_GAP)
    z = torch.nn.functional.softplus(above) - gap - torch.log(-torch.expm1(-gap))
    return z.numpy(), np.where(open_decisions(taxonomy, labels), labels, IGNORED_LABEL)


def likely_pairs(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select the known `judged_pairs` with a probability of at least 0.1.

    Returns:
        The probability, whether the label is 1, and the pair's contribution to the variance of the number of correct pairs in
        its bin, if the probabilities are correct: (num_pairs,) each. Open decisions are independent. For P(node), see
        `pair_variance`.
    """
    logits, judged = judged_pairs(taxonomy, u.astype(np.float64), labels)
    likely = (judged != IGNORED_LABEL) & (expit(logits) >= MIN_PROBABILITY)
    probabilities = expit(logits[likely])
    variance = pair_variance(taxonomy, logits, likely) if judged is labels else probabilities * (1 - probabilities)
    return probabilities, judged[likely] == 1, variance


def pair_variance(taxonomy: Taxonomy, u: np.ndarray, likely: np.ndarray) -> np.ndarray:
    """Return each likely pair's contribution to the variance of the number of correct pairs in its bin, (num_pairs,).

    P is taken to be correct, and decisions to be independent given their parents. Let k be the lowest node on the paths of both
    i and j, nodes of one text. Their covariance is P(i) P(j) (1 / P(k) - 1), and 0 in different trees. With i = j it is P(i)
    (1 - P(i)). A pair's contribution is the sum of its covariances with the pairs of its text in its bin.
    """
    ancestors = np.array(taxonomy.padded_paths)
    ancestors = np.pad(ancestors, ((0, 0), (1, 0)), constant_values=taxonomy.num_nodes)  # above all trees, with P = 1
    probabilities = np.pad(expit(u), ((0, 0), (0, 1)), constant_values=1.0)
    parts = []
    for of_text, nodes in zip(probabilities, map(np.flatnonzero, likely), strict=True):
        if not len(nodes):
            continue
        paths, bins = ancestors[nodes], bin_index(of_text[nodes])
        for start in range(0, len(nodes), PAIRS_AT_ONCE):
            rows = slice(start, start + PAIRS_AT_ONCE)
            shared = (paths[rows, None] == paths) & (paths < taxonomy.num_nodes)  # (rows, pairs, depth + 1)
            lowest = np.take_along_axis(paths[rows], shared.sum(axis=2), axis=1)
            covariance = np.outer(of_text[nodes[rows]], of_text[nodes]) * (1 / of_text[lowest] - 1)
            parts.append((covariance * (bins[rows, None] == bins)).sum(axis=1))
    return np.concatenate(parts) if parts else np.empty(0)

"""Score, calibrate and show predictions of models for any number of nodes a text; its counterpart is `evaluation.one_path`.

Worth knowing:

1. Each node is a decision with a score z, given its parent: P(node) = P(parent) · σ(z). It is open for a text that has the
   parent, or if the node is a root. Only open decisions show how well z is calibrated, so z is fitted on these pairs.
2. Each node's threshold of best F1 is shrunk towards a common one, most if the node has few positives. Thresholds are fitted
   from the deepest level upwards, because the parent of a predicted node is predicted, too.
3. The guarantee is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, 2022). The loss of a text is the share
   of its true nodes that the set {P(node) >= t} misses. Texts without true nodes do not count. The scores must come from a
   model that was not fitted to these texts, hence `evaluation.calibration.calibrate_out_of_fold`.

In this file ``labels`` are 1 or 0; a node with the label 1 has it at all ancestors too. ``u`` are logits of all nodes, whose
sigmoid is P(node). Both are (num_texts, num_nodes), and ``thresholds`` are probabilities, (num_nodes,).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import ROUND_FLOOR, Context
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.metrics import average_precision_score
from sklearn.model_selection import RepeatedKFold

from decisions_hierarchical import DEFAULT_THRESHOLD, ManyNodes, SetThreshold, threshold_at
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.form import FormBase
from hierarchical_clinicalbert.evaluation.lexical import NodeClassifier
from hierarchical_clinicalbert.evaluation.metrics import (
    ECE,
    ECE_BY_CHANCE,
    FOLDS,
    Metric,
    bin_index,
    calibration_bins,
    confusion_counts,
    macro_f1,
    micro_f1,
    node_f1,
)
from hierarchical_clinicalbert.evaluation.sets import PredictedSets
from hierarchical_clinicalbert.reading.columns import join_labels
from taxonomy_hierarchical import Taxonomy

SIX_DIGITS_DOWN = Context(prec=6, rounding=ROUND_FLOOR)
MIN_PROBABILITY = 0.1  # pairs below it are not in the calibration error: nearly all pairs have a probability near 0
STRENGTHS = (math.inf, 100, 50, 20, 10, 5, 2, 0)  # of the shrinkage of thresholds, in positives
REPEATS = 6  # of the cross-validation that chooses the strength; a single one is too noisy


# ── Thresholds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def predict_nodes(
    decisions: ManyNodes, u: np.ndarray, thresholds: np.ndarray | list[float] | float | None
) -> np.ndarray:
    """Return the predicted nodes and their ancestors, (num_texts, num_nodes) bool; see `ManyNodes.predict`."""
    return decisions.predict(torch.from_numpy(expit(u.astype(np.float64))), thresholds)[0].numpy()


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


def choose_strength(decisions: ManyNodes, u: np.ndarray, labels: np.ndarray, repeats: int = REPEATS) -> float:
    """Return the value of `STRENGTHS` with the greatest sum of micro- and macro-F1 in repeated cross-validation.

    In a tie, the greatest is returned. With one text, infinity is returned: all nodes get the common threshold.
    """
    if len(u) < 2:
        return math.inf
    totals = dict.fromkeys(STRENGTHS, np.zeros((3, decisions.num_nodes)))
    folds = RepeatedKFold(n_splits=min(FOLDS, len(u)), n_repeats=repeats, random_state=0)
    for fitted, scored in folds.split(u):
        for strength, thresholds in shrunk_thresholds(decisions.tree, u[fitted], labels[fitted], STRENGTHS).items():
            chosen = predict_nodes(decisions, u[scored], thresholds)
            totals[strength] = totals[strength] + confusion_counts(labels[scored], chosen)
    return max(STRENGTHS, key=lambda strength: micro_f1(totals[strength]) + macro_f1(totals[strength]))


def shrunk_thresholds(
    taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray, strengths: tuple[float, ...]
) -> dict[float, np.ndarray]:
    """Fit the thresholds of all nodes for each strength of the shrinkage, see `ManyNodesForm.fit_thresholds`."""
    u, true = np.asfortranarray(u), np.asfortranarray(labels == 1)  # columns are read one by one
    positives = true.sum(axis=0)
    common = best_threshold(u.ravel(), true.ravel())
    if common is None:
        return dict.fromkeys(strengths, np.full(taxonomy.num_nodes, DEFAULT_THRESHOLD))

    of_leaves = [best_threshold(u[:, leaf], true[:, leaf]) for leaf in range(taxonomy.num_leaves)]
    nodes = taxonomy.reading_order[::-1]  # each after the nodes below it
    fitted = {}
    for strength in strengths:
        thresholds, chosen = np.full(taxonomy.num_nodes, common), np.zeros_like(true)
        for node in nodes if math.isfinite(strength) else []:
            # the parent of a chosen node is chosen, too
            forced = chosen[:, taxonomy.children(node)].any(axis=1)
            if node < taxonomy.num_leaves:
                own = of_leaves[node]  # the same for all strengths
            else:
                free, counts = ~forced, (forced.sum(), true[forced, node].sum())
                own = best_threshold(u[free, node], true[free, node], *counts)
            if own is not None:
                weighted = positives[node] * own + strength * common
                thresholds[node] = weighted / (positives[node] + strength)
            chosen[:, node] = forced | (u[:, node] >= thresholds[node])
        fitted[strength] = expit(thresholds)
    return fitted


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class NodePredictions:
    """Predicted nodes of texts, closed upwards, and what several metrics read.

    Without thresholds, nodes are chosen by the common threshold that maximises micro-F1 on these texts.

    Attributes:
        u, true, chosen: logits, labels and predictions, (num_texts, num_nodes).
        counts: those of `confusion_counts`, (3, num_nodes).
        pairs: those of `probable_pairs`.
    """

    def __init__(
        self, decisions: ManyNodes, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray | None, thresholds: Any
    ):
        self.u, self.labels, self.true = logits.astype(np.float64), labels, labels == 1
        self.num_leaves, self.levels = decisions.num_leaves, np.array(decisions.tree.levels)
        thresholds = common_threshold(self.u, labels) if thresholds is None else thresholds
        self.chosen = predict_nodes(decisions, self.u, thresholds)
        self.counts = confusion_counts(labels, self.chosen)
        self.pairs = probable_pairs(decisions.tree, self.u, labels)

    def calibration_bins(self, level: int | None) -> pd.DataFrame | None:
        """Return the `calibration_bins` of the probable pairs, or None if there are none."""
        return calibration_bins(*self.pairs) if len(self.pairs[0]) else None


def example_f1(p: NodePredictions) -> float:
    """Compute the mean F1 of the texts; 1 where neither the labels nor the prediction has a node."""
    return np.nan_to_num(node_f1(confusion_counts(p.labels.T, p.chosen.T)), nan=1.0).mean()


def mean_average_precision(p: NodePredictions) -> float | None:
    """Compute the mean of scikit-learn's average precision over the nodes with a label 1."""
    occurring = np.flatnonzero(p.true.any(axis=0))
    precisions = [average_precision_score(p.true[:, node], p.u[:, node]) for node in occurring]
    return np.mean(precisions) if precisions else None


def level_micro_f1(p: NodePredictions, level: int) -> float | None:
    """Compute micro-F1 over the nodes of a level that some label reaches."""
    of_level = p.levels == level
    return micro_f1(p.counts[:, of_level]) if p.true[:, of_level].any() else None


METRICS = {
    # with closed sets, micro-F1 is the hierarchical F1 (Kiritchenko, Matwin and Famili, 2005)
    "micro_f1": Metric(lambda p: micro_f1(p.counts), "micro F1", "f1", is_key=True),
    # over the nodes that occur in labels or predictions
    "macro_f1": Metric(lambda p: macro_f1(p.counts), "macro F1", "f1", is_key=True),
    "leaf_micro_f1": Metric(lambda p: micro_f1(p.counts[:, : p.num_leaves]), "micro F1 of the leaves", "f1"),
    "leaf_macro_f1": Metric(lambda p: macro_f1(p.counts[:, : p.num_leaves]), "macro F1 of the leaves", "f1"),
    "example_f1": Metric(example_f1, "example-based F1", "f1"),
    "mean_average_precision": Metric(
        mean_average_precision, "mean average precision", "mean_average_precision", is_key=True
    ),
    # the mean binary cross-entropy over all pairs
    "log_loss": Metric(
        lambda p: (np.logaddexp(0, p.u) - p.true * p.u).mean(),
        "log loss of a node (nats)",
        "log_loss",
        direction=-1,
        is_key=True,
    ),
    # a model without probable nodes has no calibration error, so it cannot select a checkpoint
    "ece": replace(ECE, direction=0),
    "ece_by_chance": ECE_BY_CHANCE,
    "level_{}_micro_f1": Metric(level_micro_f1, "micro F1", "f1"),
}


def common_threshold(u: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold for all nodes with the best micro-F1, a probability; 0.5 if no label is 1."""
    threshold = best_threshold(u.ravel(), labels.ravel() == 1)
    return DEFAULT_THRESHOLD if threshold is None else float(expit(threshold))


def probable_pairs(taxonomy: Taxonomy, u: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select the pairs of text and node with a probability of at least 0.1.

    P is taken to be correct, and decisions to be independent given their parents. Let k be the lowest node on the paths of both
    i and j, nodes of one text. Their covariance is P(i) P(j) (1 / P(k) - 1), and 0 in different trees. With i = j it is P(i)
    (1 - P(i)). The variance of the number of correct pairs in a bin is the sum over all pairs i and j of a text in the bin. The
    part of i is  P(i) · Σ (1 / P(k) - 1 / P(parent of k)) · Σ P(j),  over k on the path of i and j at or below k. Above a root,
    P is 1.

    Returns:
        The probability, whether the label is 1, and the part of the variance: (num_pairs,) each.
    """
    probabilities = expit(u.astype(np.float64))
    texts, nodes = np.nonzero(probabilities >= MIN_PROBABILITY)
    confidence = probabilities[texts, nodes]
    pairs = pd.DataFrame({"text": texts, "bin": bin_index(confidence), "p": confidence})
    variance, above = np.zeros(len(pairs)), np.ones(len(pairs))
    for ancestors in np.array(taxonomy.padded_paths)[nodes].T:  # of one level
        at_or_below = pairs.groupby(["text", "bin", ancestors])["p"].transform("sum").to_numpy()
        exists = ancestors < taxonomy.num_nodes
        inverse = np.where(exists, 1 / probabilities[texts, np.where(exists, ancestors, 0)], above)
        variance, above = variance + confidence * at_or_below * (inverse - above), inverse
    return confidence, labels[texts, nodes] == 1, variance


# ── The form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class ManyNodesForm(FormBase):
    """What differs in evaluation for any number of nodes a text; its counterpart is `evaluation.one_path.OnePathForm`."""

    metrics, micro_f1 = METRICS, "micro_f1"
    decisions_class, classifier, predictions = ManyNodes, NodeClassifier, NodePredictions
    plot_titles = {
        "f1_by_frequency": "F1 of each node over its number of {split} texts",
        "precision_recall": "Precision and recall of the {split} rows over all thresholds",
    }

    def nodes_of(self, labels: np.ndarray) -> list[list[int]]:
        """Return the labelled nodes of each text, ancestors included."""
        return [np.flatnonzero(row == 1).tolist() for row in labels]

    # ── Calibration ──────────────────────────────────────────────────────────────────────────────────────────────────

    def decisions_of(self, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield each decision's node, the rows in which it is open, and whether the text has the node: (num_rows, 1)."""
        is_open = self.decisions.open_decisions(torch.from_numpy(labels)).numpy()
        for node in range(self.tree.num_nodes):
            rows = np.flatnonzero(is_open[:, node])
            yield [node], rows, labels[rows, node, None] == 1

    def normalise(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum of the log-normalisers of decisions with these logits, and the probabilities of their nodes."""
        return np.logaddexp(0, logits).sum(), expit(logits)

    def fit_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> list[float]:
        """Fit one threshold per node, a probability; 0.5 for all if no label is 1.

        A node's own threshold has the best F1, given the predictions below it. The common threshold has the best micro-F1. The
        result is their weighted mean in logits. The weights are the node's number of positives, and the strength of
        `choose_strength`. The logits must be calibrated by parameters that were fitted to other texts.
        """
        strength = choose_strength(self.decisions, logits, labels)
        return shrunk_thresholds(self.tree, logits, labels, (strength,))[strength].tolist()

    def set_scores(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> pd.Series:
        """Return the probability of each node that a text has, by text."""
        rows, nodes = np.nonzero(labels == 1)
        return pd.Series(expit(logits[rows, nodes].astype(np.float64)), texts[rows])

    def thresholds_of(self, scores: pd.Series) -> list[float | None]:
        """Return one threshold of prediction sets for each recall 0.01, …, 0.99.

        The threshold of a recall is the greatest t with (Σ loss + 1) / (n + 1) <= 1 - recall, over the n texts with a label 1. It
        is None where 1 / (n + 1) > 1 - recall: the recall needs more texts. The sum changes at probabilities of true nodes only,
        and is computed in integers, so that t is exact. It is rounded down to 6 significant digits, which misses no more.
        """
        ascending = scores.sort_values()
        sizes, probabilities = ascending.groupby(level=0).transform("size").tolist(), ascending.tolist()
        num_texts = scores.index.nunique()
        # in integers, so that sums are exact: a text that misses all its s nodes costs `whole`, and each of them whole // s
        whole = math.lcm(*{*sizes})
        losses = list(accumulate(whole // size for size in sizes))  # at t just above each probability

        # for each recall, the greatest sum of losses. The threshold is that of the first node that must not be missed
        most = [((100 - percent) * (num_texts + 1) - 100) * whole // 100 for percent in range(1, 100)]
        exact = [probabilities[bisect_right(losses, allowed)] if allowed >= 0 else None for allowed in most]
        return [None if p is None else float(SIX_DIGITS_DOWN.create_decimal_from_float(p)) for p in exact]

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def predict_sets(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: SetThreshold
    ) -> PredictedSets:
        """Predict sets for the texts with a label 1. A text counts for the share of its nodes that the set holds.

        The size is the number of ``nodes`` in a set.
        """
        has_label = (labels == 1).any(axis=1)
        logits, labels, texts = logits[has_label], labels[has_label], texts[has_label]
        confidence = self.confidence(logits, texts)
        of_rows = torch.tensor(confidence[texts].to_numpy())
        sets = expit(logits.astype(np.float64)) >= threshold_at(threshold, of_rows).numpy()
        rows, nodes = np.nonzero(labels == 1)
        of_labels = pd.DataFrame({"text": texts[rows], "node": nodes, "held": sets[rows, nodes].astype(float)})
        of_texts = pd.DataFrame({"nodes": sets.sum(axis=1).astype(float)}).groupby(texts).mean()
        return PredictedSets(self.decisions, of_labels, of_texts, confidence, "mean")

    def class_outcomes(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, thresholds: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return correct and predicted nodes, (num_rows, num_nodes) each, and None, since each text has one row."""
        return labels, predict_nodes(self.decisions, logits, thresholds), None

    # ── Labels that may be wrong: see `evaluation.label_issues` ──────────────────────────────────────────────────────────

    def rank_issues(
        self, found: pd.DataFrame, scores: np.ndarray, labels: np.ndarray, texts: np.ndarray
    ) -> pd.DataFrame:
        """Return one line per row of `evaluation.label_issues.find_issues`, by ``probability_of_label``.

        Columns:
            index: of the row.
            decision: the node whose label is least probable, given its parent.
            better: the nodes of the text with those that are missing, and without those that are unlikely and the nodes below.
            why: whether the text should have the node of the decision.
        """
        listed = found.drop_duplicates("index").reset_index(drop=True)
        wrong = found.groupby("index")["decision"].agg(set)[listed["index"]]
        pairs = zip(self.nodes_of(labels[listed["index"]]), wrong, strict=True)
        changed = [{*given} ^ nodes for given, nodes in pairs]
        better = [{node for node in nodes if nodes.issuperset(self.tree.path(node))} for nodes in changed]
        return listed.assign(why=np.where(listed["better"] < 0, "unlikely label", "missing label"), better=better)

    # ── What a reader sees ───────────────────────────────────────────────────────────────────────────────────────────

    def plots(self, logits: np.ndarray, labels: np.ndarray, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        return {
            "f1_by_frequency": plots.f1_by_frequency(per_class),
            "precision_recall": plots.precision_and_recall(self.tree, logits, labels),
        }

    def reliability_diagram(self, logits: np.ndarray, labels: np.ndarray) -> Figure | None:
        """Draw the reliability of the `probable_pairs`."""
        probabilities, correct, _ = probable_pairs(self.tree, logits, labels)
        return plots.reliability_diagram(probabilities, correct, "Pairs of document and node", "Share of correct pairs")

    def prediction_table(self, logits: np.ndarray, labels: np.ndarray, thresholds: Any) -> pd.DataFrame:
        """Return a table of each text's deepest labels, and its deepest predicted nodes, most probable first.

        The second choice is the most probable of the nodes that are not predicted.
        """
        tree, rows = self.tree, []
        chosen, probabilities = predict_nodes(self.decisions, logits, thresholds), expit(logits)
        for labelled, nodes, of_nodes in zip(self.nodes_of(labels), chosen, probabilities, strict=True):
            deepest = tree.deepest(labelled)
            predicted = sorted(tree.deepest(np.flatnonzero(nodes).tolist()), key=lambda node: -of_nodes[node])
            second = max(np.flatnonzero(~nodes), key=lambda node: of_nodes[node], default=None)
            row = {
                "labels": join_labels(tree.labels[node] for node in deepest),
                "predictions": join_labels(tree.labels[node] for node in predicted),
                "correct": {*predicted} == {*deepest},
                "probabilities": "; ".join(f"{of_nodes[node]:.6f}" for node in predicted),
                "paths": join_labels(map(self.joined_path, predicted)),
                "second_choice": "" if second is None else tree.labels[second],
                "second_probability": np.nan if second is None else of_nodes[second],
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def headline(self, scores: dict[str, float], texts: str, share: Callable[[float], str]) -> str:
        """Return the scores of a split that matter most. ``texts`` names its rows."""
        correct = f"F1 {scores['micro_f1']:.2f} over all nodes of {texts}"
        return f"{correct}, {scores['level_1_micro_f1']:.2f} at level 1" if self.tree.depth > 1 else correct

"""Score, calibrate and show predictions of models for one path a text; its counterpart is `evaluation.many_nodes`.

Worth knowing:

1. The scored prediction is the most probable leaf with its ancestors, so a predicted path always reaches a leaf.
2. A label that is an inner node ("specific disease", child unknown) counts in all scores but the flat ones.
3. A score without documents (no label is a leaf, or reaches the level) is left out, so no score is NaN.
4. The thresholds of prediction sets are quantiles of nonconformity scores. Split conformal prediction (Vovk et al., 2005) takes
   the k-th smallest of n scores, k = ⌈(n + 1) · coverage⌉. A new document's score is at most this threshold with at least that
   probability, if the document is drawn like the validation rows. Two conditions follow:
   - The scored model must not be fitted to these rows, hence `evaluation.calibration.calibrate_out_of_fold`.
   - The scores must be exchangeable, which scores of several rows of one text are not: see `nonconformity_scores`.
   The selection of the checkpoint on the same rows is not corrected; evaluation measures the coverage on the test rows.
   A row labelled with an inner node counts as covered if the set contains every leaf below. Leaving such rows out would
   select rows by their label, and the coverage of the other rows would be too low.

In this file ``logits`` are those of leaves, (num_rows, num_leaves). ``labels`` are node ids, and ``texts`` the same number for the
same text, (num_rows,) each.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from decimal import ROUND_CEILING, Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, f1_score

from decisions_hierarchical import OnePath, nonconformity
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.form import FormBase
from hierarchical_clinicalbert.evaluation.lexical import LeafClassifier
from hierarchical_clinicalbert.evaluation.metrics import (
    Metric,
    calibration_bins,
    calibration_error_by_chance,
    expected_calibration_error,
    one_hot,
)
from taxonomy_hierarchical import Taxonomy

# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class PathPredictions:
    """Predicted leaves of rows with a label, and what several metrics read.

    Attributes:
        labels, predictions: node ids, (num_rows,).
        is_leaf: whether the label is a leaf, (num_rows,).
        paths: the path to each node from the root, padded with -1, (num_nodes, depth).
        log_probs: log-probabilities of all nodes, (num_rows, num_nodes).
    """

    def __init__(
        self, decisions: OnePath, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray | None, thresholds: Any
    ):
        tree, known = decisions.tree, labels >= 0
        logits, self.labels, self.texts = logits[known], labels[known], None if texts is None else texts[known]
        self.depth, self.levels, self.paths = tree.depth, np.array(tree.levels), np.array(tree.padded_paths)
        self.paths[self.paths == tree.num_nodes] = -1
        self.predictions, self.is_leaf = logits.argmax(axis=1), self.labels < tree.num_leaves
        self.log_probs = node_log_probs(decisions, logits)
        # the predicted node at the label's level, or -1; which node is correct below an inner node is unknown
        self.at_label = self.paths[self.predictions, self.levels[self.labels] - 1]
        self.is_below_label = ~self.is_leaf & (self.at_label >= 0)

    def log_probability(self, nodes: np.ndarray) -> np.ndarray:
        """Return the log-probability of one node for each row, (num_rows,)."""
        return np.take_along_axis(self.log_probs, nodes[:, None], axis=1)[:, 0]

    def calibration_bins(self, level: int) -> pd.DataFrame:
        """Return the `calibration_bins` in the tree truncated below a level: a path that ends above stands for its last node."""
        column = level - 1
        true, predicted = (
            np.where(self.paths[ids, column] >= 0, self.paths[ids, column], ids)
            for ids in (self.labels, self.predictions)
        )
        # below a label that is an inner node, the correct node is unknown: score the prediction at the label
        is_below = self.is_below_label & (self.levels[predicted] > self.levels[self.labels])
        scored = np.where(is_below, self.at_label, predicted)
        confidence, p_scored = np.exp(self.log_probability(predicted)), np.exp(self.log_probability(scored))
        correct = np.where(scored == true, confidence / p_scored, 0.0)
        return calibration_bins(confidence, correct, variance=confidence**2 * (1 / p_scored - 1))


def of_leaves(score: Callable[..., float], **options: Any) -> Callable[[PathPredictions], float | None]:
    """Return the function that computes a score of scikit-learn over the rows labelled with a leaf."""

    def compute(p: PathPredictions) -> float | None:
        return score(p.labels[p.is_leaf], p.predictions[p.is_leaf], **options) if p.is_leaf.any() else None

    return compute


def any_label_accuracy(p: PathPredictions) -> float | None:
    """Compute the share of rows whose predicted leaf is the label of any row with the same text."""
    if p.texts is None or not p.is_leaf.any():
        return None
    pairs = (pd.MultiIndex.from_arrays([p.texts[p.is_leaf], ids[p.is_leaf]]) for ids in (p.labels, p.predictions))
    true, predicted = pairs
    return predicted.isin(true).mean()


def hierarchical_scores(p: PathPredictions) -> dict[str, float]:
    """Compute precision, recall and F1 over the nodes of all paths (Kiritchenko, Matwin and Famili, 2005).

    With a label that is an inner node, the predicted path is truncated at the label's level.
    """
    true, predicted = p.paths[p.labels], p.paths[np.where(p.is_below_label, p.at_label, p.predictions)]
    shared = np.count_nonzero((predicted == true) & (true >= 0))
    sizes = np.count_nonzero(predicted >= 0), np.count_nonzero(true >= 0)
    return {"precision": shared / sizes[0], "recall": shared / sizes[1], "f1": 2 * shared / sum(sizes)}


def level_accuracy(p: PathPredictions, level: int) -> float | None:
    """Compute the share of the rows whose true path reaches the level with the same node in the predicted path."""
    true, predicted = p.paths[p.labels, level - 1], p.paths[p.predictions, level - 1]
    return (true == predicted)[true >= 0].mean() if (true >= 0).any() else None


def level_macro_f1(p: PathPredictions, level: int) -> float | None:
    """Compute the mean F1 of the nodes of a level that occur in a true or predicted path.

    A leaf above the level counts as "no node at this level", a class that is not averaged. Rows labelled with an inner node
    above the level are left out, because their node there is unknown.
    """
    true, predicted = p.paths[p.labels, level - 1], p.paths[p.predictions, level - 1]
    if not (true >= 0).any():
        return None
    known = (true >= 0) | p.is_leaf
    occurring = np.union1d(true[known], predicted[known])
    options = {"labels": occurring[occurring >= 0], "average": "macro", "zero_division": 0}
    return f1_score(true[known], predicted[known], **options)


def calibration_error(
    error: Callable[[pd.DataFrame], float],
) -> Callable[[PathPredictions, int], float | None]:
    """Return the function that computes `expected_calibration_error` or `calibration_error_by_chance` at a level.

    If the label is an inner node, a prediction below it scores P(prediction given label), because the true leaf is unknown.
    Leaving such rows out would select rows by their label, and make correct probabilities look wrong.
    """

    def compute(p: PathPredictions, level: int | None = None) -> float | None:
        is_defined = p.is_leaf.any() if level is None else (p.paths[p.labels, level - 1] >= 0).any()
        return error(p.calibration_bins(level or p.depth)) if is_defined else None

    return compute


ECE, ECE_BY_CHANCE = calibration_error(expected_calibration_error), calibration_error(calibration_error_by_chance)
METRICS = {
    "accuracy": Metric(of_leaves(accuracy_score), "accuracy", "accuracy", is_drawn=True, is_compared=True),
    "any_label_accuracy": Metric(
        any_label_accuracy, "accuracy, counting any label of a repeated text as correct", "accuracy"
    ),
    # over the leaves that occur as label or prediction
    "macro_f1": Metric(
        of_leaves(f1_score, average="macro", zero_division=0), "macro F1", "f1", is_drawn=True, is_compared=True
    ),
    "weighted_f1": Metric(of_leaves(f1_score, average="weighted", zero_division=0), "weighted F1", "f1", is_drawn=True),
    "hierarchical_precision": Metric(
        lambda p: hierarchical_scores(p)["precision"], "hierarchical precision", "precision"
    ),
    "hierarchical_recall": Metric(lambda p: hierarchical_scores(p)["recall"], "hierarchical recall", "recall"),
    "hierarchical_f1": Metric(
        lambda p: hierarchical_scores(p)["f1"], "hierarchical F1", "f1", is_drawn=True, is_compared=True
    ),
    # an inner node's probability is the sum over its leaves
    "log_loss": Metric(
        lambda p: -p.log_probability(p.labels).mean(), "log loss (nats)", "log_loss", direction=-1, is_compared=True
    ),
    "ece": Metric(ECE, "expected calibration error", "ece", direction=-1, is_compared=True),
    "ece_by_chance": Metric(ECE_BY_CHANCE, "expected calibration error if perfectly calibrated", "ece", direction=0),
    "level_{}_accuracy": Metric(level_accuracy, "accuracy", "accuracy"),
    "level_{}_macro_f1": Metric(level_macro_f1, "macro F1", "f1"),
    "level_{}_ece": Metric(ECE, "expected calibration error", "ece", direction=-1, is_compared=True),
    "level_{}_ece_by_chance": Metric(
        ECE_BY_CHANCE, "expected calibration error if perfectly calibrated", "ece", direction=0
    ),
}


def predicted_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each document's most probable leaf, (num_rows,), from leaf logits."""
    # scipy's logsumexp copies the array several times
    return np.exp(logits.max(axis=1) - np.logaddexp.reduce(logits, axis=1, dtype=np.float64))


# ── Decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def node_log_probs(decisions: OnePath, logits: np.ndarray) -> np.ndarray:
    """Compute log-probabilities of all nodes, (num_rows, num_nodes) float64."""
    return decisions.log_probs(torch.tensor(logits, dtype=torch.float64)).numpy()


def node_probabilities(decisions: OnePath, logits: np.ndarray) -> Iterator[list[float]]:
    """Yield the probabilities of all nodes for each document."""
    for start in range(0, len(logits), 1000):  # a list of floats takes four times the memory of an array
        yield from np.exp(node_log_probs(decisions, logits[start : start + 1000])).tolist()


def rows_by_decision(taxonomy: Taxonomy, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield each decision's nodes, the rows whose path takes it, and the index of the correct node for each of them.

    A decision with one node has no rows.
    """
    paths = np.array(taxonomy.padded_paths)[labels]  # (num_rows, depth)
    rows, levels = np.nonzero(paths < taxonomy.num_nodes)
    correct = paths[rows, levels]
    decision = np.array(taxonomy.decision_of)[correct]
    order = np.argsort(decision, kind="stable")
    ends = np.searchsorted(decision[order], np.arange(len(taxonomy.decisions) + 1))
    for nodes, (start, end) in zip(taxonomy.decisions, pairwise(ends), strict=True):
        pairs = order[start : end if len(nodes) > 1 else start]
        yield nodes, rows[pairs], np.searchsorted(nodes, correct[pairs])


def nonconformity_scores(decisions: OnePath, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Compute one score per distinct text, the maximum over its rows, in ascending order.

    Texts are drawn independently. Rows are not, because a repeated text brings all its rows. A text's maximum is exchangeable
    with that of a new text, and no row's score is above it. Hence the coverage holds for a new text with any of its labels.
    """
    rows = zip(node_probabilities(decisions, logits), labels.tolist(), strict=True)
    scores = pd.Series([nonconformity(decisions.tree, nodes, label) for nodes, label in rows])
    return np.sort(scores.groupby(texts).max())


# ── The form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class OnePathForm(FormBase):
    """What differs in evaluation for one path a text; its counterpart is `evaluation.many_nodes.ManyNodesForm`."""

    metrics, micro_f1 = METRICS, "accuracy"
    classifier, predictions = LeafClassifier, PathPredictions
    plot_titles = {"confusion_matrix_level_{level}": "Confusion matrix of the {split} rows, level {level}"}

    def __init__(self, tree: Taxonomy):
        super().__init__(OnePath(tree))

    def nodes_of(self, labels: np.ndarray) -> list[list[int]]:
        """Return the labelled nodes of each row."""
        return labels[:, None].tolist()

    # ── Calibration ──────────────────────────────────────────────────────────────────────────────────────────────────

    def decisions_of(self, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield each decision's nodes, the rows whose path takes it, and the correct node of each: one-hot."""
        for nodes, rows, correct in rows_by_decision(self.tree, labels):
            yield nodes, rows, one_hot(correct, len(nodes))

    def normalise(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum of the log-normalisers of a decision's logits (num_rows, num_children), and its probabilities."""
        return logsumexp(logits, axis=1).sum(), softmax(logits, axis=1)

    def fit_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Return the thresholds of predicted nodes: None, because the most probable leaf is predicted."""
        return None

    def fit_sets(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
        """Return the fields of `Calibration` for prediction sets, from calibrated logits.

        ``set_thresholds`` are for the coverages 0.01, …, 0.99; None where it needs more texts.
        """
        scores = nonconformity_scores(self.decisions, logits, labels, texts)
        ranks = [
            -(-(len(scores) + 1) * percent // 100) for percent in range(1, 100)
        ]  # ⌈(n + 1) · coverage⌉ in integers
        # rounded up to 6 decimals: a larger threshold covers at least as much
        rounded = [
            float(Decimal(float(scores[rank - 1])).quantize(Decimal("1e-6"), rounding=ROUND_CEILING))
            if rank <= len(scores)
            else None
            for rank in ranks
        ]
        return {"set_thresholds": rounded}

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def set_scores(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: float
    ) -> dict[str, float]:
        """Measure the prediction sets for a threshold. Each text counts once.

        Returns:
            coverage: share of texts whose sets contain all their labels.
            single_leaf: share of sets that are one leaf.
            leaves, nodes: mean number of leaves in a set, and of nodes that it names.
        """
        rows, leaves_at_or_below = [], self.tree.leaves_at_or_below
        for probabilities, label in zip(node_probabilities(self.decisions, logits), labels.tolist(), strict=True):
            nodes = self.decisions.prediction_set(probabilities, threshold)
            leaves = {leaf for node in nodes for leaf in leaves_at_or_below[node]}
            rows.append((leaves.issuperset(leaves_at_or_below[label]), len(leaves), len(nodes), len(leaves) == 1))
        by_text = pd.DataFrame(rows, columns=["coverage", "leaves", "nodes", "single_leaf"], dtype=float).groupby(texts)
        return {**by_text.mean().mean(), "coverage": by_text["coverage"].min().mean()}

    def class_outcomes(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, thresholds: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return correct and predicted classes, (num_rows, num_leaves) each, of rows labelled with a leaf, and their texts."""
        is_leaf = labels < self.tree.num_leaves
        correct, chosen = (one_hot(ids[is_leaf], self.tree.num_leaves) for ids in (labels, logits.argmax(axis=1)))
        return correct, chosen, texts[is_leaf]

    # ── Labels that may be wrong: see `evaluation.label_issues` ──────────────────────────────────────────────────────────

    def removed_prior(self, labels: np.ndarray) -> float:
        """Return what the lexical classifier's decision scores lack of the classes' frequencies: nothing."""
        return 0.0

    def choices_of(self, scores: np.ndarray, labels: np.ndarray) -> Iterator[tuple]:
        """Yield each decision: the parent (-1 for the roots), its children, their rows, the rows' given children and scores.

        Given children are indices. The softmax of the scores (num_rows, num_choices) is P(child | parent).
        """
        for nodes, rows, given in rows_by_decision(self.tree, labels):
            yield self.tree.parents[nodes[0]], np.array(nodes), rows, given, scores[np.ix_(rows, nodes)]

    def rank_issues(self, judged: pd.DataFrame, scores: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
        """Return one line per listed row, from the rows of `evaluation.label_issues.judge`, by ``probability_of_label``.

        Columns:
            index: of the row.
            decision: the decision in which the row's label is least probable.
            better: the suggested label. It is the decision's best other choice. If the row's label is a leaf, and a leaf below
                this choice is more probable, it is the most probable such leaf.
        """
        issues = judged.sort_values("probability_of_label", kind="stable")
        listed, tree = issues.drop_duplicates("index").reset_index(drop=True), self.tree
        index = listed["index"].to_numpy()
        is_leaf, probabilities = (
            labels[index] < tree.num_leaves,
            self.decisions(torch.from_numpy(scores[index]))[0].exp().numpy(),
        )
        for place in np.flatnonzero(is_leaf):
            leaves = tree.leaves_at_or_below[listed.at[place, "better"]]
            best = leaves[probabilities[place, leaves].argmax()]
            if probabilities[place, best] > probabilities[place, labels[index[place]]]:
                listed.at[place, "better"] = best
        listed["probability_of_label"] = np.take_along_axis(probabilities, labels[index, None], axis=1)
        listed["probability_of_better_label"] = np.take_along_axis(probabilities, listed[["better"]].to_numpy(), axis=1)
        return listed.sort_values("probability_of_label", kind="stable")

    def describe_issues(
        self, issues: pd.DataFrame, labels: np.ndarray, texts: np.ndarray
    ) -> tuple[list[list[int]], np.ndarray]:
        """Return the better labels of the rows of `rank_issues`, and why they are listed."""
        nodes_of: dict[int, set[int]] = defaultdict(set)
        for text, label in zip(texts.tolist(), labels.tolist(), strict=True):
            nodes_of[text].add(label)
        contradicted = [len(self.tree.deepest(nodes_of[text])) > 1 for text in texts[issues["index"]].tolist()]
        why = np.where(contradicted, "conflicting duplicate", "unlikely label")
        return [[node] for node in issues["better"]], why

    # ── What a reader sees ───────────────────────────────────────────────────────────────────────────────────────────

    def plots(self, logits: np.ndarray, labels: np.ndarray, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        matrices = plots.confusion_matrices(self.tree, logits, labels).items()
        return {f"confusion_matrix_level_{level}": figure for level, figure in matrices}

    def reliability_diagram(self, logits: np.ndarray, labels: np.ndarray) -> Figure | None:
        """Draw the reliability of the predicted leaves; return None if a label is an inner node.

        Leaving such documents out would select documents by their label.
        """
        if (labels >= logits.shape[1]).any():
            return None
        probabilities, correct = predicted_probabilities(logits), logits.argmax(axis=1) == labels
        return plots.reliability_diagram(probabilities, correct, "Documents", "Accuracy")

    def prediction_columns(self, logits: np.ndarray, labels: np.ndarray, thresholds: Any) -> dict[str, Any]:
        """Return the columns of a CSV file of predictions."""
        return {
            "label": [self.tree.labels[node] for node in labels],
            "prediction": [self.tree.labels[leaf] for leaf in logits.argmax(axis=1)],
            "probability": predicted_probabilities(logits),
        }

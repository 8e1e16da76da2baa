"""Score, calibrate and show predictions of models for one path a text; its counterpart is `evaluation.many_nodes`.

Worth knowing:

1. The scored prediction is the most probable leaf with its ancestors, so a predicted path always reaches a leaf.
2. A label that is an inner node ("specific disease", child unknown) counts in all scores but the flat ones.
3. A score without documents (no label is a leaf, or reaches the level) is left out, so no score is NaN.
4. The thresholds of prediction sets are those of split conformal prediction (Vovk et al., 2005). Two conditions follow:
   - The scored model must not be fitted to these rows, hence `evaluation.calibration.calibrate_out_of_fold`.
   - The scores must be exchangeable. A repeated text brings all its rows, so the score of a text is the greatest of its rows.
   A row labelled with an inner node counts as covered if the set contains every leaf below. Leaving such rows out would
   select rows by their label, and the coverage of the other rows would be too low.

In this file ``logits`` are those of leaves, (num_rows, num_leaves). ``labels`` are node ids, and ``texts`` the same number for the
same text, (num_rows,) each.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, f1_score

from decisions_hierarchical import OnePath, SetThreshold
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.form import FormBase
from hierarchical_clinicalbert.evaluation.lexical import LeafClassifier
from hierarchical_clinicalbert.evaluation.metrics import ECE, ECE_BY_CHANCE, Metric, calibration_bins, micro_f1, one_hot
from hierarchical_clinicalbert.evaluation.sets import PredictedSets

ROWS_AT_ONCE = 1024  # of prediction sets

# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class PathPredictions:
    """Predicted leaves of rows, and what several metrics read.

    Attributes:
        labels, predictions: node ids, (num_rows,).
        is_leaf: whether the label is a leaf, (num_rows,).
        paths: the path to each node from the root, padded with -1, (num_nodes, depth).
        log_probs: log-probabilities of all nodes, (num_rows, num_nodes).
        counts: the numbers of shared, predicted and true nodes of all paths, (3,), as `confusion_counts`. With a label that is
            an inner node, the predicted path is truncated at the label's level.
    """

    def __init__(
        self, decisions: OnePath, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray | None, thresholds: Any
    ):
        tree, self.labels, self.texts = decisions.tree, labels, texts
        self.depth, self.levels, self.paths = tree.depth, np.array(tree.levels), np.array(tree.padded_paths)
        self.paths[self.paths == tree.num_nodes] = -1
        self.predictions, self.is_leaf = logits.argmax(axis=1), labels < tree.num_leaves
        self.log_probs = node_log_probs(decisions, logits)
        # the predicted node at the label's level, or -1; which node is correct below an inner node is unknown
        self.at_label = self.paths[self.predictions, self.levels[labels] - 1]
        self.is_below_label = ~self.is_leaf & (self.at_label >= 0)
        truncated = np.where(self.is_below_label, self.at_label, self.predictions)
        true, predicted = self.paths[labels], self.paths[truncated]
        pairs = ((predicted == true) & (true >= 0), predicted >= 0, true >= 0)
        self.counts = np.array([np.count_nonzero(nodes) for nodes in pairs])

    def log_probability(self, nodes: np.ndarray) -> np.ndarray:
        """Return the log-probability of one node for each row, (num_rows,)."""
        return np.take_along_axis(self.log_probs, nodes[:, None], axis=1)[:, 0]

    def at_level(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the nodes of a level in the true and the predicted paths, (num_rows,) each; -1 where a path ends above."""
        return self.paths[self.labels, level - 1], self.paths[self.predictions, level - 1]

    def calibration_bins(self, level: int | None) -> pd.DataFrame | None:
        """Return the `calibration_bins` in the tree truncated below a level: a path that ends above stands for its last node.

        By default no level is truncated. If the label is an inner node, a prediction below it scores P(prediction given label),
        because the true leaf is unknown. Leaving such rows out would select rows by their label, and make correct
        probabilities look wrong. None: no label is a leaf, or reaches the level.
        """
        if not (self.is_leaf if level is None else self.at_level(level)[0] >= 0).any():
            return None
        nodes = zip((self.labels, self.predictions), self.at_level(level or self.depth), strict=True)
        true, predicted = (np.where(at_level >= 0, at_level, last) for last, at_level in nodes)
        is_below = self.is_below_label & (self.levels[predicted] > self.levels[self.labels])
        scored = np.where(is_below, self.at_label, predicted)
        confidence, p_scored = np.exp(self.log_probability(predicted)), np.exp(self.log_probability(scored))
        correct = np.where(scored == true, confidence / p_scored, 0.0)
        return calibration_bins(confidence, correct, variance=confidence**2 * (1 / p_scored - 1))


def leaf_score(p: PathPredictions, score: Callable[..., float], **options: Any) -> float | None:
    """Compute a score of scikit-learn over the rows labelled with a leaf."""
    return score(p.labels[p.is_leaf], p.predictions[p.is_leaf], **options) if p.is_leaf.any() else None


def any_label_accuracy(p: PathPredictions) -> float | None:
    """Compute the share of rows whose predicted leaf is the label of any row with the same text."""
    if p.texts is None or not p.is_leaf.any():
        return None
    pairs = (pd.MultiIndex.from_arrays([p.texts[p.is_leaf], ids[p.is_leaf]]) for ids in (p.labels, p.predictions))
    true, predicted = pairs
    return predicted.isin(true).mean()


def level_accuracy(p: PathPredictions, level: int) -> float | None:
    """Compute the share of the rows whose true path reaches the level with the same node in the predicted path."""
    true, predicted = p.at_level(level)
    return (true == predicted)[true >= 0].mean() if (true >= 0).any() else None


def level_macro_f1(p: PathPredictions, level: int) -> float | None:
    """Compute the mean F1 of the nodes of a level that occur in a true or predicted path.

    A leaf above the level counts as "no node at this level", a class that is not averaged. Rows labelled with an inner node
    above the level are left out, because their node there is unknown.
    """
    true, predicted = p.at_level(level)
    if not (true >= 0).any():
        return None
    known = (true >= 0) | p.is_leaf
    occurring = np.union1d(true[known], predicted[known])
    options = {"labels": occurring[occurring >= 0], "average": "macro", "zero_division": 0}
    return f1_score(true[known], predicted[known], **options)


leaf_f1 = partial(leaf_score, score=f1_score, zero_division=0)
METRICS = {
    "accuracy": Metric(partial(leaf_score, score=accuracy_score), "accuracy", "accuracy", is_key=True),
    "any_label_accuracy": Metric(
        any_label_accuracy, "accuracy, counting any label of a repeated text as correct", "accuracy"
    ),
    # over the leaves that occur as label or prediction
    "macro_f1": Metric(partial(leaf_f1, average="macro"), "macro F1", "f1", is_key=True),
    "weighted_f1": Metric(partial(leaf_f1, average="weighted"), "weighted F1", "f1"),
    # over the nodes of all paths (Kiritchenko, Matwin and Famili, 2005)
    "hierarchical_precision": Metric(lambda p: p.counts[0] / p.counts[1], "hierarchical precision", "precision"),
    "hierarchical_recall": Metric(lambda p: p.counts[0] / p.counts[2], "hierarchical recall", "recall"),
    "hierarchical_f1": Metric(lambda p: micro_f1(p.counts), "hierarchical F1", "f1", is_key=True),
    # an inner node's probability is the sum over its leaves
    "log_loss": Metric(
        lambda p: -p.log_probability(p.labels).mean(), "log loss (nats)", "log_loss", direction=-1, is_key=True
    ),
    "ece": ECE,
    "ece_by_chance": ECE_BY_CHANCE,
    "level_{}_accuracy": Metric(level_accuracy, "accuracy", "accuracy"),
    "level_{}_macro_f1": Metric(level_macro_f1, "macro F1", "f1"),
    "level_{}_ece": ECE,
    "level_{}_ece_by_chance": ECE_BY_CHANCE,
}


def node_log_probs(decisions: OnePath, logits: np.ndarray) -> np.ndarray:
    """Compute log-probabilities of all nodes, (num_rows, num_nodes) float64."""
    return decisions.log_probs(torch.tensor(logits, dtype=torch.float64)).numpy()


# ── The form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class OnePathForm(FormBase):
    """What differs in evaluation for one path a text; its counterpart is `evaluation.many_nodes.ManyNodesForm`."""

    metrics, micro_f1 = METRICS, "accuracy"
    decisions_class, classifier, predictions = OnePath, LeafClassifier, PathPredictions
    plot_titles = {"confusion_matrix_level_{level}": "Confusion matrix of the {split} rows, level {level}"}

    def nodes_of(self, labels: np.ndarray) -> list[list[int]]:
        """Return the labelled nodes of each row."""
        return labels[:, None].tolist()

    # ── Calibration ──────────────────────────────────────────────────────────────────────────────────────────────────

    def decisions_of(self, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield each decision's nodes, the rows whose path takes it, and the correct node of each: one-hot."""
        paths = np.array(self.tree.padded_paths)[labels]  # (num_rows, depth)
        decision_of = np.array([*self.tree.decision_of, -1])[paths]
        for decision, nodes in enumerate(self.tree.decisions):
            rows, levels = np.nonzero(decision_of == decision)
            yield nodes, rows, one_hot(np.searchsorted(nodes, paths[rows, levels]), len(nodes))

    def normalise(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum of the log-normalisers of a decision's logits (num_rows, num_children), and its probabilities."""
        return logsumexp(logits, axis=1).sum(), softmax(logits, axis=1)

    def set_scores(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> pd.Series:
        """Return the nonconformity score of each text, by text: the greatest of its rows."""
        rows = zip(
            torch.from_numpy(logits).split(ROWS_AT_ONCE), torch.from_numpy(labels).split(ROWS_AT_ONCE), strict=True
        )
        scores = [self.decisions.nonconformity(self.decisions.log_probs(u.double()).exp(), ids) for u, ids in rows]
        return pd.Series(torch.cat(scores).numpy()).groupby(texts).max()

    def thresholds_of(self, scores: pd.Series) -> list[float | None]:
        """Return one threshold of prediction sets for each coverage 0.01, …, 0.99; None where it needs more texts."""
        ordered, thresholds = np.sort(scores), list[float | None]()
        for percent in range(1, 100):
            rank = -(-(len(ordered) + 1) * percent // 100)  # ⌈(n + 1) · coverage⌉ in integers
            thresholds.append(float(ordered[rank - 1]) if rank <= len(ordered) else None)
        return thresholds

    def scores_to_store(self, scores: pd.Series, labels: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
        """Return the fields of `Calibration` that thresholds for other class frequencies are computed from."""
        of_texts = pd.Series(labels).groupby(texts).agg(list)
        return {"set_scores": scores.tolist(), "set_labels": of_texts[scores.index].tolist()}

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def predict_sets(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: SetThreshold
    ) -> PredictedSets:
        """Predict sets. A set holds a label if it contains all leaves at or below it, and a text must have all its labels held.

        Sizes are the numbers of ``leaves`` and of ``nodes`` that a set names, and ``single_leaf``, whether it is one leaf.
        """
        decisions, held, sizes = self.decisions, list[torch.Tensor](), list[torch.Tensor]()
        for rows in torch.from_numpy(logits).split(ROWS_AT_ONCE):
            sets = decisions.prediction_sets(decisions.log_probs(rows.double()).exp(), threshold)
            held.append(decisions.held(sets))
            num_leaves = held[-1][:, : self.tree.num_leaves].sum(1)
            sizes.append(torch.stack([num_leaves, sets.sum(1), num_leaves == 1], dim=1))
        holds_label = np.take_along_axis(torch.cat(held).numpy(), labels[:, None], axis=1)[:, 0]
        of_labels = pd.DataFrame({"text": texts, "node": labels, "held": holds_label.astype(float)})
        by_row = pd.DataFrame(torch.cat(sizes).double().numpy(), columns=["leaves", "nodes", "single_leaf"])
        of_texts = by_row.groupby(texts).mean()
        return PredictedSets(self.decisions, of_labels, of_texts, self.confidence(logits, texts), "min")

    def class_outcomes(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, thresholds: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return correct and predicted classes, (num_rows, num_leaves) each, of rows labelled with a leaf, and their texts."""
        is_leaf = labels < self.tree.num_leaves
        correct, chosen = (one_hot(ids[is_leaf], self.tree.num_leaves) for ids in (labels, logits.argmax(axis=1)))
        return correct, chosen, texts[is_leaf]

    # ── Labels that may be wrong: see `evaluation.label_issues` ──────────────────────────────────────────────────────────

    def rank_issues(
        self, found: pd.DataFrame, scores: np.ndarray, labels: np.ndarray, texts: np.ndarray
    ) -> pd.DataFrame:
        """Return one line per row of `evaluation.label_issues.find_issues`, by ``probability_of_label``.

        Columns:
            index: of the row.
            decision: the decision in which the row's label is least probable.
            better: the suggested label, in a list. It is the decision's best other choice. If the row's label is a leaf, and a
                leaf below this choice is more probable, it is the most probable such leaf.
            why: whether another row of the text contradicts the label.
        """
        tree, listed = self.tree, found.drop_duplicates("index").reset_index(drop=True)
        index, better = listed["index"].to_numpy(), listed["better"].to_numpy(copy=True)
        probabilities = self.decisions(torch.from_numpy(scores[index]))[0].exp().numpy()
        given = np.take_along_axis(probabilities, labels[index, None], axis=1)[:, 0]
        for place in np.flatnonzero(labels[index] < tree.num_leaves):
            leaves = tree.leaves_at_or_below[better[place]]
            best = leaves[probabilities[place, leaves].argmax()]
            if probabilities[place, best] > given[place]:
                better[place] = best
        nodes_of = pd.Series(labels).groupby(texts).agg(set)
        contradicted = [len(tree.deepest(nodes)) > 1 for nodes in nodes_of[texts[index]]]
        columns = {
            "better": better[:, None].tolist(),
            "why": np.where(contradicted, "conflicting duplicate", "unlikely label"),
            "probability_of_label": given,
            "probability_of_better_label": np.take_along_axis(probabilities, better[:, None], axis=1)[:, 0],
        }
        return listed.assign(**columns).sort_values("probability_of_label", kind="stable")

    # ── What a reader sees ───────────────────────────────────────────────────────────────────────────────────────────

    def plots(self, logits: np.ndarray, labels: np.ndarray, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        return plots.confusion_matrices(self.tree, logits, labels)

    def reliability_diagram(self, logits: np.ndarray, labels: np.ndarray) -> Figure | None:
        """Draw the reliability of the predicted leaves; return None if a label is an inner node.

        Leaving such documents out would select documents by their label.
        """
        if (labels >= logits.shape[1]).any():
            return None
        probabilities, correct = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == labels
        return plots.reliability_diagram(probabilities, correct, "Documents", "Accuracy")

    def prediction_table(self, logits: np.ndarray, labels: np.ndarray, thresholds: Any) -> pd.DataFrame:
        """Return a table of each row's label and predicted leaf."""
        tree, probabilities = self.tree, softmax(logits, axis=1)
        second, first = np.argsort(probabilities, axis=1, kind="stable")[:, -2:].T
        columns = {
            "label": [tree.labels[node] for node in labels],
            "prediction": [tree.labels[leaf] for leaf in first],
            "correct": [label in tree.path(leaf) for label, leaf in zip(labels, first, strict=True)],
            "probability": probabilities.max(axis=1),
            "path": [self.joined_path(leaf) for leaf in first],
            "second_choice": [tree.labels[leaf] for leaf in second],
            "second_probability": np.take_along_axis(probabilities, second[:, None], axis=1)[:, 0],
        }
        return pd.DataFrame(columns)

    def headline(self, scores: dict[str, float], texts: str, share: Callable[[float], str]) -> str:
        """Return the scores of a split that matter most. ``texts`` names its rows, ``share`` formats a share."""
        parts = [f"{share(scores['accuracy'])} of {texts} are classified correctly"] if "accuracy" in scores else []
        if self.tree.depth > 1 and "level_1_accuracy" in scores:
            whose = "" if parts else f"of {texts} "
            parts.append(f"{share(scores['level_1_accuracy'])} {whose}are in the right branch")
        return ", ".join(parts)

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
5. Data of `HierarchicalF1` stay in memory: the processes of a distributed run would share one file.

In this file ``logits`` are those of leaves, (num_rows, num_leaves). ``labels`` are node ids, and ``texts`` the same number for the
same text, (num_rows,) each.
"""

import tempfile
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
from transformers import EvalPrediction

from decisions_hierarchical import OnePath, nonconformity
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.lexical import LeafClassifier
from hierarchical_clinicalbert.evaluation.metrics import (
    calibration_bins,
    calibration_error_by_chance,
    expected_calibration_error,
    one_hot,
    scored_logits,
)
from metrics.hierarchical_f1.hierarchical_f1 import HierarchicalF1
from taxonomy_hierarchical import Taxonomy


class OnePathForm:
    """What differs in evaluation for one path a text. The methods are those of `evaluation.many_nodes.ManyNodesForm`."""

    classifier = LeafClassifier

    def __init__(self, tree: Taxonomy):
        self.decisions, self.tree = OnePath(tree), tree

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
        """Return the fields of `Calibration` for prediction sets."""
        return {"set_thresholds": fit_conformal_thresholds(self.decisions, logits, labels, texts)}

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def metrics(self, thresholds: Any = None) -> Callable[[EvalPrediction], dict[str, float]]:
        """Build the Trainer's ``compute_metrics``."""
        return build_compute_metrics(self.tree)

    unranked_metrics = ("_by_chance",)  # endings of metrics that cannot select a checkpoint

    def example_prediction(self, nodes: list[list[int]]) -> EvalPrediction:
        """Return a prediction that has the same metrics as any for these labels."""
        # the set of metrics depends on the levels of the labels, and on whether some are leaves
        examples = {(node < self.tree.num_leaves, self.tree.levels[node]): node for (node,) in nodes}
        chosen = np.array([*examples.values()])
        return EvalPrediction(np.zeros((len(chosen), self.tree.num_leaves)), chosen)

    def scores_by_text(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> dict[str, float]:
        """Return metrics that need the ids of the texts."""
        accuracy = any_label_accuracy(logits, labels, texts)
        return {} if accuracy is None else {"any_label_accuracy": accuracy}

    def set_scores(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: float
    ) -> dict[str, float]:
        """Measure the prediction sets for a threshold."""
        return coverage_scores(self.decisions, logits, labels, texts, threshold)

    def class_outcomes(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, thresholds: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return correct and predicted classes, (num_rows, num_leaves) each, of rows labelled with a leaf, and their texts."""
        is_leaf = labels < self.tree.num_leaves
        correct, chosen = (one_hot(ids[is_leaf], self.tree.num_leaves) for ids in (labels, logits.argmax(axis=1)))
        return correct, chosen, texts[is_leaf]

    micro_f1 = "accuracy"  # the name of the share of correct classes

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


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        logits, labels = scored_logits(prediction), prediction.label_ids
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


def any_label_accuracy(logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> float | None:
    """Compute the share of documents whose predicted leaf is the label of any document with the same text.

    Only documents labelled with a leaf count; None without any. ``texts`` are numbers, the same for the same text.
    """
    is_leaf = labels < logits.shape[1]
    pairs = (pd.MultiIndex.from_arrays([texts[is_leaf], ids[is_leaf]]) for ids in (labels, logits.argmax(axis=1)))
    true, predicted = pairs
    return float(predicted.isin(true).mean()) if len(true) else None


def predicted_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each document's most probable leaf, (num_rows,), from leaf logits."""
    # scipy's logsumexp copies the array several times
    return np.exp(logits.max(axis=1) - np.logaddexp.reduce(logits, axis=1, dtype=np.float64))


# ── Decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def node_log_probs(taxonomy: Taxonomy, logits: np.ndarray) -> np.ndarray:
    """Compute log-probabilities of all nodes, (num_rows, num_nodes) float64."""
    return OnePath(taxonomy).log_probs(torch.tensor(logits, dtype=torch.float64)).numpy()


def node_probabilities(taxonomy: Taxonomy, logits: np.ndarray) -> Iterator[list[float]]:
    """Yield the probabilities of all nodes for each document."""
    for start in range(0, len(logits), 1000):  # a list of floats takes four times the memory of an array
        yield from np.exp(node_log_probs(taxonomy, logits[start : start + 1000])).tolist()


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


# ── Prediction sets with a guaranteed coverage ───────────────────────────────────────────────────────────────────────


def fit_conformal_thresholds(
    decisions: OnePath, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray
) -> list[float | None]:
    """Fit conformal thresholds to calibrated logits, for the coverages 0.01, …, 0.99; None where it needs more texts."""
    scores = nonconformity_scores(decisions.tree, logits, labels, texts)
    ranks = [-(-(len(scores) + 1) * percent // 100) for percent in range(1, 100)]  # ⌈(n + 1) · coverage⌉ in integers
    return [round_up(scores[rank - 1]) if rank <= len(scores) else None for rank in ranks]


def round_up(score: float) -> float:
    """Round a threshold up to 6 decimals: a larger one covers at least as much."""
    return float(Decimal(float(score)).quantize(Decimal("1e-6"), rounding=ROUND_CEILING))


def nonconformity_scores(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Compute one score per distinct text, the maximum over its rows, in ascending order.

    Texts are drawn independently. Rows are not, because a repeated text brings all its rows. A text's maximum is exchangeable
    with that of a new text, and no row's score is above it. Hence the coverage holds for a new text with any of its labels.
    """
    rows = zip(node_probabilities(taxonomy, logits), labels.tolist(), strict=True)
    scores = pd.Series([nonconformity(taxonomy, nodes, label) for nodes, label in rows])
    return np.sort(scores.groupby(texts).max())


def coverage_scores(
    decisions: OnePath, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: float
) -> dict[str, float]:
    """Measure the answers for a threshold. Each text counts once.

    Returns:
        coverage: share of texts whose answers contain all their labels.
        single_leaf: share of answers that are one leaf.
        leaves, nodes: mean number of leaves in an answer, and of nodes that it names.
    """
    rows, leaves_at_or_below = [], decisions.tree.leaves_at_or_below
    for nodes, label in zip(node_probabilities(decisions.tree, logits), labels.tolist(), strict=True):
        answer = decisions.prediction_set(nodes, threshold)
        leaves = {leaf for node in answer for leaf in leaves_at_or_below[node]}
        rows.append((leaves.issuperset(leaves_at_or_below[label]), len(leaves), len(answer), len(leaves) == 1))
    by_text = pd.DataFrame(rows, columns=["coverage", "leaves", "nodes", "single_leaf"], dtype=float).groupby(texts)
    return {**by_text.mean().mean(), "coverage": by_text["coverage"].min().mean()}

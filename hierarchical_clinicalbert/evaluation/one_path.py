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
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from decisions_hierarchical import OnePath, SetThreshold
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.form import FormBase
from hierarchical_clinicalbert.evaluation.lexical import LeafClassifier
from hierarchical_clinicalbert.evaluation.metrics import ONE_PATH, Predictions, one_hot
from hierarchical_clinicalbert.evaluation.sets import PredictedSets

ROWS_AT_ONCE = 1024  # of prediction sets


# ── The form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class OnePathForm(FormBase):
    """What differs in evaluation for one path a text; its counterpart is `evaluation.many_nodes.ManyNodesForm`."""

    metrics, micro_f1 = ONE_PATH, "accuracy"
    decisions_class, classifier = OnePath, LeafClassifier
    plot_titles = {"confusion_matrix_level_{level}": "Confusion matrix of the {split} rows, level {level}"}
    columns, scored = ("label", "prediction", "probability", "path"), ("Documents", "Accuracy")

    # ── Labels and decisions ─────────────────────────────────────────────────────────────────────────────────────────

    def known_nodes(self, labels: np.ndarray) -> np.ndarray:
        """Return which nodes a label tells of, (num_rows, num_nodes) of bool: all but those below it."""
        label = torch.from_numpy(one_hot(labels, self.tree.num_nodes)).float()
        return (self.decisions.sum_to_root(label) <= label).numpy()

    def decisions_of(self, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield each decision's nodes, the rows whose path takes it, and the correct node of each: one-hot."""
        targets = self.decisions.outcome_targets(torch.from_numpy(labels)).numpy()
        for nodes in self.tree.decisions:
            rows = np.flatnonzero(targets[:, nodes].any(axis=1))
            yield nodes, rows, targets[np.ix_(rows, nodes)]

    def scored_pairs(self, p: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability of each row's predicted leaf, and whether it is correct, (num_rows,) each.

        If the label is an inner node, a prediction below it scores P(prediction given label), because the true leaf is unknown.
        Leaving such rows out would select rows by their label, and make correct probabilities look wrong.
        """
        rows, leaf = np.arange(len(p.labels)), p.chosen[:, : p.num_leaves].argmax(axis=1)
        given_label = p.log_probs[rows, leaf] - p.log_probs[rows, p.labels]
        correct = np.where(p.known[rows, leaf], p.true[rows, leaf], np.exp(np.minimum(given_label, 0)))
        return p.probabilities[rows, leaf], correct

    # ── Prediction sets ──────────────────────────────────────────────────────────────────────────────────────────────

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

    def plots(self, p: Predictions, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        return plots.confusion_matrices(self.tree, p.logits, p.labels)

    def headline(self, scores: dict[str, float], texts: str, share: Callable[[float], str]) -> str:
        """Return the scores of a split that matter most. ``texts`` names its rows, ``share`` formats a share."""
        parts = [f"{share(scores['accuracy'])} of {texts} are classified correctly"] if "accuracy" in scores else []
        if self.tree.depth > 1 and "level_1_accuracy" in scores:
            whose = "" if parts else f"of {texts} "
            parts.append(f"{share(scores['level_1_accuracy'])} {whose}are in the right branch")
        return ", ".join(parts)

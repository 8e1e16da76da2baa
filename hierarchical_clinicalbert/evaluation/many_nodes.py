"""Score, calibrate and show predictions of models for any number of nodes a text; its counterpart is `evaluation.one_path`.

Worth knowing:

1. Each node is a decision with a score z, given its parent: P(node) = P(parent) · σ(z). It is open for a text that has the
   parent, or if the node is a root. Only open decisions show how well z is calibrated, so z is fitted on these pairs.
2. Each node's threshold of best F1 is shrunk towards a common one, most if the node has few positives.
3. The guarantee is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, 2022). The loss of a text is the share
   of its true nodes that the set {P(node) >= t} misses. Texts without true nodes do not count. The scores must come from a
   model that was not fitted to these texts, hence `evaluation.calibration.calibrate_out_of_fold`.

In this file ``labels`` are 1 or 0; a node with the label 1 has it at all ancestors too. ``u`` are logits of all nodes, whose
sigmoid is P(node). Both are (num_texts, num_nodes), and ``thresholds`` are probabilities, (num_nodes,).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from decimal import ROUND_FLOOR, Context
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import expit, logit

from decisions_hierarchical import DEFAULT_THRESHOLD, ManyNodes, SetThreshold
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.form import FormBase
from hierarchical_clinicalbert.evaluation.lexical import NodeClassifier
from hierarchical_clinicalbert.evaluation.metrics import MANY_NODES, Predictions
from hierarchical_clinicalbert.evaluation.sets import PredictedSets

SIX_DIGITS_DOWN = Context(prec=6, rounding=ROUND_FLOOR)
MIN_PROBABILITY = 0.1  # pairs below it are not in the calibration error: nearly all pairs have a probability near 0
STRENGTH = 20  # of the shrinkage of thresholds, in positives


# ── Thresholds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def best_threshold(scores: np.ndarray, true: np.ndarray) -> float | None:
    """Return the greatest threshold of best F1: halfway between two scores, or half a unit beyond the first or last one.

    ``scores`` and ``true`` are (num_pairs,). None: no pair is true.
    """
    if not true.any():
        return None
    order = np.argsort(-scores)
    padded = np.concatenate([[scores[order[0]] + 1], scores[order], [scores[order[-1]] - 1]])
    true_positives = np.concatenate([[0], np.cumsum(true[order])])
    f1 = 2 * true_positives / (np.arange(len(true_positives)) + true_positives[-1])
    f1[padded[:-1] == padded[1:]] = -1  # no threshold separates equal scores
    best = np.argmax(f1)
    return float(padded[best] + padded[best + 1]) / 2


def common_threshold(u: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold for all nodes with the best micro-F1, a probability; 0.5 if no label is 1."""
    threshold = best_threshold(u.ravel(), labels.ravel() == 1)
    return DEFAULT_THRESHOLD if threshold is None else float(expit(threshold))


# ── The form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class ManyNodesForm(FormBase):
    """What differs in evaluation for any number of nodes a text; its counterpart is `evaluation.one_path.OnePathForm`."""

    metrics, micro_f1 = MANY_NODES, "micro_f1"
    decisions_class, classifier = ManyNodes, NodeClassifier
    plot_titles = {"f1_by_frequency": "F1 of each node over its number of {split} texts"}
    columns = ("labels", "predictions", "probabilities", "paths")
    scored = ("Pairs of document and node", "Share of correct pairs")

    # ── Labels and decisions ─────────────────────────────────────────────────────────────────────────────────────────

    def known_nodes(self, labels: np.ndarray) -> np.ndarray:
        """Return which nodes a label tells of, (num_rows, num_nodes) of bool: all."""
        return np.ones(labels.shape, dtype=bool)

    def decisions_of(self, labels: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield each decision's node, the rows in which it is open, and whether the text has the node: (num_rows, 1)."""
        is_open = self.decisions.open_decisions(torch.from_numpy(labels)).numpy()
        for node in range(self.tree.num_nodes):
            rows = np.flatnonzero(is_open[:, node])
            yield [node], rows, labels[rows, node, None] == 1

    def scored_pairs(self, p: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of at least 0.1, of pairs of text and node, and whether these labels are 1, (num_pairs,) each."""
        probable = p.probabilities >= MIN_PROBABILITY
        return p.probabilities[probable], p.true[probable]

    # ── Thresholds and prediction sets ───────────────────────────────────────────────────────────────────────────────

    def common_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Return `common_threshold`."""
        return common_threshold(logits, labels)

    def fit_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> list[float]:
        """Fit one threshold per node, a probability; 0.5 for all if no label is 1.

        A node's own threshold has its best F1. The common threshold has the best micro-F1. The result is their weighted mean in
        logits. The weights are the node's number of positives, and `STRENGTH`. The logits must be calibrated by parameters that
        were fitted to other texts.
        """
        true, common = labels == 1, logit(common_threshold(logits, labels))
        positives, thresholds = true.sum(axis=0), np.full(self.tree.num_nodes, common)
        for node in np.flatnonzero(positives):
            own = best_threshold(logits[:, node], true[:, node])
            thresholds[node] = np.average([own, common], weights=[positives[node], STRENGTH])
        return expit(thresholds).tolist()

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

    def predict_sets(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: SetThreshold
    ) -> PredictedSets:
        """Predict sets for the texts with a label 1. A text counts for the share of its nodes that the set holds.

        The size is the number of ``nodes`` in a set.
        """
        has_label = (labels == 1).any(axis=1)
        logits, labels, texts = logits[has_label], labels[has_label], texts[has_label]
        probabilities = torch.from_numpy(expit(logits.astype(np.float64)))
        sets = self.decisions.prediction_sets(probabilities, threshold).numpy()
        rows, nodes = np.nonzero(labels == 1)
        of_labels = pd.DataFrame({"text": texts[rows], "node": nodes, "held": sets[rows, nodes].astype(float)})
        of_texts = pd.DataFrame({"nodes": sets.sum(axis=1).astype(float)}).groupby(texts).mean()
        return PredictedSets(self.decisions, of_labels, of_texts, self.confidence(logits, texts), "mean")

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
        pairs = zip(labels[listed["index"]] == 1, wrong, strict=True)
        changed = [{*np.flatnonzero(given).tolist()} ^ nodes for given, nodes in pairs]
        better = [{node for node in nodes if nodes.issuperset(self.tree.path(node))} for nodes in changed]
        return listed.assign(why=np.where(listed["better"] < 0, "unlikely label", "missing label"), better=better)

    # ── What a reader sees ───────────────────────────────────────────────────────────────────────────────────────────

    def plots(self, p: Predictions, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        return {"f1_by_frequency": plots.f1_by_frequency(per_class)}

    def headline(self, scores: dict[str, float], texts: str, share: Callable[[float], str]) -> str:
        """Return the scores of a split that matter most. ``texts`` names its rows."""
        correct = f"F1 {scores['micro_f1']:.2f} over all nodes of {texts}"
        is_deep = self.tree.depth > 1 and "level_1_micro_f1" in scores
        return f"{correct}, {scores['level_1_micro_f1']:.2f} at level 1" if is_deep else correct

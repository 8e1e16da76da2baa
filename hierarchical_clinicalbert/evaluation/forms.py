"""What differs in evaluation between the two forms of label: `OnePathForm` and `ManyNodesForm` have
the same methods.

Worth knowing about one path:

1. The scored prediction is the most probable leaf with its ancestors, so a predicted path always
   reaches a leaf.
2. A label that is an inner node ("specific disease", child unknown) counts in all scores but the
   flat ones.
3. A score without documents (no label is a leaf, or reaches the level) is left out, so no score is
   NaN.
4. The thresholds of prediction sets are those of split conformal prediction (Vovk et al., 2005).
   The scores must be exchangeable. A repeated text brings all its rows, so the score of a text is
   the greatest of its rows. A row labelled with an inner node counts as covered if the set contains
   every leaf below. Leaving such rows out would select rows by their label, and the coverage of the
   other rows would be too low.

About any number of nodes:

5. Each node is a decision with a score z, given its parent: P(node) = P(parent) · σ(z). It is open
   for a text that has the parent, or if the node is a root. What all nodes share is fitted on open
   decisions, and each node's own scale and bias on all texts, see `evaluation.calibration`.
6. Each node's threshold of best F1 is shrunk towards a common one, most if the node has few
   positives.
7. The guarantee is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, 2022). The
   loss of a text is the share of its true nodes that the set {P(node) >= t} misses. Texts without
   true nodes do not count.

Thresholds must come from a model that was not fitted to their rows, hence
`evaluation.calibration.calibrate_out_of_fold`.

In this file ``logits`` are (num_rows, num_classes), ``labels`` the arrays of `Decisions.targets`,
``texts`` (num_rows,) the same number for the same text, and ``thresholds`` those of `Calibration`.
"""

import logging
from collections.abc import Callable
from decimal import ROUND_FLOOR, Context
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit, logit
from transformers import EvalPrediction

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from decisions_hierarchical import DEFAULT_THRESHOLD, ManyNodes, OnePath, SetThreshold
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.lexical import (
    LeafClassifier,
    LexicalClassifier,
    NodeClassifier,
    common_tokens,
)
from hierarchical_clinicalbert.evaluation.metrics import (
    MANY_NODES,
    ONE_PATH,
    Metric,
    Predictions,
    of_all_levels,
    one_hot,
)
from hierarchical_clinicalbert.evaluation.sets import PredictedSets, choose_bands, split_by_band
from hierarchical_clinicalbert.reading.columns import join_labels
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024  # of prediction sets
SIX_DIGITS_DOWN = Context(prec=6, rounding=ROUND_FLOOR)
# pairs below it are not in the calibration error: nearly all pairs have a probability near 0
MIN_PROBABILITY = 0.1
ROUNDING = 1e-9  # of sums of losses
STRENGTH = 20  # of the shrinkage of thresholds, in positives


# ── What both forms share ─────────────────────────────────────────────────────────────────────────


class FormBase:
    """The base class of `OnePathForm` and `ManyNodesForm`.

    Attributes:
        metrics: the table of metrics.
        micro_f1: the name of the F1 over all pairs of row and class.
        plot_titles: titles of the form's plots, by file name.
        columns: names of the first columns of `prediction_table`.
        scored: what `scored_pairs` are, and their share that is correct.
    """

    metrics: dict[str, Metric]
    micro_f1: str
    plot_titles: dict[str, str]
    columns: tuple[str, str, str, str]
    scored: tuple[str, str]
    decisions_class: Any
    classifier: Any  # a subclass of LexicalClassifier
    set_scores: Any  # what `thresholds_of` reads of each text
    thresholds_of: Any

    def __init__(self, tree: Taxonomy):
        self.tree, self.decisions = tree, self.decisions_class(tree)

    # ── Metrics and tables ────────────────────────────────────────────────────────────────────────

    def measure(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        thresholds: Any = None,
        texts: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Compute all metrics that the rows define. InputError: the logits are not finite."""
        infinite = ~np.isfinite(logits).all(axis=1)
        if infinite.any():
            where = f"{infinite.sum()} of {len(logits)} documents"
            raise InputError(
                f"the model's logits are not finite for {where}: training diverged; lower "
                "--learning_rate"
            )
        predictions = Predictions(self, logits, labels, thresholds, texts)
        metrics = of_all_levels(self.metrics, self.tree.depth)
        measured = {name: metric.compute(predictions) for name, metric in metrics.items()}
        return {name: float(value) for name, value in measured.items() if value is not None}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics for a Trainer.

        Predictions are logits, or a tuple that begins with them.
        """
        logits = (
            prediction.predictions[0]
            if isinstance(prediction.predictions, tuple)
            else prediction.predictions
        )
        return self.measure(logits, prediction.label_ids)

    def class_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes, (num_rows, num_classes), in float64."""
        log_probs = self.decisions.log_probs(torch.tensor(logits, dtype=torch.float64))
        return log_probs[:, : self.decisions.num_classes].exp().numpy()

    def prediction_table(self, p: Predictions) -> pd.DataFrame:
        """Return a table of each row's deepest labels, and its deepest predicted nodes, most
        probable first.

        The second choice is the most probable of the classes that are not predicted.
        """
        tree = self.tree
        rows = []
        correct = ((p.chosen == p.true) | ~p.known).all(axis=1)
        others = np.where(p.chosen, np.nan, p.probabilities)[:, : self.decisions.num_classes]
        arrays = (p.true, p.chosen, p.probabilities, correct, others)
        for true, chosen, probabilities, is_correct, of_others in zip(*arrays, strict=True):
            predicted = sorted(
                tree.deepest(np.flatnonzero(chosen).tolist()), key=lambda node: -probabilities[node]
            )
            second = None if np.isnan(of_others).all() else np.nanargmax(of_others)
            paths = (
                join_labels((tree.names[step] for step in tree.path(node)), " > ")
                for node in predicted
            )
            values = (
                join_labels(
                    tree.labels[node] for node in tree.deepest(np.flatnonzero(true).tolist())
                ),
                join_labels(tree.labels[node] for node in predicted),
                "; ".join(f"{probabilities[node]:.6f}" for node in predicted),
                join_labels(paths),
            )
            row = dict(zip(self.columns, values, strict=True)) | {
                "correct": is_correct,
                "second_choice": "" if second is None else tree.labels[second],
                "second_probability": np.nan if second is None else probabilities[second],
            }
            rows.append(row)
        return pd.DataFrame(rows)

    # ── Thresholds and prediction sets ────────────────────────────────────────────────────────────

    def common_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float | None:
        """Return the best threshold of predicted nodes on these rows; None if the most probable
        leaf is predicted.
        """
        return None

    def fit_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> list[float] | None:
        """Return the thresholds of predicted nodes; None if the most probable leaf is predicted."""
        return None

    def confidence(self, logits: np.ndarray, texts: np.ndarray) -> pd.Series:
        """Return the probability of each text's most probable leaf, by text."""
        of_leaves = self.class_probabilities(logits)[:, : self.tree.num_leaves]
        return pd.Series(of_leaves.max(axis=1)).groupby(texts).first()

    def fit_sets(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
        """Return the fields of `Calibration` for prediction sets, from logits whose calibration was
        fitted to other texts.

        ``set_thresholds`` are for the shares 0.01, …, 0.99. An entry is one threshold for each band
        if the bands of `choose_bands` all have enough texts (Mondrian conformal prediction: Vovk et
        al., 2005), else one for all texts.
        """
        scores = self.set_scores(logits, labels, texts)
        confidence = self.confidence(logits, texts)
        bands = choose_bands(self, logits, labels, texts)
        thresholds = self.thresholds_of(scores)
        if bands:
            by_band = map(self.thresholds_of, split_by_band(scores, confidence, bands))
            thresholds = [
                common if None in of_bands else of_bands
                for common, *of_bands in zip(thresholds, *by_band, strict=True)
            ]
        fields = {
            "set_thresholds": thresholds,
            "set_bands": bands or None,
            "num_texts": scores.index.nunique(),
        }
        return fields | self.scores_to_store(scores, labels, texts)

    def scores_to_store(
        self, scores: pd.Series, labels: np.ndarray, texts: np.ndarray
    ) -> dict[str, Any]:
        """Return the fields of `Calibration` that thresholds for other class frequencies are
        computed from, if any.
        """
        return {}

    # ── Lexical head ──────────────────────────────────────────────────────────────────────────────

    def fit_classifier(
        self,
        counts: csr_matrix,
        labels: np.ndarray,
        wanted: bool | None = None,
        phrases: csr_matrix | None = None,
    ) -> LexicalClassifier | None:
        """Fit the lexical classifier on the training rows; return None if it is not wanted, or
        there is nothing to tell apart.

        By default it is wanted up to `LexicalClassifier.default_size`. ``phrases`` are those of
        `LexicalClassifier`.
        """
        if wanted is False:
            return None
        if not self.classifier.learnable(self.decisions, labels).size:
            logger.info("no lexical head: the training rows do not tell any two classes apart")
            return None
        if phrases is not None:
            of_phrases = self.decisions.targets(
                [[node] for node in range(self.decisions.num_classes)]
            ).numpy()
            counts = vstack([counts, phrases]).tocsr()
            labels = np.concatenate([labels, of_phrases])
        num_classes = len(self.classifier.learnable(self.decisions, labels))
        num_tokens = len(common_tokens(counts))
        if wanted is None and num_tokens * num_classes > self.classifier.default_size:
            size = f"{num_tokens:,} tokens and {num_classes:,} classes"
            logger.info(
                "no lexical head: by default there is none for %s; --lexical_head true adds it",
                size,
            )
            return None
        return self.classifier(self.decisions, counts, labels, phrases)


# ── One path a text ───────────────────────────────────────────────────────────────────────────────


class OnePathForm(FormBase):
    """Each text has one label, so ``labels`` are node ids, (num_rows,), and ``logits`` those of
    leaves.
    """

    metrics = ONE_PATH
    micro_f1 = "accuracy"
    decisions_class = OnePath
    classifier = LeafClassifier
    plot_titles = {
        "confusion_matrix_level_{level}": "Confusion matrix of the {split} rows, level {level}"
    }
    columns = ("label", "prediction", "probability", "path")
    scored = ("Documents", "Accuracy")

    # ── Labels and decisions ──────────────────────────────────────────────────────────────────────

    def known_nodes(self, labels: np.ndarray) -> np.ndarray:
        """Return which nodes a label tells of, (num_rows, num_nodes) of bool: all but those below
        it.
        """
        label = torch.from_numpy(one_hot(labels, self.tree.num_nodes)).float()
        return (self.decisions.sum_to_root(label) <= label).numpy()

    def scored_pairs(self, p: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability of each row's predicted leaf, and whether it is correct,
        (num_rows,) each.

        If the label is an inner node, a prediction below it scores P(prediction given label),
        because the true leaf is unknown. Leaving such rows out would select rows by their label,
        and make correct probabilities look wrong.
        """
        rows = np.arange(len(p.labels))
        leaf = p.chosen[:, : p.num_leaves].argmax(axis=1)
        given_label = p.log_probs[rows, leaf] - p.log_probs[rows, p.labels]
        correct = np.where(
            p.known[rows, leaf], p.true[rows, leaf], np.exp(np.minimum(given_label, 0))
        )
        return p.probabilities[rows, leaf], correct

    # ── Prediction sets ───────────────────────────────────────────────────────────────────────────

    def set_scores(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> pd.Series:
        """Return the nonconformity score of each text, by text: the greatest of its rows."""
        rows = zip(
            torch.from_numpy(logits).split(ROWS_AT_ONCE),
            torch.from_numpy(labels).split(ROWS_AT_ONCE),
            strict=True,
        )
        scores = [
            self.decisions.nonconformity(self.decisions.log_probs(u.double()).exp(), ids)
            for u, ids in rows
        ]
        return pd.Series(torch.cat(scores).numpy()).groupby(texts).max()

    def thresholds_of(self, scores: pd.Series) -> list[float | None]:
        """Return one threshold of prediction sets for each coverage 0.01, …, 0.99; None where it
        needs more texts.
        """
        ordered = np.sort(scores)
        thresholds = list[float | None]()
        for percent in range(1, 100):
            rank = -(-(len(ordered) + 1) * percent // 100)  # ⌈(n + 1) · coverage⌉ in integers
            thresholds.append(float(ordered[rank - 1]) if rank <= len(ordered) else None)
        return thresholds

    def scores_to_store(
        self, scores: pd.Series, labels: np.ndarray, texts: np.ndarray
    ) -> dict[str, Any]:
        """Return the fields of `Calibration` that thresholds for other class frequencies are
        computed from.
        """
        of_texts = pd.Series(labels).groupby(texts).agg(list)
        return {"set_scores": scores.tolist(), "set_labels": of_texts[scores.index].tolist()}

    def predict_sets(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: SetThreshold
    ) -> PredictedSets:
        """Predict sets. A set holds a label if it contains all leaves at or below it, and a text
        must have all its labels held.

        Sizes are the numbers of ``leaves`` and of ``nodes`` that a set names, and ``single_leaf``,
        whether it is one leaf.
        """
        decisions = self.decisions
        held = list[torch.Tensor]()
        sizes = list[torch.Tensor]()
        for rows in torch.from_numpy(logits).split(ROWS_AT_ONCE):
            sets = decisions.prediction_sets(decisions.log_probs(rows.double()).exp(), threshold)
            held.append(decisions.held(sets))
            num_leaves = held[-1][:, : self.tree.num_leaves].sum(1)
            sizes.append(torch.stack([num_leaves, sets.sum(1), num_leaves == 1], dim=1))
        holds_label = np.take_along_axis(torch.cat(held).numpy(), labels[:, None], axis=1)[:, 0]
        of_labels = pd.DataFrame({"text": texts, "node": labels, "held": holds_label.astype(float)})
        by_row = pd.DataFrame(
            torch.cat(sizes).double().numpy(), columns=["leaves", "nodes", "single_leaf"]
        )
        of_texts = by_row.groupby(texts).mean()
        return PredictedSets(
            self.decisions, of_labels, of_texts, self.confidence(logits, texts), "min"
        )

    # ── What a reader sees ────────────────────────────────────────────────────────────────────────

    def plots(self, p: Predictions, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        return plots.confusion_matrices(self.tree, p.logits, p.labels)

    def headline(self, scores: dict[str, float], texts: str, share: Callable[[float], str]) -> str:
        """Return the scores of a split that matter most.

        ``texts`` names its rows, ``share`` formats a share.
        """
        has_inner = "leaf_labels" in scores
        counted = (
            f"the {share(scores['leaf_labels'])} of {texts} that have a leaf as label"
            if has_inner
            else texts
        )
        parts = (
            [f"{share(scores['accuracy'])} of {counted} are classified correctly"]
            if "accuracy" in scores
            else []
        )
        if self.tree.depth > 1 and "level_1_accuracy" in scores:
            whose = f"of {'all' if parts else texts} " if has_inner else ""
            parts.append(f"{share(scores['level_1_accuracy'])} {whose}are in the right branch")
        return ", ".join(parts)


# ── Any number of nodes a text ────────────────────────────────────────────────────────────────────


def best_threshold(scores: np.ndarray, true: np.ndarray) -> float | None:
    """Return the greatest threshold of best F1: halfway between two scores, or half a unit beyond
    the first or last one.

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


class ManyNodesForm(FormBase):
    """``labels`` are 1 or 0, (num_rows, num_nodes): a text with a node has its ancestors too.

    ``logits`` are of all nodes.
    """

    metrics = MANY_NODES
    micro_f1 = "micro_f1"
    decisions_class = ManyNodes
    classifier = NodeClassifier
    plot_titles = {"f1_by_frequency": "F1 of each node over its number of {split} texts"}
    columns = ("labels", "predictions", "probabilities", "paths")
    scored = ("Pairs of document and node", "Share of correct pairs")

    # ── Labels and decisions ──────────────────────────────────────────────────────────────────────

    def known_nodes(self, labels: np.ndarray) -> np.ndarray:
        """Return which nodes a label tells of, (num_rows, num_nodes) of bool: all."""
        return np.ones(labels.shape, dtype=bool)

    def scored_pairs(self, p: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of at least 0.1, of pairs of text and node, and whether these
        labels are 1, (num_pairs,) each.
        """
        probable = p.probabilities >= MIN_PROBABILITY
        return p.probabilities[probable], p.true[probable]

    # ── Thresholds and prediction sets ────────────────────────────────────────────────────────────

    def common_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Return the threshold for all nodes with the best micro-F1, a probability; 0.5 if no label
        is 1.
        """
        threshold = best_threshold(logits.ravel(), labels.ravel() == 1)
        return DEFAULT_THRESHOLD if threshold is None else float(expit(threshold))

    def fit_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> list[float]:
        """Fit one threshold per node, a probability; 0.5 for all if no label is 1.

        A node's own threshold has its best F1. The common threshold has the best micro-F1. The
        result is their weighted mean in logits. The weights are the node's number of positives, and
        `STRENGTH`. The logits must be calibrated by parameters that were fitted to other texts.
        """
        true = labels == 1
        common = logit(self.common_threshold(logits, labels))
        positives = true.sum(axis=0)
        thresholds = np.full(self.tree.num_nodes, common)
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

        The threshold of a recall is the greatest t with (Σ loss + 1) / (n + 1) <= 1 - recall, over
        the n texts with a label 1. It is None where 1 / (n + 1) > 1 - recall: the recall needs more
        texts. The sum changes at probabilities of true nodes only. The threshold is rounded down to
        6 significant digits, which misses no more.
        """
        ascending = scores.sort_values()
        # the sum of losses at t just above each
        missed = (1 / ascending.groupby(level=0).transform("size")).cumsum()
        allowed = (100 - np.arange(1, 100)) / 100 * (scores.index.nunique() + 1) - 1
        # the node that must not be missed
        first_kept = np.searchsorted(missed, allowed + ROUNDING, side="right")
        exact = [
            ascending.iloc[i] if most > -ROUNDING else None
            for i, most in zip(first_kept, allowed, strict=True)
        ]
        return [
            None if p is None else float(SIX_DIGITS_DOWN.create_decimal_from_float(p))
            for p in exact
        ]

    def predict_sets(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray, threshold: SetThreshold
    ) -> PredictedSets:
        """Predict sets for the texts with a label 1. A text counts for the share of its nodes that
        the set holds.

        The size is the number of ``nodes`` in a set.
        """
        has_label = (labels == 1).any(axis=1)
        logits = logits[has_label]
        labels = labels[has_label]
        texts = texts[has_label]
        probabilities = torch.from_numpy(expit(logits.astype(np.float64)))
        sets = self.decisions.prediction_sets(probabilities, threshold).numpy()
        rows, nodes = np.nonzero(labels == 1)
        of_labels = pd.DataFrame(
            {"text": texts[rows], "node": nodes, "held": sets[rows, nodes].astype(float)}
        )
        of_texts = pd.DataFrame({"nodes": sets.sum(axis=1).astype(float)}).groupby(texts).mean()
        return PredictedSets(
            self.decisions, of_labels, of_texts, self.confidence(logits, texts), "mean"
        )

    # ── What a reader sees ────────────────────────────────────────────────────────────────────────

    def plots(self, p: Predictions, per_class: list[dict]) -> dict[str, Figure | None]:
        """Draw the figures of a split, by file name."""
        return {"f1_by_frequency": plots.f1_by_frequency(per_class)}

    def headline(self, scores: dict[str, float], texts: str, share: Callable[[float], str]) -> str:
        """Return the scores of a split that matter most. ``texts`` names its rows."""
        correct = f"F1 {scores['micro_f1']:.2f} over all nodes of {texts}"
        is_deep = self.tree.depth > 1 and "level_1_micro_f1" in scores
        return f"{correct}, {scores['level_1_micro_f1']:.2f} at level 1" if is_deep else correct


# ── The choice ────────────────────────────────────────────────────────────────────────────────────

Form = OnePathForm | ManyNodesForm
FORMS: dict[str, type[Form]] = {SINGLE_LABEL: OnePathForm, MULTI_LABEL: ManyNodesForm}


def form_of(tree: Taxonomy, problem_type: str) -> Form:
    """Return what differs for a taxonomy and a form of label, ``problem_type`` of the
    configuration.
    """
    return FORMS[problem_type](tree)


def direction_of(name: str) -> int:
    """Return `Metric.direction` of a metric of either form: -1 if lower is better.

    Those of levels, and unknown ones, are 0.
    """
    metric = name.removeprefix("eval_")
    return min(
        (form.metrics[metric].direction for form in FORMS.values() if metric in form.metrics),
        default=0,
    )

"""What both forms of label have in common in evaluation: the base class of `OnePathForm` and `ManyNodesForm`."""

import logging
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from transformers import EvalPrediction

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation.lexical import DEFAULT_SIZE, LexicalClassifier
from hierarchical_clinicalbert.evaluation.metrics import Metric, Predictions, of_all_levels
from hierarchical_clinicalbert.evaluation.sets import choose_bands, split_by_band
from hierarchical_clinicalbert.reading.columns import join_labels
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)


class FormBase:
    """What differs in evaluation between the two forms of label. Both subclasses have the same methods.

    In all methods, ``logits`` are (num_rows, num_classes), ``labels`` the arrays of `Decisions.targets`, ``texts`` (num_rows,) the
    same number for the same text, and ``thresholds`` those of `Calibration`.

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

    # ── Metrics and tables ───────────────────────────────────────────────────────────────────────────────────────────

    def measure(
        self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray | None = None, thresholds: Any = None
    ) -> dict[str, float]:
        """Compute all metrics that the rows define. InputError: the logits are not finite."""
        infinite = ~np.isfinite(logits).all(axis=1)
        if infinite.any():
            where = f"{infinite.sum()} of {len(logits)} documents"
            raise InputError(f"the model's logits are not finite for {where}: training diverged; lower --learning_rate")
        predictions = Predictions(self, logits, labels, texts, thresholds)
        metrics = of_all_levels(self.metrics, self.tree.depth)
        measured = {name: metric.compute(predictions) for name, metric in metrics.items()}
        return {name: float(value) for name, value in measured.items() if value is not None}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics for a Trainer. Predictions are logits, or a tuple that begins with them."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return self.measure(logits, prediction.label_ids)

    def class_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes, (num_rows, num_classes), in float64."""
        log_probs = self.decisions.log_probs(torch.tensor(logits, dtype=torch.float64))
        return log_probs[:, : self.decisions.num_classes].exp().numpy()

    def prediction_table(self, p: Predictions) -> pd.DataFrame:
        """Return a table of each row's deepest labels, and its deepest predicted nodes, most probable first.

        The second choice is the most probable of the classes that are not predicted.
        """
        tree, rows = self.tree, []
        correct = ((p.chosen == p.true) | ~p.known).all(axis=1)
        others = np.where(p.chosen, np.nan, p.probabilities)[:, : self.decisions.num_classes]
        arrays = (p.true, p.chosen, p.probabilities, correct, others)
        for true, chosen, probabilities, is_correct, of_others in zip(*arrays, strict=True):
            predicted = sorted(tree.deepest(np.flatnonzero(chosen).tolist()), key=lambda node: -probabilities[node])
            second = None if np.isnan(of_others).all() else np.nanargmax(of_others)
            paths = (join_labels((tree.names[step] for step in tree.path(node)), " > ") for node in predicted)
            values = (
                join_labels(tree.labels[node] for node in tree.deepest(np.flatnonzero(true).tolist())),
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

    # ── Thresholds and prediction sets ───────────────────────────────────────────────────────────────────────────────

    def common_threshold(self, logits: np.ndarray, labels: np.ndarray) -> float | None:
        """Return the best threshold of predicted nodes on these rows; None if the most probable leaf is predicted."""
        return None

    def fit_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> list[float] | None:
        """Return the thresholds of predicted nodes; None if the most probable leaf is predicted."""
        return None

    def confidence(self, logits: np.ndarray, texts: np.ndarray) -> pd.Series:
        """Return the probability of each text's most probable leaf, by text."""
        of_leaves = self.class_probabilities(logits)[:, : self.tree.num_leaves]
        return pd.Series(of_leaves.max(axis=1)).groupby(texts).first()

    def fit_sets(self, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
        """Return the fields of `Calibration` for prediction sets, from logits whose calibration was fitted to other texts.

        ``set_thresholds`` are for the shares 0.01, …, 0.99. An entry is one threshold for each band if the bands of `choose_bands`
        all have enough texts (Mondrian conformal prediction: Vovk et al., 2005), else one for all texts.
        """
        scores, confidence = self.set_scores(logits, labels, texts), self.confidence(logits, texts)
        bands, thresholds = choose_bands(self, logits, labels, texts), self.thresholds_of(scores)
        if bands:
            by_band = map(self.thresholds_of, split_by_band(scores, confidence, bands))
            thresholds = [
                common if None in of_bands else of_bands for common, *of_bands in zip(thresholds, *by_band, strict=True)
            ]
        fields = {"set_thresholds": thresholds, "set_bands": bands or None, "num_texts": scores.index.nunique()}
        return fields | self.scores_to_store(scores, labels, texts)

    def scores_to_store(self, scores: pd.Series, labels: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
        """Return the fields of `Calibration` that thresholds for other class frequencies are computed from, if any."""
        return {}

    # ── Lexical head ─────────────────────────────────────────────────────────────────────────────────────────────────

    def fit_classifier(
        self, counts: csr_matrix, labels: np.ndarray, wanted: bool | None = None
    ) -> LexicalClassifier | None:
        """Fit the lexical classifier on the training rows; return None if it is not wanted, or there is nothing to tell apart.

        By default it is wanted up to `DEFAULT_SIZE`.
        """
        if wanted is False:
            return None
        vocab_size, num_classes = counts.shape[1], self.decisions.num_classes
        if wanted is None and vocab_size * num_classes > DEFAULT_SIZE:
            size = f"{vocab_size:,} tokens and {num_classes:,} classes"
            logger.info("no lexical head: by default there is none for %s; --lexical_head true adds it", size)
            return None
        if not self.classifier.learnable(self.decisions, labels).size:
            logger.info("no lexical head: the training rows do not tell any two classes apart")
            return None
        return self.classifier(self.decisions, counts, labels)

"""Calibrate a trained checkpoint with several labels a text, and write the files that show the result.

The functions have the names and arguments of those in `evaluation.report`. ``splits`` holds tokenized rows, and ``logits`` the
marginal logits of each scored split: (num_texts, num_nodes).
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import DatasetDict
from scipy.special import expit
from transformers import EvalPrediction

from configuration_hierarchical import HierarchicalConfig
from evaluation import plots
from evaluation.lexical import MultiLabelLexicalClassifier, token_counts
from evaluation.multi_label import (
    MultiLabelCalibration,
    build_multi_label_metrics,
    choose,
    common_threshold,
    fit_calibration,
    fit_node_thresholds,
    fit_recall_thresholds,
    held_out,
    per_node_report,
    recall_scores,
)
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing.card import PREFIXES
from taxonomy_hierarchical import Taxonomy
from training.multi_label import label_arrays

logger = logging.getLogger(__name__)

RECALL = 0.9  # of the measured answers


def calibrate_model(
    model: HierarchicalForSequenceClassification,
    classifier: MultiLabelLexicalClassifier | None,
    taxonomy: Taxonomy,
    decision_logits: dict[str, np.ndarray],
    splits: DatasetDict,
    max_length: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fit the lexical head's weight, the calibration and the thresholds, and store them in the model.

    Returns:
        Metrics after calibration, and without the lexical head if there is one (``without_lexical_head_…``). For test rows,
        also recall and size of answers for `RECALL` (``test_answer_…``). Then the calibrated marginal logits.
    """
    labels = {split: label_arrays(splits[split]) for split in decision_logits}
    texts = np.array(splits["validation"]["text_id"])
    no_scores: dict[str, np.ndarray | None] = dict.fromkeys(decision_logits)

    def calibrate(lexical: dict[str, np.ndarray | None]) -> tuple[MultiLabelCalibration, dict[str, np.ndarray]]:
        validation = (taxonomy, decision_logits["validation"], lexical["validation"], labels["validation"])
        fitted = fit_calibration(*validation)
        marginals = {split: fitted.apply(taxonomy, z, lexical[split]) for split, z in decision_logits.items()}
        return fitted, marginals | {"validation": held_out(*validation, texts)}

    # ── Fit on the validation rows ───────────────────────────────────────────────────────────────────────────────────
    lexical_scores = no_scores
    if classifier is not None:
        vocab_size = classifier.weight.shape[1]
        lexical_scores = {split: classifier.scores(token_counts(splits[split], vocab_size)) for split in labels}
    fitted, logits = calibrate(lexical_scores)
    thresholds = fit_node_thresholds(taxonomy, logits["validation"], labels["validation"])
    recall_thresholds, recall_texts = fit_recall_thresholds(taxonomy, logits["validation"], labels["validation"])

    # ── Store in the model ───────────────────────────────────────────────────────────────────────────────────────────
    weight = fitted.lexical_weight
    model.set_lexical_head(classifier.weights() if classifier is not None and weight else None, weight)
    model.set_calibration(
        node_scales=fitted.node_scales,
        node_biases=fitted.node_biases,
        node_thresholds=thresholds.tolist(),
        recall_thresholds=recall_thresholds,
        recall_texts=recall_texts,
        conformal_max_length=max_length,
    )
    least, middle, most = np.quantile(thresholds, (0, 0.5, 1))
    logger.info("calibrated on the validation rows: weight of the lexical head %.2f", weight)
    logger.info("thresholds of the nodes: median %.2f, from %.2f to %.2f", middle, least, most)

    # ── Measure, with and without the lexical head ───────────────────────────────────────────────────────────────────
    metrics = {"lexical_weight": weight, **measure(taxonomy, logits, splits, thresholds)}
    if weight:
        _, without = calibrate(no_scores)
        own = fit_node_thresholds(taxonomy, without["validation"], labels["validation"])
        measured = measure(taxonomy, without, splits, own)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    least = recall_thresholds[round(100 * RECALL) - 1]
    if "test" in logits and least is not None:
        scores = recall_scores(logits["test"], labels["test"], least)
        metrics |= {f"test_answer_{name}": value for name, value in scores.items()}
    return metrics, logits


def measure(
    taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict, thresholds: np.ndarray
) -> dict[str, float]:
    """Compute each split's metrics from calibrated logits."""
    compute_metrics, metrics = build_multi_label_metrics(taxonomy, thresholds), {}
    for split, scores in logits.items():
        measured = compute_metrics(EvalPrediction(scores, label_arrays(splits[split])))
        metrics |= {f"{PREFIXES[split]}_{name}": value for name, value in measured.items()}
    return metrics


def stored_thresholds(config: HierarchicalConfig, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the thresholds of a calibrated model; for another the common one that is best on these rows."""
    stored = config.node_thresholds
    return np.full(logits.shape[1], common_threshold(logits, labels)) if stored is None else np.array(stored)


def shown_split(logits: dict[str, np.ndarray], splits: DatasetDict) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the name, the logits and the labels of the split whose details are shown."""
    split = "test" if "test" in logits else "validation"
    return split, logits[split], label_arrays(splits[split])


def class_scores(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """Compute scores of each node and 95 % intervals for metrics.json, on the split of `shown_split`."""
    if not logits:
        return {}
    split, scores, labels = shown_split(logits, splits)
    thresholds = stored_thresholds(config, scores, labels)
    rows, intervals = per_node_report(config.tree, scores, labels, thresholds)
    prefixed = {f"{PREFIXES[split]}_{name}": ends for name, ends in intervals.items()}
    return {"per_class": rows, "intervals": prefixed} if rows else {}


def draw_plots(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """Draw F1 by frequency, precision and recall, and the reliability diagram, of the split of `shown_split`."""
    if logits:
        tree, (_, scores, labels) = config.tree, shown_split(logits, splits)
        rows, _ = per_node_report(tree, scores, labels, stored_thresholds(config, scores, labels))
        plots.write(plots.f1_by_frequency(rows), folder / "f1_by_frequency.png")
        plots.write(plots.precision_and_recall(tree, scores, labels), folder / "precision_recall.png")
        draw_reliability(logits, splits, folder / "reliability_diagram.png")


def draw_reliability(logits: dict[str, np.ndarray], splits: DatasetDict, file: Path) -> None:
    """Draw the reliability diagram of the split of `shown_split`, over pairs of text and node."""
    _, *scored = shown_split(logits, splits)
    plots.write(plots.pair_reliability_diagram(*scored), file)


def write_predictions(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path
) -> None:
    """Write ``<split>_predictions.csv``: each text's row in its source, its labels, and the predicted nodes and probabilities.

    Only the deepest nodes are written, joined by ``; ``.
    """
    tree = config.tree
    for split, scores in logits.items():
        labels, probabilities = label_arrays(splits[split]), expit(scores)
        chosen = choose(tree, probabilities, stored_thresholds(config, scores, labels))
        rows = []
        for row, true, nodes, of_nodes in zip(splits[split]["row"], labels == 1, chosen, probabilities, strict=True):
            predicted = sorted(tree.deepest(np.flatnonzero(nodes).tolist()), key=lambda node: -of_nodes[node])
            names = "; ".join(tree.labels[node] for node in tree.deepest(np.flatnonzero(true).tolist()))
            shown = "; ".join(f"{of_nodes[node]:.6f}" for node in predicted)
            rows.append((row, names, "; ".join(tree.labels[node] for node in predicted), shown))
        table = pd.DataFrame(rows, columns=["row", "labels", "predictions", "probabilities"])
        table.sort_values("row", kind="stable").to_csv(folder / f"{split}_predictions.csv", index=False)

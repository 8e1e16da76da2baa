"""Score and calibrate a trained checkpoint, and write the files that show the result.

Worth knowing:

1. Scores are measured on the checkpoint as a user loads it, over a full-precision encoder, not on the quantized model in
   training.
2. The calibration and the thresholds are fitted on the validation rows, from logits that are computed once.
3. Validation scores are cross-validated: a calibration on four fifths of the rows scores the other fifth. With
   ``--load_best_model_at_end`` these rows also select the checkpoint, so their scores are optimistic
   (`benchmarks/studies/selection.py`). In multi-label data, the thresholds are fitted on the scored rows, so F1 is
   optimistic too.
4. Logits follow the order of the scored rows, which are sorted by length. The column ``row`` gives their place in the source.

In this file ``splits`` holds tokenized rows. ``logits`` holds the logits of each scored split: of the leaves, (num_rows,
num_leaves), or in multi-label data the marginal logits of all nodes, (num_rows, num_nodes).
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from scipy.special import expit
from torch import nn
from transformers import AutoModel, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from configuration_hierarchical import CALIBRATION, HierarchicalConfig
from errors import as_input_error
from evaluation import plots
from evaluation.calibration import calibrate_out_of_fold, coverage_scores, fit_calibration, fit_conformal_thresholds
from evaluation.lexical import LexicalClassifier, token_counts
from evaluation.metrics import (
    any_label_accuracy,
    build_compute_metrics,
    one_hot,
    per_class_report,
    predicted_probabilities,
)
from evaluation.multi_label import (
    build_multi_label_metrics,
    fit_multi_label_calibration,
    fit_node_thresholds,
    fit_recall_thresholds,
    predict_nodes,
    recall_scores,
)
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import DEFAULT_THRESHOLD, threshold_index, use_cpu_kernels
from publishing.card import MEASURED_TARGET, PREFIXES
from reading.columns import join_labels
from taxonomy_hierarchical import Taxonomy
from training.arguments import ComputeMetrics, HierarchicalTrainingArguments
from training.label_arrays import label_arrays
from training.tokens import build_collator
from training.trainer import HierarchicalTrainer

logger = logging.getLogger(__name__)

SCORING_ARGUMENTS: dict[str, Any] = {  # arguments of a Trainer that only scores
    **dict.fromkeys(("bf16", "fp16", "load_best_model_at_end", "push_to_hub", "enable_jit_checkpoint"), False),
    "report_to": [],
    "eval_strategy": "no",
    "lr_scheduler_type": "linear",  # some schedulers need an evaluation
    "lr_scheduler_kwargs": None,
}


def scoring_trainer(
    folder: str,
    training: HierarchicalTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    loss_function: nn.Module | None = None,
) -> HierarchicalTrainer:
    """Build a Trainer that scores a checkpoint as the pipeline does: loaded by `AutoModel`, without autocast."""
    with as_input_error(f"cannot load the checkpoint {folder}"):
        model: PreTrainedModel = AutoModel.from_pretrained(folder, trust_remote_code=True)
    if training.device.type == "cpu":
        use_cpu_kernels(model.encoder)
    return HierarchicalTrainer(
        model=model,
        args=dataclasses.replace(training, **SCORING_ARGUMENTS),
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer),
        compute_metrics=pipeline_metrics(model.config),
        loss_function=loss_function,
    )


def build_metrics(
    taxonomy: Taxonomy, multi_label: bool, thresholds: list[float] | float | None = None
) -> ComputeMetrics:
    """Build the Trainer's ``compute_metrics``; thresholds of the nodes are for multi-label models."""
    return build_multi_label_metrics(taxonomy, thresholds) if multi_label else build_compute_metrics(taxonomy)


def pipeline_metrics(config: HierarchicalConfig) -> ComputeMetrics:
    """Build the ``compute_metrics`` of the predictions that the pipeline makes: with the stored thresholds, or 0.5."""
    return build_metrics(config.tree, config.is_multi_label, config.node_thresholds or DEFAULT_THRESHOLD)


def score_splits(
    trainer: HierarchicalTrainer, splits: DatasetDict
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Score the validation rows (metrics ``eval_…``) and test rows (``test_…``).

    Returns:
        The metrics; the logits; and the logits that a calibration is fitted to: for multi-label models the decision logits, else
        the same.
    """
    config, metrics = trainer.model.config, dict[str, float]()
    kept = {"decision_logits"} if config.is_multi_label else set()
    ignored = [key for key in config.keys_to_ignore_at_inference if key not in kept]
    logits, to_calibrate = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for split, requested in (("validation", trainer.args.do_eval), ("test", trainer.args.do_predict)):
        if split in splits and requested is not False:
            output = trainer.predict(splits[split], ignored, metric_key_prefix=PREFIXES[split])
            metrics |= output.metrics
            if config.is_multi_label:
                logits[split], to_calibrate[split] = output.predictions
            else:
                logits[split] = to_calibrate[split] = output.predictions
                metrics |= any_label_scores(split, output.predictions, splits[split])
    return metrics, logits, to_calibrate


def any_label_scores(split: str, logits: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Compute `any_label_accuracy` of one split, if it has rows labelled with a leaf."""
    accuracy = any_label_accuracy(logits, label_arrays(rows), np.array(rows["text_id"]))
    return {} if accuracy is None else {f"{PREFIXES[split]}_any_label_accuracy": accuracy}


def calibrate_model(
    model: HierarchicalForSequenceClassification,
    classifier: LexicalClassifier | None,
    logits: dict[str, np.ndarray],
    splits: DatasetDict,
    max_length: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fit the lexical head's weight, the calibration and the thresholds, and store them in the model.

    ``logits`` are those to calibrate, of `score_splits`.

    Returns:
        Metrics after calibration, and without the lexical head if there is one (``without_lexical_head_…``). For test rows,
        also of answers for `MEASURED_TARGET` (``test_answer_…``). Then the calibrated logits.
    """
    config, taxonomy = model.config, model.config.tree
    labels = {split: label_arrays(splits[split]) for split in logits}
    texts = {split: np.array(splits[split]["text_id"]) for split in logits}
    fit: Any = fit_multi_label_calibration
    if not config.is_multi_label:
        fit = partial(fit_calibration, log_prior=None if classifier is None else classifier.log_prior)

    def calibrate(lexical: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray], Any]:
        validation = (taxonomy, logits["validation"], lexical.get("validation"), labels["validation"])
        fitted = fit(*validation)
        calibrated = {split: fitted.apply(taxonomy, logits[split], lexical.get(split)) for split in logits}
        calibrated["validation"] = calibrate_out_of_fold(fit, *validation, texts["validation"])
        if not config.is_multi_label:
            return fitted, calibrated, None
        thresholds = fit_node_thresholds(taxonomy, calibrated["validation"], labels["validation"])
        return fitted, calibrated, thresholds.tolist()

    # ── Fit on the validation rows ───────────────────────────────────────────────────────────────────────────────────
    lexical_scores = {}
    if classifier is not None:
        vocab_size = config.text_config.vocab_size
        lexical_scores = {split: classifier.scores(token_counts(splits[split], vocab_size)) for split in logits}
    fitted, calibrated, thresholds = calibrate(lexical_scores)

    # ── Store in the model ───────────────────────────────────────────────────────────────────────────────────────────
    fields = dataclasses.asdict(fitted) | {"conformal_max_length": max_length}
    weight = fields.pop("lexical_weight")
    model.set_lexical_head(classifier.weights() if classifier is not None and weight else None, weight)
    validation = (calibrated["validation"], labels["validation"])
    if config.is_multi_label:
        fields["recall_thresholds"], fields["recall_texts"] = fit_recall_thresholds(*validation)
        fields["node_thresholds"] = thresholds
        shown = f"thresholds of the nodes from {min(thresholds):.2f} to {max(thresholds):.2f}"
    else:
        fields["conformal_thresholds"] = fit_conformal_thresholds(taxonomy, *validation, texts["validation"])
        temperatures = fitted.temperatures
        shown = f"temperatures from {min(temperatures):.2f} to {max(temperatures):.2f}"
    model.set_calibration(**fields)
    logger.info("calibrated on the validation rows: %s; weight of the lexical head %.2f", shown, weight)

    # ── Measure, with and without the lexical head, and the answers ──────────────────────────────────────────────────
    metrics = {"lexical_weight": weight, **measure(config, calibrated, thresholds, splits)}
    if weight:
        measured = measure(config, *calibrate({})[1:], splits)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    return metrics | answer_scores(config, calibrated, splits), calibrated


def copy_calibration(model: HierarchicalForSequenceClassification, source: HierarchicalConfig, train: Dataset) -> None:
    """Store the calibration and thresholds of another run in the model, and a lexical head that is fitted to ``train``.

    ``train`` holds the rows that calibrated the other run, so the thresholds guarantee nothing any more.
    """
    if source.lexical_weight:
        counts = token_counts(train, model.config.text_config.vocab_size)
        classifier = LexicalClassifier(source.tree, counts, label_arrays(train))
        model.set_lexical_head(classifier.weights(), source.lexical_weight)
    model.set_calibration(**{name: getattr(source, name) for name in CALIBRATION} | {"refitted": True})


def answer_scores(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, float]:
    """Measure the answers for `MEASURED_TARGET` on the test rows, from calibrated logits: ``test_answer_…``."""
    thresholds = (config.recall_thresholds if config.is_multi_label else config.conformal_thresholds) or [None] * 99
    threshold = thresholds[threshold_index(MEASURED_TARGET)]  # None if there were too few validation rows for it
    if "test" not in logits or threshold is None:
        return {}
    scored = logits["test"], label_arrays(splits["test"])
    if config.is_multi_label:
        scores = recall_scores(*scored, threshold)
    else:
        scores = coverage_scores(config.tree, *scored, np.array(splits["test"]["text_id"]), threshold)
    return {f"test_answer_{name}": value for name, value in scores.items()}


def measure(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], thresholds: list[float] | None, splits: DatasetDict
) -> dict[str, float]:
    """Compute each split's metrics from calibrated logits."""
    compute_metrics, metrics = build_metrics(config.tree, config.is_multi_label, thresholds), dict[str, float]()
    for split, scores in logits.items():
        measured = compute_metrics(EvalPrediction(scores, label_arrays(splits[split])))
        metrics |= {f"{PREFIXES[split]}_{name}": value for name, value in measured.items()}
        if not config.is_multi_label:
            metrics |= any_label_scores(split, scores, splits[split])
    return metrics


def predict_with_stored_thresholds(config: HierarchicalConfig, logits: np.ndarray) -> np.ndarray:
    """Return the nodes that the pipeline predicts."""
    return predict_nodes(config.tree, expit(logits.astype(np.float64)), config.node_thresholds or DEFAULT_THRESHOLD)


def reported_split(logits: dict[str, np.ndarray], splits: DatasetDict) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the split that plots and class scores show, test before validation: its name, logits and labels."""
    split = "test" if "test" in logits else "validation"
    return split, logits[split], label_arrays(splits[split])


def class_scores(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """Compute scores and 95 % intervals for metrics.json, on the split of `reported_split`.

    The classes are the nodes, or with one label per text the leaves, over the documents labelled with a leaf.
    """
    if not logits:
        return {}
    split, scores, labels = reported_split(logits, splits)
    if config.is_multi_label:
        rows, intervals = per_class_report(config.tree.labels, labels, predict_with_stored_thresholds(config, scores))
    else:
        num_leaves = config.tree.num_leaves
        is_leaf = labels < num_leaves
        correct, chosen = (one_hot(ids[is_leaf], num_leaves) for ids in (labels, scores.argmax(axis=1)))
        texts = np.array(splits[split]["text_id"])[is_leaf]
        rows, intervals = per_class_report(config.tree.labels[:num_leaves], correct, chosen, texts)
        intervals = {name.replace("micro_f1", "accuracy"): ends for name, ends in intervals.items()}
    prefixed = {f"{PREFIXES[split]}_{name}": ends for name, ends in intervals.items()}
    return {"per_class": rows, "intervals": prefixed} if rows else {}


def draw_plots(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, per_class: list[dict], folder: Path
) -> None:
    """Draw the split of `reported_split`: the reliability diagram; and confusion matrices, or precision, recall and F1."""
    if not logits:
        return
    _, scores, labels = reported_split(logits, splits)
    if config.is_multi_label:
        plots.write(plots.f1_by_frequency(per_class), folder / "f1_by_frequency.png")
        plots.write(plots.precision_and_recall(config.tree, scores, labels), folder / "precision_recall.png")
    else:
        for level, figure in plots.confusion_matrices(config.tree, scores, labels).items():
            plots.write(figure, folder / f"confusion_matrix_level_{level}.png")
    plots.write(plots.reliability_diagram(config.tree, scores, labels), folder / "reliability_diagram.png")


def write_predictions(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path
) -> None:
    """Write ``<split>_predictions.csv``: each scored row's number in its source, labels, predictions and probabilities."""
    for split, scores in logits.items():
        labels = label_arrays(splits[split])
        if config.is_multi_label:
            columns = label_set_columns(config, scores, labels)
        else:
            names = config.tree.labels
            columns = {
                "label": [names[node] for node in labels],
                "prediction": [names[leaf] for leaf in scores.argmax(axis=1)],
                "probability": predicted_probabilities(scores),
            }
        table = pd.DataFrame({"row": splits[split]["row"], **columns}).sort_values("row", kind="stable")
        table.to_csv(folder / f"{split}_predictions.csv", index=False, float_format="%.6f")


def label_set_columns(config: HierarchicalConfig, logits: np.ndarray, labels: np.ndarray) -> dict[str, list[str]]:
    """Return the columns of a CSV: each text's deepest labels, and its deepest predicted nodes with their probabilities.

    Names are joined by `join_labels`, predicted ones with the most probable first.
    """
    tree, columns = config.tree, {"labels": list[str](), "predictions": list[str](), "probabilities": list[str]()}
    chosen, probabilities = predict_with_stored_thresholds(config, logits), expit(logits)
    for true, nodes, of_nodes in zip(labels == 1, chosen, probabilities, strict=True):
        predicted = sorted(tree.deepest(np.flatnonzero(nodes).tolist()), key=lambda node: -of_nodes[node])
        labelled = tree.deepest(np.flatnonzero(true).tolist())
        columns["labels"].append(join_labels(tree.labels[node] for node in labelled))
        columns["predictions"].append(join_labels(tree.labels[node] for node in predicted))
        columns["probabilities"].append("; ".join(f"{of_nodes[node]:.6f}" for node in predicted))
    return columns


def log_metrics(metrics: dict[str, float]) -> None:
    """Log a table of the metrics, with one column per scored split."""
    split_of = {prefix: split for split, prefix in PREFIXES.items() if f"{prefix}_log_loss" in metrics}
    table: dict[str, dict[str, float]] = {split: {} for split in split_of.values()}
    for key, value in metrics.items():
        prefix, _, name = key.partition("_")
        if prefix in split_of and not name.endswith(("_per_second", "_time", "runtime")):
            table[split_of[prefix]][name] = value
    if table:  # rows were scored
        logger.info("scores\n%s", pd.DataFrame(table).to_string(float_format="%.4f", na_rep=""))

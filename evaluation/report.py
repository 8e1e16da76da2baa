"""Score and calibrate a trained checkpoint, and write the files that show the result.

Worth knowing:

1. Scores are of the checkpoint as a user loads it, over a full-precision encoder, not of the quantized model in training.
2. The lexical head's weight, the temperatures and the conformal thresholds are fitted on the validation rows, from logits that
   are computed once. No test row is used.
3. Validation scores are cross-validated: a calibration on four fifths of the rows scores the other fifth. With
   ``--load_best_model_at_end`` these rows also select the checkpoint, so their scores are optimistic
   (`benchmarks/studies/selection.py`).
4. Logits follow the order of the scored rows, which are sorted by length. The column ``row`` gives their place in the source.

With several labels a text, `evaluation.multi_label_report` has the functions from `calibrate_model` on.

In this file ``splits`` holds tokenized rows, and ``logits`` the leaf logits of each scored split: (num_rows, num_leaves).
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import AutoModel, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from configuration_hierarchical import HierarchicalConfig
from errors import refusing
from evaluation import plots
from evaluation.calibration import Calibration, conformal_scores, fit_calibration, fit_thresholds, held_out
from evaluation.lexical import LexicalClassifier, token_counts
from evaluation.metrics import any_label_accuracy, build_compute_metrics, per_class_report, predicted_probabilities
from evaluation.multi_label import build_multi_label_metrics
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing.card import PREFIXES
from taxonomy_hierarchical import Taxonomy
from training.arguments import ComputeMetrics, HierarchicalTrainingArguments
from training.trainer import HierarchicalTrainer
from training.views import build_collator

logger = logging.getLogger(__name__)

COVERAGE = 0.9  # of the measured answers
AS_SERVED: dict[str, Any] = {  # arguments of a Trainer that only scores
    **dict.fromkeys(("bf16", "fp16", "load_best_model_at_end", "push_to_hub"), False),
    "report_to": [],
    "eval_strategy": "no",
    "lr_scheduler_type": "linear",  # some need an evaluation
    "lr_scheduler_kwargs": None,
}


def served_trainer(
    folder: str,
    training: HierarchicalTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    loss_function: nn.Module | None = None,
) -> HierarchicalTrainer:
    """Build a Trainer that scores a checkpoint as a user loads it: by `AutoModel`, in full precision, without autocast."""
    with refusing(f"cannot load the checkpoint {folder}"):
        model: PreTrainedModel = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return HierarchicalTrainer(
        model=model,
        args=dataclasses.replace(training, **AS_SERVED),
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer),
        compute_metrics=build_metrics(model.config.tree, model.config.is_multi_label, model.config.node_thresholds),
        loss_function=loss_function,
    )


def build_metrics(taxonomy: Taxonomy, multi_label: bool, thresholds: list[float] | None = None) -> ComputeMetrics:
    """Build the Trainer's ``compute_metrics``.

    Args:
        thresholds: with several labels a text, of the nodes.
    """
    if multi_label:
        return build_multi_label_metrics(taxonomy, None if thresholds is None else np.array(thresholds))
    return build_compute_metrics(taxonomy)


def score_splits(
    trainer: HierarchicalTrainer, splits: DatasetDict, training: HierarchicalTrainingArguments
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Score the validation rows (metrics ``eval_…``) and test rows (``test_…``).

    Returns:
        The metrics; the logits; and the logits that a calibration is fitted to: those of the decisions with several labels a
        text, else the same.
    """
    config, metrics = trainer.model.config, dict[str, float]()
    ignored = [
        key for key in config.keys_to_ignore_at_inference if key != "decision_logits" or not config.is_multi_label
    ]
    logits, decisions = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for split, requested in (("validation", training.do_eval), ("test", training.do_predict)):
        if split in splits and requested is not False:
            output = trainer.predict(splits[split], ignored, metric_key_prefix=PREFIXES[split])
            metrics |= output.metrics
            if config.is_multi_label:
                logits[split], decisions[split] = output.predictions
            else:
                logits[split] = decisions[split] = output.predictions
                metrics |= any_label_scores(split, output.predictions, splits[split])
    return metrics, logits, decisions


def any_label_scores(split: str, logits: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Compute `any_label_accuracy` of one split, if it has rows labelled with a leaf."""
    accuracy = any_label_accuracy(logits, np.array(rows["labels"]), np.array(rows["text_id"]))
    return {} if accuracy is None else {f"{PREFIXES[split]}_any_label_accuracy": accuracy}


def calibrate_model(
    model: HierarchicalForSequenceClassification,
    classifier: LexicalClassifier | None,
    taxonomy: Taxonomy,
    logits: dict[str, np.ndarray],
    splits: DatasetDict,
    max_length: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fit the lexical head's weight, the temperatures and the conformal thresholds, and store them in the model.

    Returns:
        Metrics after calibration, and without the lexical head if there is one (``without_lexical_head_…``). For test rows,
        also size and coverage of answers for `COVERAGE` (``test_answer_…``). Then the calibrated logits.
    """
    labels = {split: np.array(splits[split]["labels"]) for split in logits}
    texts = {split: np.array(splits[split]["text_id"]) for split in logits}
    no_scores: dict[str, np.ndarray | None] = dict.fromkeys(logits)

    def calibrate(lexical: dict[str, np.ndarray | None]) -> tuple[Calibration, dict[str, np.ndarray]]:
        validation = (taxonomy, logits["validation"], lexical["validation"], labels["validation"])
        fitted = fit_calibration(*validation)
        calibrated = {split: fitted.apply(taxonomy, logits[split], lexical[split]) for split in logits}
        return fitted, calibrated | {"validation": held_out(*validation, texts["validation"])}

    # Fit on the validation rows.
    lexical_scores = no_scores
    if classifier is not None:
        vocab_size = classifier.weight.shape[1]
        lexical_scores = {split: classifier.scores(token_counts(splits[split], vocab_size)) for split in logits}
    fitted, calibrated = calibrate(lexical_scores)
    thresholds = fit_thresholds(taxonomy, calibrated["validation"], labels["validation"], texts["validation"])

    # Store the calibration in the model.
    weight = fitted.lexical_weight
    model.set_lexical_head(classifier.weights() if classifier is not None and weight else None, weight)
    model.set_calibration(
        temperatures=fitted.temperatures, conformal_thresholds=thresholds, conformal_max_length=max_length
    )
    shown = ", ".join(f"{temperature:.2f}" for temperature in fitted.temperatures)
    logger.info("calibrated on the validation rows: temperatures %s; weight of the lexical head %.2f", shown, weight)

    # Measure the calibrated model, with and without the lexical head, and the coverage.
    metrics = {"lexical_weight": weight, **measure(taxonomy, calibrated, splits)}
    if weight:
        measured = measure(taxonomy, calibrate(no_scores)[1], splits)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    if "test" in logits:
        scores = conformal_scores(taxonomy, calibrated["test"], labels["test"], texts["test"], thresholds, COVERAGE)
        metrics |= {f"test_answer_{name}": value for name, value in scores.items()}
    return metrics, calibrated


def measure(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, float]:
    """Compute each split's metrics from calibrated logits."""
    compute_metrics, metrics = build_compute_metrics(taxonomy), {}
    for split, scores in logits.items():
        measured = compute_metrics(EvalPrediction(scores, np.array(splits[split]["labels"])))
        metrics |= {f"{PREFIXES[split]}_{name}": value for name, value in measured.items()}
        metrics |= any_label_scores(split, scores, splits[split])
    return metrics


def shown_split(logits: dict[str, np.ndarray], splits: DatasetDict) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the name, the logits and the labels of the split whose details are shown."""
    split = "test" if "test" in logits else "validation"
    return split, logits[split], np.array(splits[split]["labels"])


def class_scores(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """Compute scores of each leaf and 95 % intervals for metrics.json, on the split of `shown_split`."""
    if not logits:
        return {}
    split, *scored = shown_split(logits, splits)
    rows, intervals = per_class_report(config.tree, *scored)
    prefixed = {f"{PREFIXES[split]}_{name}": ends for name, ends in intervals.items()}
    return {"per_class": rows, "intervals": prefixed} if rows else {}


def draw_plots(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """Draw the confusion matrices and the reliability diagram of the split of `shown_split`."""
    if logits:
        _, *scored = shown_split(logits, splits)
        for level, figure in plots.confusion_matrices(config.tree, *scored).items():
            plots.write(figure, folder / f"confusion_matrix_level_{level}.png")
        draw_reliability(logits, splits, folder / "reliability_diagram.png")


def draw_reliability(logits: dict[str, np.ndarray], splits: DatasetDict, file: Path) -> None:
    """Draw the reliability diagram of the split of `shown_split`."""
    _, *scored = shown_split(logits, splits)
    plots.write(plots.reliability_diagram(*scored), file)


def write_predictions(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path
) -> None:
    """Write ``<split>_predictions.csv``: each scored row's number in its source, label, prediction and probability."""
    taxonomy = config.tree
    for split, scores in logits.items():
        columns = {
            "row": splits[split]["row"],
            "label": [taxonomy.labels[node] for node in splits[split]["labels"]],
            "prediction": [taxonomy.labels[leaf] for leaf in scores.argmax(axis=1)],
            "probability": predicted_probabilities(scores),
        }
        table = pd.DataFrame(columns).sort_values("row", kind="stable")
        table.to_csv(folder / f"{split}_predictions.csv", index=False, float_format="%.6f")


def log_metrics(metrics: dict[str, float]) -> None:
    """Log a table of the metrics, with one column per scored split."""
    split_of = {prefix: split for split, prefix in PREFIXES.items() if f"{prefix}_log_loss" in metrics}
    table: dict[str, dict[str, float]] = {split: {} for split in split_of.values()}
    for key, value in metrics.items():
        prefix, _, name = key.partition("_")
        if prefix in split_of and not name.endswith(("_per_second", "_time", "runtime")):
            table[split_of[prefix]][name] = value
    logger.info("scores\n%s", pd.DataFrame(table).to_string(float_format="%.4f", na_rep=""))

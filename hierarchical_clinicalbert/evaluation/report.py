"""Score and calibrate a trained checkpoint, and write the files that show the result.

Worth knowing:

1. Scores are measured on the checkpoint as a user loads it, over a full-precision encoder, not on the quantized model in
   training.
2. The calibration and the thresholds are fitted on the validation rows, from logits that are computed once.
3. Validation scores are cross-validated: a calibration on four fifths of the rows scores the other fifth. With
   ``--load_best_model_at_end`` these rows also select the checkpoint, so their scores are optimistic
   (`benchmarks/selection.py`). In multi-label data, the thresholds are fitted on the scored rows, so F1 is
   optimistic too.
4. Logits follow the order of the scored rows, which are sorted by length. The column ``row`` gives their place in the source.

In this file ``splits`` holds tokenized rows. ``logits`` holds the logits (num_rows, num_classes) of each scored split, and
``scores`` the decision scores (num_rows, num_nodes).
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import AutoModel, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from configuration_hierarchical import HierarchicalConfig
from decisions_hierarchical import DEFAULT_THRESHOLD, threshold_index
from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.calibration import (
    calibrate_out_of_fold,
    calibrated_logits,
    fit_calibration,
    label_arrays,
)
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from hierarchical_clinicalbert.evaluation.lexical import LexicalClassifier, token_counts
from hierarchical_clinicalbert.evaluation.metrics import per_class_report
from hierarchical_clinicalbert.publishing.card import MEASURED_TARGET, PREFIXES
from hierarchical_clinicalbert.training.arguments import ComputeMetrics, HierarchicalTrainingArguments
from hierarchical_clinicalbert.training.tokens import build_collator
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import use_cpu_kernels

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
        data_collator=build_collator(tokenizer, model.heads.decisions.targets),
        compute_metrics=pipeline_metrics(model.config),
        loss_function=loss_function,
    )


def pipeline_metrics(config: HierarchicalConfig) -> ComputeMetrics:
    """Build the ``compute_metrics`` of the predictions that the pipeline makes: with the stored thresholds, or 0.5."""
    return form_of(config.tree, config.problem_type).metrics(config.calibration.thresholds or DEFAULT_THRESHOLD)


def score_splits(
    trainer: HierarchicalTrainer, splits: DatasetDict
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Score the validation rows (metrics ``eval_…``) and test rows (``test_…``). Return the metrics, logits and scores."""
    config, metrics = trainer.model.config, dict[str, float]()
    form, ignored = (
        form_of(config.tree, config.problem_type),
        [key for key in config.keys_to_ignore_at_inference if key != "decision_logits"],
    )
    logits, scores = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for split, requested in (("validation", trainer.args.do_eval), ("test", trainer.args.do_predict)):
        if split in splits and requested is not False:
            output = trainer.predict(splits[split], ignored, metric_key_prefix=PREFIXES[split])
            logits[split], scores[split] = output.predictions
            metrics |= output.metrics | scores_by_text(form, split, logits[split], splits[split])
    return metrics, logits, scores


def scores_by_text(form: Form, split: str, logits: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Compute the metrics of one split that need the ids of its texts."""
    scores = form.scores_by_text(logits, label_arrays(form.decisions, rows), np.array(rows["text_id"]))
    return {f"{PREFIXES[split]}_{name}": value for name, value in scores.items()}


def calibrate_model(
    model: HierarchicalForSequenceClassification,
    classifier: LexicalClassifier | None,
    scores: dict[str, np.ndarray],
    splits: DatasetDict,
    max_length: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fit the lexical head's weight, the calibration and the thresholds, and store them in the model.

    ``scores`` are those of `score_splits`, from a model without calibration.

    Returns:
        Metrics after calibration, and without the lexical head if there is one (``without_lexical_head_…``). For test rows,
        also of the prediction sets for `MEASURED_TARGET` (``test_answer_…``). Then the calibrated logits.
    """
    config, form = model.config, form_of(model.config.tree, model.config.problem_type)
    labels = {split: label_arrays(form.decisions, splits[split]) for split in scores}
    texts = np.array(splits["validation"]["text_id"])
    fit = partial(fit_calibration, form, log_prior=0.0 if classifier is None else classifier.log_prior)

    def calibrate(lexical: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
        validation = scores["validation"], lexical.get("validation"), labels["validation"]
        fitted = fit(*validation)
        calibrated = {
            split: calibrated_logits(form.decisions, fitted, scores[split], lexical.get(split)) for split in scores
        }
        calibrated["validation"] = calibrate_out_of_fold(fit, form.decisions, *validation, texts)
        thresholds = form.fit_thresholds(calibrated["validation"], labels["validation"])
        return dataclasses.replace(fitted, thresholds=thresholds), calibrated

    # ── Fit on the validation rows ───────────────────────────────────────────────────────────────────────────────────
    lexical_scores = {}
    if classifier is not None:
        vocab_size = config.text_config.vocab_size
        lexical_scores = {
            split: classifier.decision_scores(token_counts(splits[split], vocab_size)) for split in scores
        }
    calibration, calibrated = calibrate(lexical_scores)

    # ── Store in the model ───────────────────────────────────────────────────────────────────────────────────────────
    weight = calibration.lexical_weight or None
    sets = form.fit_sets(calibrated["validation"], labels["validation"], texts)
    calibration = dataclasses.replace(calibration, lexical_weight=weight, max_length=max_length, **sets)
    model.set_calibration(calibration, classifier.weights() if classifier is not None and weight else None)
    shown = f"scales of the scores from {min(calibration.scales):.2f} to {max(calibration.scales):.2f}"
    logger.info("calibrated on the validation rows: %s; weight of the lexical head %.2f", shown, weight or 0)

    # ── Measure, with and without the lexical head, and the prediction sets ──────────────────────────────────────────
    metrics = {"lexical_weight": weight or 0.0, **measure(form, calibrated, calibration.thresholds, splits)}
    if weight:
        without, logits = calibrate({})
        measured = measure(form, logits, without.thresholds, splits)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    return metrics | set_scores(config, calibrated, splits), calibrated


def set_scores(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, float]:
    """Measure the prediction sets for `MEASURED_TARGET` on the test rows, from calibrated logits: ``test_answer_…``."""
    thresholds, form = config.calibration.set_thresholds or [None] * 99, form_of(config.tree, config.problem_type)
    threshold = thresholds[threshold_index(MEASURED_TARGET)]  # None if there were too few validation rows for it
    if "test" not in logits or threshold is None:
        return {}
    labels, texts = label_arrays(form.decisions, splits["test"]), np.array(splits["test"]["text_id"])
    scores = form.set_scores(logits["test"], labels, texts, threshold)
    return {f"test_answer_{name}": value for name, value in scores.items()}


def measure(
    form: Form, logits: dict[str, np.ndarray], thresholds: list[float] | None, splits: DatasetDict
) -> dict[str, float]:
    """Compute each split's metrics from calibrated logits."""
    compute_metrics, metrics = form.metrics(thresholds), dict[str, float]()
    for split, scores in logits.items():
        measured = compute_metrics(EvalPrediction(scores, label_arrays(form.decisions, splits[split])))
        metrics |= {f"{PREFIXES[split]}_{name}": value for name, value in measured.items()}
        metrics |= scores_by_text(form, split, scores, splits[split])
    return metrics


def reported_split(
    form: Form, logits: dict[str, np.ndarray], splits: DatasetDict
) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the split that plots and class scores show, test before validation: its name, logits and labels."""
    split = "test" if "test" in logits else "validation"
    return split, logits[split], label_arrays(form.decisions, splits[split])


def class_scores(config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """Compute scores and 95 % intervals of the classes for metrics.json, on the split of `reported_split`."""
    if not logits:
        return {}
    form = form_of(config.tree, config.problem_type)
    split, scores, labels = reported_split(form, logits, splits)
    outcomes = form.class_outcomes(scores, labels, np.array(splits[split]["text_id"]), config.calibration.thresholds)
    rows, intervals = per_class_report([*config.id2label.values()], *outcomes)
    prefixed = {
        f"{PREFIXES[split]}_{name.replace('micro_f1', form.micro_f1)}": ends for name, ends in intervals.items()
    }
    return {"per_class": rows, "intervals": prefixed} if rows else {}


def draw_plots(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, per_class: list[dict], folder: Path
) -> None:
    """Draw the figures of the split of `reported_split`, the reliability diagram among them."""
    if not logits:
        return
    form = form_of(config.tree, config.problem_type)
    _, scores, labels = reported_split(form, logits, splits)
    figures = form.plots(scores, labels, per_class) | {"reliability_diagram": form.reliability_diagram(scores, labels)}
    for name, figure in figures.items():
        plots.write(figure, folder / f"{name}.png")


def write_predictions(
    config: HierarchicalConfig, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path
) -> None:
    """Write ``<split>_predictions.csv``: each scored row's number in its source, labels, predictions and probabilities."""
    form = form_of(config.tree, config.problem_type)
    for split, scores in logits.items():
        labels = label_arrays(form.decisions, splits[split])
        columns = form.prediction_columns(scores, labels, config.calibration.thresholds)
        table = pd.DataFrame({"row": splits[split]["row"], **columns}).sort_values("row", kind="stable")
        table.to_csv(folder / f"{split}_predictions.csv", index=False, float_format="%.6f")


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

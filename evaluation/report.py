"""Score and calibrate a trained checkpoint, and write the files that show the result.

Worth knowing:

1. Scores are of the checkpoint as a user loads it, over a full-precision encoder, not of the quantized model in training.
2. The lexical head's weight, the temperatures and the conformal thresholds are fitted on the validation rows, from logits that
   are computed once. No test row is used.
3. Validation scores are cross-validated: a calibration on four fifths of the rows scores the other fifth. With
   ``--load_best_model_at_end`` these rows also select the checkpoint, so their scores are optimistic
   (`benchmarks/studies/selection.py`).
4. Logits follow the order of the scored rows, which are sorted by length. The column ``row`` gives their place in the source.
"""

import csv
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModel, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from errors import refusing
from evaluation import lexical, plots
from evaluation.calibration import Calibration, conformal_scores, fit_calibration, fit_thresholds, held_out
from evaluation.metrics import any_label_accuracy, build_compute_metrics, per_class_report
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing import card
from taxonomy_hierarchical import Taxonomy
from training.arguments import HierarchicalTrainingArguments, ModelArguments
from training.losses import HierarchicalFocalLoss
from training.splits import LabelledSplits
from training.trainer import HierarchicalTrainer
from training.views import build_collator

logger = logging.getLogger(__name__)

NOTABLE_GAP = 0.005
COVERAGE = 0.9  # of the measured answers
AS_SERVED: dict[str, Any] = {  # arguments of a Trainer that only scores
    **dict.fromkeys(("bf16", "fp16", "load_best_model_at_end", "push_to_hub"), False),
    "report_to": [],
    "eval_strategy": "no",
    "lr_scheduler_type": "linear",  # some need an evaluation
    "lr_scheduler_kwargs": None,
}


def served_trainer(
    training: HierarchicalTrainingArguments,
    taxonomy: Taxonomy,
    tokenizer: PreTrainedTokenizerBase,
    loss_function: HierarchicalFocalLoss | None,
    folder: str | None = None,
) -> HierarchicalTrainer:
    """Build a Trainer that scores the checkpoint as a user loads it: by `AutoModel`, in full precision, without autocast."""
    folder = folder or training.output_dir
    with refusing(f"cannot load the checkpoint {folder}"):
        model: PreTrainedModel = AutoModel.from_pretrained(folder, trust_remote_code=True)
    plain = dataclasses.replace(training, **AS_SERVED)
    return HierarchicalTrainer(
        model=model,
        args=plain,
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer),
        compute_metrics=build_compute_metrics(taxonomy),
        loss_function=loss_function,
    )


def score_splits(
    trainer: HierarchicalTrainer, splits: DatasetDict, training: HierarchicalTrainingArguments
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Score the validation rows (metrics ``eval_…``) and test rows (``test_…``); also return the leaf logits of each split."""
    metrics: dict[str, float] = {}
    logits: dict[str, np.ndarray] = {}
    for split, requested in (("validation", training.do_eval), ("test", training.do_predict)):
        if split in splits and requested is not False:
            output = trainer.predict(splits[split], metric_key_prefix=card.PREFIXES[split])
            metrics |= output.metrics
            logits[split] = output.predictions
            labels, texts = (np.array(splits[split][column]) for column in ("labels", "text_id"))
            if (any_label := any_label_accuracy(output.predictions, labels, texts)) is not None:
                metrics[f"{card.PREFIXES[split]}_any_label_accuracy"] = any_label
    return metrics, logits


def lexical_classifier(
    arguments: ModelArguments, taxonomy: Taxonomy, train: Dataset, vocab_size: int
) -> lexical.LexicalClassifier | None:
    """Fit the classifier of a lexical head; return None if it is not wanted or cannot be fitted."""
    wanted = arguments.lexical_head
    if wanted is None:
        wanted = vocab_size * taxonomy.num_leaves <= lexical.MAX_WEIGHTS
        if not wanted:
            size = f"{vocab_size:,} tokens times {taxonomy.num_leaves:,} leaves"
            logger.info("no lexical head: it would have %s weights; --lexical_head true", size)
    return lexical.fit_classifier(taxonomy, train, vocab_size) if wanted else None


def calibrate_model(
    model: HierarchicalForSequenceClassification,
    classifier: lexical.LexicalClassifier | None,
    taxonomy: Taxonomy,
    logits: dict[str, np.ndarray],
    splits: DatasetDict,
    max_length: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fit the lexical head's weight, the temperatures and the conformal thresholds, and store them in the model.

    Args:
        logits: of each scored split, from the uncalibrated model.
        max_length: the number of tokens at which the texts were truncated.

    Returns:
        Metrics of each split after calibration. With a lexical head, also the metrics without it
        (``without_lexical_head_…``). For test rows, also size and coverage of answers for `COVERAGE` (``test_answer_…``).
        Then the calibrated logits of each split.
    """
    labels = {split: np.array(splits[split]["labels"]) for split in logits}
    texts = {split: np.array(splits[split]["text_id"]) for split in logits}
    lexical_scores: dict[str, np.ndarray | None] = dict.fromkeys(logits)
    if classifier is not None:
        counts = {split: lexical.token_counts(splits[split], len(classifier.idf)) for split in logits}
        lexical_scores = {split: classifier.scores(counts[split]) for split in logits}

    # Fit on the validation rows.
    fitted, calibrated = calibrate_logits(taxonomy, logits, lexical_scores, labels, texts)
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
    metrics = {"lexical_weight": weight, **measure(taxonomy, calibrated, labels, texts)}
    if weight:
        _, without = calibrate_logits(taxonomy, logits, dict.fromkeys(logits), labels, texts)
        measured = measure(taxonomy, without, labels, texts)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    if "test" in logits and thresholds is not None:
        scores = conformal_scores(taxonomy, calibrated["test"], labels["test"], texts["test"], thresholds, COVERAGE)
        metrics |= {f"test_answer_{name}": value for name, value in scores.items()}
    return metrics, calibrated


def calibrate_logits(
    taxonomy: Taxonomy,
    logits: dict[str, np.ndarray],
    lexical_scores: dict[str, np.ndarray | None],
    labels: dict[str, np.ndarray],
    texts: dict[str, np.ndarray],
) -> tuple[Calibration, dict[str, np.ndarray]]:
    """Fit a calibration on the validation rows, and apply it to the logits of each split.

    The logits of the validation rows are cross-validated, see `calibration.held_out`.
    """
    validation = (taxonomy, logits["validation"], lexical_scores["validation"], labels["validation"])
    fitted = fit_calibration(*validation)
    calibrated = {split: fitted.apply(taxonomy, logits[split], lexical_scores[split]) for split in logits}
    calibrated["validation"] = held_out(*validation, texts["validation"])
    return fitted, calibrated


def measure(
    taxonomy: Taxonomy, logits: dict[str, np.ndarray], labels: dict[str, np.ndarray], texts: dict[str, np.ndarray]
) -> dict[str, float]:
    """Compute each split's metrics from calibrated logits."""
    compute_metrics, metrics = build_compute_metrics(taxonomy), {}
    for split, scores in logits.items():
        measured = compute_metrics(EvalPrediction(predictions=scores, label_ids=labels[split]))
        if (any_label := any_label_accuracy(scores, labels[split], texts[split])) is not None:
            measured["any_label_accuracy"] = any_label
        metrics |= {f"{card.PREFIXES[split]}_{name}": value for name, value in measured.items()}
    return metrics


def shown_split(logits: dict[str, np.ndarray]) -> str | None:
    """Return the split whose details are shown: test, else validation, else None."""
    return next((name for name in ("test", "validation") if name in logits), None)


def leaf_scores(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """Compute scores of each leaf and 95 % intervals for metrics.json, on the split of `shown_split`."""
    split = shown_split(logits)
    if split is None:
        return {}
    labels = np.array(splits[split]["labels"])
    rows, intervals = per_class_report(taxonomy, logits[split], labels)
    if not rows:
        return {}
    return {
        "per_class": rows,
        "intervals": {f"{card.PREFIXES[split]}_{name}": ends for name, ends in intervals.items()},
    }


def draw_plots(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """Draw the confusion matrices and the reliability diagram of the split of `shown_split`."""
    split = shown_split(logits)
    if split is not None:
        labels = np.array(splits[split]["labels"])
        for level, figure in plots.confusion_matrices(taxonomy, logits[split], labels).items():
            plots.write(figure, folder / f"confusion_matrix_level_{level}.png")
        draw_reliability(logits, splits, folder / "reliability_diagram.png")


def draw_reliability(logits: dict[str, np.ndarray], splits: DatasetDict, file: Path) -> None:
    """Draw the reliability diagram of the split of `shown_split`."""
    split = shown_split(logits) or "validation"
    plots.write(plots.reliability_diagram(logits[split], np.array(splits[split]["labels"])), file)


def write_predictions(data: LabelledSplits, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """Write ``<split>_predictions.csv``: each scored row's number in its source, label, prediction and probability."""
    names = data.taxonomy.labels
    for split, scores in logits.items():
        rows = np.array(splits[split]["row"])
        predictions, probabilities = scores.argmax(1), np.exp(scores.max(1) - np.logaddexp.reduce(scores, axis=1))
        with (folder / f"{split}_predictions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "label", "prediction", "probability"])
            for i in np.argsort(rows, kind="stable"):
                label, prediction = names[splits[split]["labels"][i]], names[predictions[i]]
                writer.writerow([rows[i], label, prediction, f"{probabilities[i]:.6f}"])


def warn_of_quantization_gap(metrics: dict) -> None:
    """Warn if the scores of the served model differ from the scores of the quantized model in training."""
    for name in ("eval_accuracy", "eval_macro_f1", "test_accuracy", "test_macro_f1"):
        trained, served = metrics.get(f"quantized_{name}"), metrics.get(name)
        if trained is not None and served is not None and abs(trained - served) > NOTABLE_GAP:
            logger.warning("%s: %.4f as trained (quantized), %.4f as served", name, trained, served)


def log_metrics(metrics: dict[str, float]) -> None:
    """Log one line per metric, with one column per split."""
    splits = {prefix: split for split, prefix in card.PREFIXES.items() if f"{prefix}_log_loss" in metrics}
    names = dict.fromkeys(name for prefix, _, name in (key.partition("_") for key in metrics) if prefix in splits)
    line = "%-24s" + " %10s" * len(splits)
    logger.info(line, "", *splits.values())
    for name in names:
        if not name.endswith(("_per_second", "_time", "runtime")):
            values = [metrics.get(f"{prefix}_{name}") for prefix in splits]
            logger.info(line, name, *("" if value is None else f"{value:.4f}" for value in values))

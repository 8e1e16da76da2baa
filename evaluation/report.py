"""What a run measures once it is trained: scores, calibration, and the files that show them.

Worth knowing:

1. Scored is the checkpoint as a user loads it, over a full-precision encoder, not the quantized model that was trained.
2. The lexical head, the temperatures and the thresholds of answers are fitted on the validation rows, from logits that were
   computed once: the test rows take no part, and nothing is computed again. The validation rows themselves are measured
   by cross-validation, each fifth by what the other four say, or their scores would flatter the fit. With
   ``--load_best_model_at_end`` these rows also chose the checkpoint, which still flatters them (`benchmarks/studies/selection.py`).
3. Predictions are in the order of the scored rows, which are sorted by length; their column ``row`` leads back.
"""

import csv
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModel,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from errors import refusing
from evaluation import calibration, lexical, plots
from evaluation.calibration import conformal_scores, fit_thresholds
from evaluation.metrics import any_label_accuracy, build_compute_metrics, per_class_report
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing import card
from taxonomy_hierarchical import Taxonomy
from training.arguments import HierarchicalTrainingArguments, ModelArguments
from training.data import LabelledSplits
from training.losses import HierarchicalFocalLoss
from training.trainer import HierarchicalTrainer
from training.views import CollatorWithSentences

logger = logging.getLogger(__name__)

NOTABLE_GAP = 0.005
COVERAGE = 0.9  # of the answers that are measured
AS_SERVED: dict[str, Any] = {  # what a Trainer must not do that only scores
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
    """A Trainer over the checkpoint as a user loads it: by `AutoModel`, over a full-precision encoder, no autocast."""
    folder = folder or training.output_dir
    with refusing(f"cannot load the checkpoint {folder}"):
        model: PreTrainedModel = AutoModel.from_pretrained(folder, trust_remote_code=True)
    plain = dataclasses.replace(training, **AS_SERVED)
    return HierarchicalTrainer(
        model=model,
        args=plain,
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
        compute_metrics=build_compute_metrics(taxonomy),
        loss_function=loss_function,
    )


def evaluate(
    trainer: HierarchicalTrainer, splits: DatasetDict, training: HierarchicalTrainingArguments
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of the validation rows (``eval_``) and the test rows (``test_``), and the leaf logits of each split."""
    metrics: dict[str, float] = {}
    logits: dict[str, np.ndarray] = {}
    for split, asked in (("validation", training.do_eval), ("test", training.do_predict)):
        if split in splits and asked is not False:
            output = trainer.predict(splits[split], metric_key_prefix=card.PREFIXES[split])
            metrics |= output.metrics
            logits[split] = output.predictions
            labels, texts = (np.array(splits[split][column]) for column in ("labels", "text_id"))
            if (found := any_label_accuracy(output.predictions, labels, texts)) is not None:
                metrics[f"{card.PREFIXES[split]}_any_label_accuracy"] = found
    return metrics, logits


def lexical_classifier(
    arguments: ModelArguments, taxonomy: Taxonomy, train: Dataset, vocab_size: int
) -> lexical.LexicalClassifier | None:
    """The classifier of a lexical head, where one is wanted and can be fitted."""
    wanted = arguments.lexical_head
    if wanted is None:
        wanted = vocab_size * taxonomy.num_leaves <= lexical.MOST_WEIGHTS
        if not wanted:
            size = f"{vocab_size:,} tokens times {taxonomy.num_leaves:,} leaves"
            logger.info("no lexical head: it would have %s weights; --lexical_head true", size)
    return lexical.fit(taxonomy, train, vocab_size) if wanted else None


def calibrate(
    model: HierarchicalForSequenceClassification,
    classifier: lexical.LexicalClassifier | None,
    taxonomy: Taxonomy,
    logits: dict[str, np.ndarray],
    splits: DatasetDict,
    max_length: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fits the lexical head's weight, temperatures and conformal thresholds on the validation rows, and puts all
    of it into the model.

    Args:
        logits: of each scored split, by the model without it.
        max_length: the number of tokens that the texts of the splits were truncated at.

    Returns:
        The metrics of each split after it, the same of the encoder with temperatures of its own and no lexical head
        (``without_lexical_head_``), how answers for `COVERAGE` fare on the test rows, and the logits after it; those of
        the validation rows by `calibration.held_out`.
    """
    labels = {split: np.array(splits[split]["labels"]) for split in logits}
    texts = {split: np.array(splits[split]["text_id"]) for split in logits}
    scores: dict[str, np.ndarray | None] = dict.fromkeys(logits)
    if classifier is not None:
        vocab_size = len(classifier.idf)
        scores = {split: classifier.scores(lexical.token_counts(splits[split], vocab_size)) for split in logits}
    known = (taxonomy, logits["validation"], scores["validation"], labels["validation"])
    fitted = calibration.fit(*known)
    held_out = calibration.held_out(*known, texts["validation"])
    thresholds = fit_thresholds(taxonomy, held_out, labels["validation"], texts["validation"])
    weight = fitted.lexical_weight
    model.set_lexical_head(classifier.weights() if classifier is not None and weight else None, weight)
    model.calibrate(fitted.temperatures, thresholds, max_length)
    shown = ", ".join(f"{temperature:.2f}" for temperature in fitted.temperatures)
    logger.info("calibrated on the validation rows: temperatures %s; weight of the lexical head %.2f", shown, weight)
    encoder = logits
    logits = {split: fitted.apply(taxonomy, found, scores[split]) for split, found in encoder.items()}
    logits["validation"] = held_out
    metrics = {"lexical_weight": weight, **measure(taxonomy, logits, labels, texts)}
    if weight:  # what is lost without it
        known = (taxonomy, encoder["validation"], None, labels["validation"])
        alone = calibration.fit(*known)
        without = {split: alone.apply(taxonomy, found, None) for split, found in encoder.items()}
        without["validation"] = calibration.held_out(*known, texts["validation"])
        measured = measure(taxonomy, without, labels, texts)
        metrics |= {f"without_lexical_head_{name}": value for name, value in measured.items()}
    if "test" in logits and thresholds is not None:
        found = conformal_scores(taxonomy, logits["test"], labels["test"], texts["test"], thresholds, COVERAGE)
        metrics |= {f"test_answer_{name}": value for name, value in found.items()}
    return metrics, logits


def measure(
    taxonomy: Taxonomy, logits: dict[str, np.ndarray], labels: dict[str, np.ndarray], texts: dict[str, np.ndarray]
) -> dict[str, float]:
    """The metrics of calibrated logits, of each split."""
    compute_metrics, metrics = build_compute_metrics(taxonomy), {}
    for split, found in logits.items():
        measured = compute_metrics(EvalPrediction(predictions=found, label_ids=labels[split]))
        if (any_label := any_label_accuracy(found, labels[split], texts[split])) is not None:
            measured["any_label_accuracy"] = any_label
        metrics |= {f"{card.PREFIXES[split]}_{name}": value for name, value in measured.items()}
    return metrics


def per_class(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """For metrics.json: how each leaf fares, and 95 % intervals, of the test rows, or else of the validation rows."""
    split = next((name for name in ("test", "validation") if name in logits), None)
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


def draw(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """Draw confusion matrices and reliability of the test rows, or of the validation rows where there are none."""
    split = next((name for name in ("test", "validation") if name in logits), None)
    if split is not None:
        for level, figure in plots.confusion_matrices(
            taxonomy, logits[split], np.array(splits[split]["labels"])
        ).items():
            plots.write(figure, folder / f"confusion_matrix_level_{level}.png")
        draw_reliability(logits, splits, folder / "reliability_diagram.png")


def draw_reliability(logits: dict[str, np.ndarray], splits: DatasetDict, file: Path) -> None:
    split = "test" if "test" in logits else "validation"
    plots.write(plots.reliability_diagram(logits[split], np.array(splits[split]["labels"])), file)


def write_predictions(data: LabelledSplits, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """``<split>_predictions.csv``: a line a scored row, with its number in its source, its label, and the answer."""
    names = data.taxonomy.labels
    for split, scores in logits.items():
        rows = np.array(splits[split]["row"])
        answers, probabilities = scores.argmax(1), np.exp(scores.max(1) - np.logaddexp.reduce(scores, axis=1))
        with (folder / f"{split}_predictions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "label", "prediction", "probability"])
            for i in np.argsort(rows, kind="stable"):
                writer.writerow(
                    [rows[i], names[splits[split]["labels"][i]], names[answers[i]], f"{probabilities[i]:.6f}"]
                )


def say_gap(metrics: dict) -> None:
    """Warns where the model that is served scores otherwise than the quantized one that was trained."""
    for name in ("eval_accuracy", "eval_macro_f1", "test_accuracy", "test_macro_f1"):
        trained, served = metrics.get(f"quantized_{name}"), metrics.get(name)
        if trained is not None and served is not None and abs(trained - served) > NOTABLE_GAP:
            logger.warning("%s: %.4f as trained (quantized), %.4f as served", name, trained, served)


def collator(tokenizer: PreTrainedTokenizerBase) -> CollatorWithSentences:
    step = math.gcd(8, tokenizer.model_max_length)  # which never leads beyond the limit
    return CollatorWithSentences(tokenizer, pad_to_multiple_of=step)


def log_metrics(metrics: dict[str, float]) -> None:
    """One line a metric, one column a split."""
    splits = [prefix for prefix in ("eval", "test") if f"{prefix}_log_loss" in metrics]
    found = [name.partition("_") for name in metrics]
    names = dict.fromkeys(name for prefix, _, name in found if prefix in splits)
    logger.info(
        "%-24s" + " %10s" * len(splits), "", *("validation" if prefix == "eval" else "test" for prefix in splits)
    )
    for name in names:
        if not name.endswith(("_per_second", "_time", "runtime")):
            values = [metrics.get(f"{prefix}_{name}") for prefix in splits]
            shown = ["" if value is None else f"{value:.4f}" for value in values]
            logger.info("%-24s" + " %10s" * len(splits), name, *shown)

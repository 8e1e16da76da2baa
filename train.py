"""Trains a hierarchical classifier: ``python train.py [recipe.yaml] [--flag value …]``.

Arguments → data → model → `HierarchicalTrainer` → the checkpoint, loaded back as a user loads it → lexical head and
calibration on the validation rows → metrics and plots.
"""

import csv
import dataclasses
import gc
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before it is imported: it asks for kernels from the Hub, whose code is not pinned, and warns of each 8-bit layer's cast
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
import transformers
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from configuration_hierarchical import HierarchicalConfig, Taxonomy, TaxonomyError
from modeling_hierarchical import HierarchicalForSequenceClassification
from training import InputError, asked_traceback, calibration, card, leave, lexical, one_line, plots, refusing
from training.arguments import (
    DataArguments,
    HierarchicalTrainingArguments,
    LossArguments,
    ModelArguments,
    parse,
)
from training.calibration import conformal_scores, fit_thresholds
from training.data import LabelledSplits, load_splits, tokenize
from training.data_report import log_report
from training.files import check_writable
from training.hub import HUB_ERRORS, find_target, log_in, reason, refuse_local_encoder
from training.losses import HierarchicalFocalLoss, node_counts
from training.metrics import any_label_accuracy, bootstrap_intervals, build_compute_metrics, per_class_report
from training.model import build_model, is_checkpoint, load_tokenizer, read_config, size_report
from training.resume import find_checkpoint, is_full_disk
from training.trainer import HierarchicalTrainer

logger = logging.getLogger("train")

NOTABLE_GAP = 0.005
COVERAGE = 0.9  # of the answers that are measured
AS_SERVED: dict[str, Any] = {  # what a Trainer must not do that only scores
    **dict.fromkeys(("bf16", "fp16", "load_best_model_at_end", "push_to_hub"), False),
    "report_to": [],
    "eval_strategy": "no",
}


def main(argv: list[str]) -> None:
    model_arguments, data_arguments, loss_arguments, training = parse(argv)
    set_up_logging(training)
    set_seed(training.seed)
    if (training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and training.device.type == "cpu":
        raise InputError("FSDP needs GPUs; for processes on CPUs use recipes/accelerate/ddp.yaml")
    checkpoint = is_checkpoint(model_arguments.model_name_or_path)
    known = read_config(model_arguments.model_name_or_path).tree if checkpoint else None
    if training.do_train is None:
        training.do_train = not (training.do_eval or training.do_predict)
    check_output_folder(training)
    with training.main_process_first(desc="reading the data"):
        data = load_splits(data_arguments, training.seed, known if data_arguments.taxonomy is None else None)
    if training.do_train:
        run_training(model_arguments, data_arguments, loss_arguments, training, data)
    else:
        if not checkpoint:
            raise InputError(
                f"--do_train false needs a trained checkpoint, which {model_arguments.model_name_or_path} is not"
            )
        if data.taxonomy != known:
            raise InputError("--taxonomy is another one than the checkpoint's; leave it out to score a checkpoint")
        score_checkpoint(model_arguments, data_arguments, training, data)


def run_training(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    loss_arguments: LossArguments,
    training: HierarchicalTrainingArguments,
    data: LabelledSplits,
) -> None:
    if "train" not in data.splits:
        raise InputError("no training rows: give --train_file, --data_path or --dataset_name, or --do_train false")
    if "validation" not in data.splits:
        logger.info("no validation rows: no early stopping, and the last weights are kept")
        training.eval_strategy, training.load_best_model_at_end = "no", False
    compute_metrics = build_compute_metrics(data.taxonomy)
    check_best_metric(training, data.taxonomy, compute_metrics)
    output = Path(training.output_dir)
    resume_from = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    model = build_model(model_arguments, data.taxonomy, training.seed)
    if training.push_to_hub:
        check_hub(training, model)
    tokenizer = load_tokenizer(model_arguments, model)
    max_length = length_limit(data_arguments.max_length, tokenizer)
    tokenizer.model_max_length = max_length  # whoever loads it cuts texts where they were cut here
    splits, data.report["lengths"] = tokenized(data, tokenizer, max_length)
    if training.should_save:
        make_folder(output)
        write_json(output / "data_report.json", data.report)
    log_report(data.report)

    counts = node_counts(data.taxonomy, torch.tensor(splits["train"]["labels"]))
    loss_function = HierarchicalFocalLoss(
        data.taxonomy,
        counts,
        gamma=loss_arguments.focal_gamma,
        class_weighting=loss_arguments.class_weighting,
        level_weights=loss_arguments.level_weights,
        label_smoothing=training.label_smoothing_factor,
        logit_adjustment=loss_arguments.logit_adjustment,
    )
    settings = {
        **dataclasses.asdict(model_arguments),
        **dataclasses.asdict(loss_arguments),
        **{name: getattr(training, name) for name in card.TRAINING_SETTINGS},
        "max_length": max_length,
        "train_precision": precision(training),
    }
    metrics: dict = {}  # until the end of the run, when the card is written again

    def write_card(folder: Path) -> None:
        card.write(
            folder,
            HierarchicalConfig.from_pretrained(folder),
            settings,
            data.report,
            metrics,
            model_id=trainer.hub_model_id,
            environment=card.environment(training.device),
        )

    patience = training.early_stopping_patience if training.load_best_model_at_end else None
    with refusing("cannot set up training"):
        trainer = HierarchicalTrainer(
            model=model,
            args=training,
            train_dataset=splits["train"],
            eval_dataset=splits.get("validation"),
            processing_class=tokenizer,
            data_collator=collator(tokenizer),
            compute_metrics=compute_metrics,
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
            loss_function=loss_function,
            heads_learning_rate=training.heads_learning_rate,
            write_card=write_card,
        )
    size = size_report(model)
    log_setup(model_arguments, training, size)
    trained = trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(_internal_call=True)  # else it is pushed here, before it is measured
    metrics |= {
        **trained.metrics,
        "train_precision": precision(training),
        "train_quantization": model_arguments.quantization,
        **size,
        "environment": {
            **card.environment(training.device),
            "commit": source_commit(),
            "data": {
                source["split"]: source["sha256"] for source in data.report["sources"]
            },  # no paths: it is published
        },
    }
    if model_arguments.quantization != "none":
        as_trained, _ = evaluate(trainer, splits, training)
        metrics |= {f"quantized_{name}": value for name, value in as_trained.items()}
    served = served_trainer(training, data.taxonomy, tokenizer, loss_function)
    measured, logits = evaluate(served, splits, training)
    say_gap(metrics | measured)
    uncalibrated = logits
    if "validation" in logits:
        vocab_size = model.config.text_config.vocab_size
        classifier = lexical_classifier(model_arguments, data.taxonomy, splits["train"], vocab_size)
        calibrated, logits = calibrate(model, classifier, data.taxonomy, logits, splits)
        trainer.save_model(_internal_call=True)
        measured |= {f"uncalibrated_{name}": measured[name] for name in measured if name in calibrated} | calibrated
    else:
        logger.info("no validation rows were scored: no lexical head, and the model's probabilities are not calibrated")
    metrics |= {**measured, **per_class(data.taxonomy, logits, splits)}
    if training.should_save:
        write_json(output / "metrics.json", metrics)
        plots.training_curves(trainer.state.log_history, output / "plots")
        draw(data.taxonomy, logits, splits, output / "plots")
        if logits is not uncalibrated:
            draw_reliability(uncalibrated, splits, output / "plots", "reliability_diagram_uncalibrated")
        write_predictions(data, logits, splits, output)
        write_card(output)
        logger.info("checkpoint, metrics and plots are in %s", output)
    log_metrics(measured)
    if training.push_to_hub:
        push(trainer)


def check_best_metric(
    training: HierarchicalTrainingArguments,
    taxonomy: Taxonomy,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> None:
    """Raises InputError where evaluation will not measure ``--metric_for_best_model``."""
    deepest = max(range(taxonomy.num_leaves), key=taxonomy.levels.__getitem__)  # a document that reaches every level
    measured = compute_metrics(EvalPrediction(np.zeros((1, taxonomy.num_leaves)), np.array([deepest])))
    asked, known = training.metric_for_best_model, ["loss", *measured]
    if training.load_best_model_at_end and asked.removeprefix("eval_") not in known:
        raise InputError(f"--metric_for_best_model {asked} is not measured; it is one of {', '.join(known)}")


def check_hub(training: HierarchicalTrainingArguments, model: HierarchicalForSequenceClassification) -> None:
    """Refuses, before training, what could not be published after it."""
    if model.has_adapter:
        refuse_local_encoder(model.config, "train without --push_to_hub, then run push_to_hub.py --merge")
    api = HfApi(token=training.hub_token)
    find_target(
        api,
        log_in(api),
        "--hub_model_id",
        training.hub_model_id or Path(training.output_dir).resolve().name,
        revision=training.hub_revision,
        private=bool(training.hub_private_repo),
    )


def push(trainer: HierarchicalTrainer) -> None:
    """The finished run to the Hub, as ``--push_to_hub`` asks."""
    try:
        trainer.push_to_hub()
    except HUB_ERRORS as error:
        output, target = trainer.args.output_dir, trainer.hub_model_id
        raise InputError(
            f"{output} is complete, but not on the Hub: {reason(error)}; run "
            f"push_to_hub.py --model {output} --repo_id {target}"
        ) from error
    if trainer.is_world_process_zero():
        logger.info("published as %s", trainer.hub_model_id)


def score_checkpoint(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training: HierarchicalTrainingArguments,
    data: LabelledSplits,
) -> None:
    """Measures a finished checkpoint, as a user loads it, on labelled files."""
    if not set(data.splits) & {"validation", "test"}:
        raise InputError("nothing to score: give --validation_file or --test_file")
    if "test" in data.report["split"]["carved"]:
        raise InputError("only a part of --data_path would be scored: give the whole file as --test_file")
    with refusing(f"cannot load the tokenizer of {model_arguments.model_name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path, trust_remote_code=True)
    max_length = length_limit(data_arguments.max_length, tokenizer)
    splits, data.report["lengths"] = tokenized(data, tokenizer, max_length)
    log_report(data.report)
    trainer = served_trainer(training, data.taxonomy, tokenizer, None, model_arguments.model_name_or_path)
    metrics, logits = evaluate(trainer, splits, training)
    if training.should_save:
        output = Path(training.output_dir)
        make_folder(output)
        write_json(output / "metrics.json", {**metrics, **per_class(data.taxonomy, logits, splits)})
        write_json(output / "data_report.json", data.report)
        draw(data.taxonomy, logits, splits, output / "plots")
        write_predictions(data, logits, splits, output)
        logger.info("metrics and plots are in %s", output)
    log_metrics(metrics)


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
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fits the lexical head's weight, temperatures and conformal thresholds on the validation rows, and puts all
    of it into the model.

    Args:
        logits: of each scored split, by the model without it.

    Returns:
        The metrics of each split after it, how answers for `COVERAGE` fare on the test rows, and the logits after it.
    """
    labels = {split: np.array(splits[split]["labels"]) for split in logits}
    texts = {split: np.array(splits[split]["text_id"]) for split in logits}
    scores: dict[str, np.ndarray | None] = dict.fromkeys(logits)
    if classifier is not None:
        vocab_size = len(classifier.idf)
        scores = {split: classifier.scores(lexical.token_counts(splits[split], vocab_size)) for split in logits}
    known = (taxonomy, logits["validation"], scores["validation"], labels["validation"])
    fitted = calibration.fit(*known)
    thresholds = fit_thresholds(taxonomy, calibration.held_out(*known, texts["validation"]), labels["validation"])
    weight = fitted.lexical_weight
    model.set_lexical_head(classifier.weights(weight) if classifier is not None and weight else None)
    model.calibrate(fitted.temperatures, thresholds)
    shown = ", ".join(f"{temperature:.2f}" for temperature in fitted.temperatures)
    logger.info("calibrated on the validation rows: temperatures %s; weight of the lexical head %.2f", shown, weight)
    logits = {split: fitted.apply(taxonomy, found, scores[split]) for split, found in logits.items()}
    compute_metrics, metrics = build_compute_metrics(taxonomy), {"lexical_weight": weight}
    for split, found in logits.items():
        measured = compute_metrics(EvalPrediction(predictions=found, label_ids=labels[split]))
        if (any_label := any_label_accuracy(found, labels[split], texts[split])) is not None:
            measured["any_label_accuracy"] = any_label
        metrics |= {f"{card.PREFIXES[split]}_{name}": value for name, value in measured.items()}
    if "test" in logits and thresholds is not None:
        found = conformal_scores(taxonomy, logits["test"], labels["test"], thresholds, COVERAGE)
        metrics |= {f"test_answer_{name}": value for name, value in found.items()}
    return metrics, logits


def per_class(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict) -> dict[str, Any]:
    """For metrics.json: how each leaf fares, and 95 % intervals, of the test rows, or else of the validation rows."""
    split = next((name for name in ("test", "validation") if name in logits), None)
    if split is None:
        return {}
    labels = np.array(splits[split]["labels"])
    is_leaf = (labels >= 0) & (labels < taxonomy.num_leaves)
    if not is_leaf.any():
        return {}
    ends = bootstrap_intervals(labels[is_leaf], logits[split][is_leaf].argmax(1), taxonomy.num_leaves)
    return {
        "per_class": per_class_report(taxonomy, logits[split], labels),
        "intervals": {f"{card.PREFIXES[split]}_{name}": ends[name].tolist() for name in ("accuracy", "macro_f1")},
    }


def tokenized(data: LabelledSplits, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[DatasetDict, dict]:
    """The splits as tokens, those to be scored sorted by length, so that batches need little padding."""
    splits, lengths = tokenize(data.splits, tokenizer, max_length)
    for name in splits.keys() - {"train"}:
        splits[name] = splits[name].select(np.argsort(splits[name]["length"], kind="stable"))
    return splits, lengths


def draw(taxonomy: Taxonomy, logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path) -> None:
    """Confusion matrices and reliability of the test rows, or of the validation rows where there are none."""
    split = next((name for name in ("test", "validation") if name in logits), None)
    if split is not None:
        plots.confusion_matrices(taxonomy, logits[split], np.array(splits[split]["labels"]), folder)
        draw_reliability(logits, splits, folder, "reliability_diagram")


def draw_reliability(logits: dict[str, np.ndarray], splits: DatasetDict, folder: Path, name: str) -> None:
    split = "test" if "test" in logits else "validation"
    plots.reliability_diagram(logits[split], np.array(splits[split]["labels"]), folder, name)


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


def length_limit(asked: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """``--max_length``, or the encoder's limit where that is less."""
    limit = tokenizer.model_max_length
    if asked > limit:
        logger.info("--max_length %d is beyond the model's limit: texts are cut at %d tokens", asked, limit)
    return min(asked, limit)


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if torch.cuda.is_available() else None)


def precision(training: HierarchicalTrainingArguments) -> str:
    return "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"


def check_output_folder(training: HierarchicalTrainingArguments) -> None:
    """Refuses to write over a finished or started run."""
    output = Path(training.output_dir)
    check_writable("--output_dir", output)
    if not output.is_dir() or training.overwrite_output_dir or training.resume_from_checkpoint is not None:
        return
    if (output / "config.json").exists() or get_last_checkpoint(str(output)) is not None:
        remedy = (
            "--overwrite_output_dir true, or --resume_from_checkpoint auto" if training.do_train else "another folder"
        )
        raise InputError(f"--output_dir {output} already holds a run: give {remedy}")


def source_commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None where it is no git checkout."""
    root = Path(__file__).parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    done = subprocess.run(describe, capture_output=True, text=True)
    return done.stdout.strip() or None


def set_up_logging(training: HierarchicalTrainingArguments) -> None:
    first = training.process_index == 0
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    for name in ("train", "training"):
        logging.getLogger(name).setLevel(logging.INFO if first else logging.ERROR)
    if not first:
        transformers.logging.set_verbosity_error()


def log_setup(arguments: ModelArguments, training: HierarchicalTrainingArguments, size: dict) -> None:
    logger.info(
        "device %s, precision %s, encoder %s, tuning %s", training.device, precision(training),
        arguments.quantization if arguments.quantization != "none" else "not quantized", arguments.tuning,
    )  # fmt: skip
    logger.info(
        "trained: %s of %s parameters (%.2f %%); encoder: %.1f MB, %.1f MB in float32",
        f"{size['trainable_parameters']:,}", f"{size['all_parameters']:,}", 100 * size["trainable_share"],
        size["encoder_bytes"] / 1e6, size["encoder_bytes_float32"] / 1e6,
    )  # fmt: skip


def log_metrics(metrics: dict[str, float]) -> None:
    """One line a metric, one column a split."""
    splits = [prefix for prefix in ("eval", "test") if f"{prefix}_loss" in metrics]
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


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def failure(error: Exception) -> str | None:
    """The one line for what a user can do something about; None for what is a fault of ours."""
    if isinstance(error, (InputError, TaxonomyError)):
        return str(error)
    if is_full_disk(error):
        return f"{one_line(error)}: make room, then --resume_from_checkpoint auto goes on"
    if should_reduce_batch_size(error):
        return (
            f"{one_line(error)}; --auto_find_batch_size true finds a batch that fits and accumulates to the same size, "
            "--gradient_checkpointing true needs less memory"
        )
    if isinstance(error, ImportError) and "install" in str(
        error
    ):  # what a flag needs and requirements.txt does not have
        return one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


if __name__ == "__main__":
    said, trace = None, ""
    try:
        main(sys.argv[1:])
    except Exception as error:
        said, trace = failure(error), asked_traceback()
        if said is None:
            raise
    if said is not None:
        gc.collect()  # the run, and its progress bars with it, which write once more
        leave("train.py", said, trace=trace)

"""Train a hierarchical classifier: ``python train.py [recipe.yaml] [--flag value …]``.

Scores are measured on the checkpoint as a user loads it, over a full-precision encoder. The checkpoint is selected on the
validation rows. Then its calibration, its thresholds and the weight of its lexical head are fitted on them.
``--refit`` then trains a second model, on training and validation rows.
"""

import dataclasses
import functools
import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# silence bitsandbytes before its import: it suggests unpinned kernels from the Hub, and warns of each 8-bit layer's cast
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from datasets import DatasetDict
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from checkpoint_files import is_checkpoint, read_config
from checkpoint_hierarchical import check_tokenizer
from configuration_hierarchical import MULTI_LABEL, HierarchicalConfig
from errors import (
    InputError,
    as_input_error,
    exit_with_error,
    is_file_error,
    is_full_disk,
    one_line,
    requested_traceback,
)
from evaluation import plots, report
from evaluation.label_issues import write_label_issues
from evaluation.lexical import fit_classifier
from files import write_json
from machine import keep_memory
from publishing.description import METRICS, SCORED_MODEL, delete_earlier_description, delete_scores, hash_model
from taxonomy_hierarchical import TaxonomyError
from training import resume
from training.arguments import Arguments, HierarchicalTrainingArguments, check_against_data, parse
from training.cpu import KEPT_MEMORY
from training.label_arrays import label_arrays
from training.losses import HierarchicalFocalLoss, MultiLabelFocalLoss
from training.model import build_model, fetch_model, find_config_folder, load_tokenizer, size_report
from training.prototypes import initialise_heads
from training.publish import check_hub, push, run_facts, run_settings, write_card
from training.splits import LabelledSplits, load_splits, read_sources, train_on_validation_rows
from training.tokens import build_collator, tokenize_splits
from training.trainer import HierarchicalTrainer

logger = logging.getLogger("train")

BEFORE_CALIBRATION = ("_loss", "_ece", "_ece_by_chance")  # suffixes of metrics that may exist before calibration only
SELECTION = "selection"  # folder of the run that chooses the epochs for --refit, in the output folder

Prepare = Callable[[HierarchicalTrainer], HierarchicalTrainer]


def main(argv: list[str], prepare: Prepare = lambda trainer: trainer) -> None:
    """Run a command line. ``prepare`` may change the Trainer before it trains, as in examples/ray_train.py."""
    arguments = parse(argv)
    training = arguments.training
    set_up_logging(training.process_index == 0)
    with resume.lock_output_folder(training):
        run(arguments, prepare)


def run(arguments: Arguments, prepare: Prepare) -> None:
    """Check the output folder, read the data, then train or score."""
    # ── Output folder, model: before the data are read ───────────────────────────────────────────────────────────────
    training = arguments.training
    resume.check_output_folder(training, arguments.model.model_name_or_path)
    set_seed(training.seed)
    source = arguments.model.model_name_or_path
    selection = selection_run(arguments) if training.do_train and training.refit else None
    if selection and Path(source).resolve() == Path(selection.training.output_dir).resolve():
        raise InputError(f"--refit would overwrite {source}, from which it starts: give another --output_dir")
    if selection:
        resume.check_output_folder(selection.training, source)
    requested = training.resume_from_checkpoint if training.do_train else None
    resume_from = resume.find_checkpoint(requested, (selection or arguments).training.output_dir)

    # ── Data: read, check, split ─────────────────────────────────────────────────────────────────────────────────────
    with training.main_process_first(desc="reading the data"):
        data, stored = load_data(arguments, resume_from)
    if stored and stored.is_multi_label != data.is_multi_label:
        kinds = "one label per text", f"any number of labels per text (--problem_type {MULTI_LABEL})"
        raise InputError(f"{source} is for {kinds[stored.is_multi_label]}, the data for {kinds[data.is_multi_label]}")

    # ── Model, fit, measure, publish ─────────────────────────────────────────────────────────────────────────────────
    if selection:
        refit(arguments, selection, data, resume_from, prepare)
    elif training.do_train:
        train(arguments, data, resume_from, prepare)
    elif stored is None:
        raise InputError(f"--do_train false needs a trained checkpoint, which {source} is not")
    elif data.taxonomy != stored.tree:
        raise InputError("--taxonomy differs from the checkpoint's taxonomy; leave it out to score a checkpoint")
    else:
        score_checkpoint(arguments, data)


def load_data(arguments: Arguments, resume_from: str | None) -> tuple[LabelledSplits, HierarchicalConfig | None]:
    """Return the labelled splits, and the configuration of the checkpoint to start from, if it is one.

    Rows are read and checked before the Hub is asked for a checkpoint's taxonomy, which their labels may need.
    """
    trains = bool(arguments.training.do_train)
    rows = read_sources(arguments.data, trains)
    folder = find_config_folder(arguments.model)
    stored = read_config(folder) if is_checkpoint(folder) else None
    trained_texts = resume.read_earlier_texts(folder, resume_from)
    taxonomy = stored.tree if stored else None
    return load_splits(arguments.data, arguments.training.seed, taxonomy, trained_texts, trains, rows), stored


def selection_run(arguments: Arguments) -> Arguments:
    """Return the arguments of the run that chooses the number of epochs and the calibration for ``--refit``."""
    folder = str(Path(arguments.training.output_dir) / SELECTION)
    changed: dict[str, Any] = {"output_dir": folder, "push_to_hub": False, "refit": False}
    return arguments._replace(training=dataclasses.replace(arguments.training, **changed))


def refit(
    arguments: Arguments, selection: Arguments, data: LabelledSplits, resume_from: str | None, prepare: Prepare
) -> None:
    """Train two models: ``selection`` on the training rows, and then, with its epochs and calibration, one on all rows.

    The test rows are left out. ``resume_from`` is a checkpoint of ``selection``.
    """
    # ── First run, unless it is finished ─────────────────────────────────────────────────────────────────────────────
    training, folder = arguments.training, Path(selection.training.output_dir)
    if not {"train", "validation"} <= data.splits.keys():
        raise InputError("--refit needs training and validation rows")
    if resume_from is not None and (folder / "metrics.json").is_file():
        resume.check_resumed_data(resume_from, data.taxonomy, data.report)
    else:
        # the second run would resume from these checkpoints
        if resume.list_checkpoints(Path(training.output_dir)) and not training.overwrite_output_dir:
            problem = f"--output_dir {training.output_dir} holds the checkpoints of a run without --refit"
            raise InputError(f"{problem}: give another --output_dir, or --overwrite_output_dir true")
        first = dataclasses.replace(data, report={**data.report})  # a run adds to its report
        train(selection, first, resume_from, prepare, second_run=training)
        PartialState().wait_for_everyone()  # one process writes metrics.json
    epochs = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["best_epoch"]

    # ── Second run, on all rows ──────────────────────────────────────────────────────────────────────────────────────
    data = train_on_validation_rows(data)
    num_rows = f"{len(data.splits['train']):,}"
    logger.info("training a second model on all %s rows except the test rows, for %g epochs", num_rows, epochs)
    logger.warning("coverage and recall are not guaranteed for this second model: it is trained on the validation rows")
    # new arguments, because the first run's scoring has changed the precision of accelerate
    changed: dict[str, Any] = {"num_train_epochs": epochs, "max_steps": -1}
    training = dataclasses.replace(training, **changed)
    arguments = arguments._replace(training=training)
    resume_from = resume.find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    set_seed(training.seed)
    train(arguments, data, resume_from, prepare)


def train(
    arguments: Arguments,
    data: LabelledSplits,
    resume_from: str | None,
    prepare: Prepare,
    second_run: HierarchicalTrainingArguments | None = None,
) -> None:
    """Train, measure and publish a model. All files go to ``--output_dir``.

    The first run of ``--refit`` gets the arguments of the ``second_run``, checks the Hub for both, and cleans up both folders. The
    second run copies the calibration of the first.
    """
    training = arguments.training
    first_run = Path(training.output_dir) / SELECTION if training.refit else None  # `selection_run` switches refit off
    check_against_data(arguments, data.taxonomy, data.splits, report.build_metrics(data.taxonomy, data.is_multi_label))
    heads_init = resume.check_resumed_data(resume_from, data.taxonomy, data.report) if resume_from else None

    # ── Model: encoder, adapter, heads, tokenizer ────────────────────────────────────────────────────────────────────
    fetch_model(arguments.model)  # not before the data are known to be usable
    model = build_model(arguments.model, data.taxonomy, training.seed, MULTI_LABEL if data.is_multi_label else None)
    for checkpoint in filter(None, (resume_from, first_run)):
        resume.check_model(str(checkpoint), model)
    if (second_run or training).push_to_hub:
        check_hub(second_run or training, model)
    tokenizer = load_tokenizer(arguments.model, model)
    splits = tokenize_splits(arguments, data, tokenizer)

    # ── Run: folder, trainer, settings, initial heads ────────────────────────────────────────────────────────────────
    output = Path(training.output_dir)
    if training.should_save:
        output.mkdir(parents=True, exist_ok=True)
    trainer = prepare(build_trainer(arguments, splits, model, tokenizer))
    settings = run_settings(arguments, model, tokenizer.model_max_length)
    metrics: dict[str, Any] = {}  # filled at the end, before the card is written again
    trainer.write_card = functools.partial(write_card, trainer, settings, data.report, metrics)
    size = size_report(model)
    setup = (training.device, training.precision, arguments.model.quantization, arguments.model.tuning)
    logger.info("device %s, precision %s, encoder %s, tuning %s", *setup)
    sizes = "trained: {trainable_parameters:,} of {all_parameters:,} parameters; "
    sizes += "encoder: {encoder_bytes:,} bytes, {encoder_bytes_float32:,} in float32"
    logger.info(sizes.format_map(size))
    outputs = [training.output_dir] if second_run is None else [training.output_dir, second_run.output_dir]
    resume.start_run(trainer, arguments.model.model_name_or_path, data, resume_from, outputs)
    if resume_from is None:
        heads_init = initialise_heads(trainer, splits["train"], arguments.model)
    settings["heads_init"] = data.report["heads_init"] = heads_init
    if heads_init is None:  # trained heads are kept, and there were no contrastive steps
        settings["contrastive_steps"] = None
    if training.should_save:
        # the rows of the second run of --refit come from two files, so their numbers would be ambiguous
        if arguments.data.label_issues and first_run is None:
            vocab_size = model.config.text_config.vocab_size
            data.report["label_issues"] = write_label_issues(data.taxonomy, splits["train"], vocab_size, output)
        write_json(output / "data_report.json", data.report)

    # ── Fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────
    if training.device.type == "cpu":
        keep_memory(*KEPT_MEMORY)
    result = trainer.train(resume_from_checkpoint=resume_from)
    if first_run is not None:
        report.copy_calibration(model, read_config(first_run), splits["train"])
    if training.should_save and result.global_step != result.metrics.get("resumed_from_step"):
        delete_earlier_description(output)  # of a finished run that was resumed, and took steps
    trainer.save_model(_internal_call=True)  # else it is pushed here, before it is measured
    trainer.accelerator.wait_for_everyone()  # all processes load it

    # ── Measure: the checkpoint, loaded back ─────────────────────────────────────────────────────────────────────────
    metrics |= result.metrics | run_facts(arguments, size, data.report) | {"best_epoch": trainer.best_epoch}
    scores, logits = score_and_calibrate(arguments, splits, trainer, model)
    metrics |= scores | report.class_scores(model.config, logits, splits)

    # ── Publish: files, model card, Hub ──────────────────────────────────────────────────────────────────────────────
    if training.should_save:
        write_files(output, metrics, model, logits, splits)
        plots.write(plots.training_curves(trainer.state.log_history), output / "plots" / "training_curves.png")
        trainer.write_card(output)
        write_json(output / METRICS, metrics | {SCORED_MODEL: hash_model(output)})
        logger.info("checkpoint, metrics and plots are in %s", output)
    report.log_metrics(scores)
    if training.push_to_hub:
        push(trainer)


def build_trainer(
    arguments: Arguments, splits: DatasetDict, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> HierarchicalTrainer:
    """Build the Trainer for tokenized splits, with the loss and the early stopping that the flags ask for."""
    training, loss, taxonomy = arguments.training, arguments.loss, model.config.tree
    if training.fp16 and training.device.type == "cpu":  # accelerate would train in float32
        raise InputError("--fp16 needs a GPU: leave it out")
    loss_settings: dict[str, Any] = {
        "gamma": loss.focal_gamma,
        "balanced": loss.class_weighting == "balanced",
        "level_weights": loss.level_weights,
        "label_smoothing": training.label_smoothing_factor,
    }
    loss_function: torch.nn.Module
    if model.config.is_multi_label:
        loss_function = MultiLabelFocalLoss(taxonomy, label_arrays(splits["train"]), **loss_settings)
    else:
        counts = torch.tensor(taxonomy.count_at_or_below(splits["train"]["labels"][:]))
        loss_function = HierarchicalFocalLoss(taxonomy, counts, **loss_settings)
    patience = training.early_stopping_patience if training.load_best_model_at_end else None
    return HierarchicalTrainer(
        model=model,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer),
        compute_metrics=report.build_metrics(taxonomy, model.config.is_multi_label),
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        loss_function=loss_function,
        consistency=loss.consistency,
    )


def score_and_calibrate(
    arguments: Arguments, splits: DatasetDict, trainer: HierarchicalTrainer, model: PreTrainedModel
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Score the checkpoint that was just saved; calibrate it on the validation rows and save it again.

    The scores include those of the quantized model as trained, on the validation rows. The logits of each split
    are calibrated if there are validation rows.
    """
    training, taxonomy, as_trained = arguments.training, model.config.tree, {}
    if arguments.model.quantization != "none":
        trainer.compute_metrics = report.pipeline_metrics(model.config)  # training's F1 is at the best threshold
        held_out = DatasetDict({split: rows for split, rows in splits.items() if split == "validation"})
        scores, *_ = report.score_splits(trainer, held_out)
        as_trained = {f"quantized_{name}": value for name, value in scores.items()}
    scorer = report.scoring_trainer(training.output_dir, training, trainer.processing_class, trainer.loss_function)
    scores, logits, to_calibrate = report.score_splits(scorer, splits)
    if training.refit:  # the second run, with the calibration of the first
        return as_trained | scores | report.answer_scores(model.config, logits, splits), logits
    if "validation" not in logits:
        logger.info("no validation rows were scored: no lexical head, and the model's probabilities are not calibrated")
        return as_trained | scores, logits
    if training.should_save:
        file = Path(training.output_dir) / "plots" / "reliability_diagram_uncalibrated.png"
        _, *scored = report.reported_split(logits, splits)
        plots.write(plots.reliability_diagram(taxonomy, *scored), file)
    vocab_size, max_length = model.config.text_config.vocab_size, trainer.processing_class.model_max_length
    classifier = fit_classifier(taxonomy, splits["train"], vocab_size, arguments.model.lexical_head)
    calibrated, logits = report.calibrate_model(model, classifier, to_calibrate, splits, max_length)
    trainer.save_model(_internal_call=True)
    before = {name: scores.pop(name) for name in [*scores] if name in calibrated or name.endswith(BEFORE_CALIBRATION)}
    uncalibrated = {f"uncalibrated_{name}": value for name, value in before.items()}
    return as_trained | scores | uncalibrated | calibrated, logits


def score_checkpoint(arguments: Arguments, data: LabelledSplits) -> None:
    """Score a finished checkpoint on labelled files, loaded as a user loads it."""
    training = arguments.training
    if not set(data.splits) & {"validation", "test"}:
        before = data.report["trained_before"]
        left_out = sum(sum(before[action].values()) for action in ("moved", "left_out"))
        problem = "give --validation_file or --test_file; to score all rows of one file, give it as --test_file"
        if left_out:
            problem = f"the checkpoint was trained or calibrated on the texts of all {left_out:,} rows; give other rows"
        raise InputError(f"nothing to score: {problem}")
    fetch_model(arguments.model)
    source = arguments.model.model_name_or_path
    with as_input_error(f"cannot load the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    scorer = report.scoring_trainer(source, training, tokenizer)
    with as_input_error(f"cannot score {source}"):
        check_tokenizer(tokenizer, scorer.model)
    splits = tokenize_splits(arguments, data, tokenizer)
    metrics, logits, _ = report.score_splits(scorer, splits)
    if tokenizer.model_max_length == scorer.model.config.conformal_max_length:
        metrics |= report.answer_scores(scorer.model.config, logits, splits)
    if training.should_save:
        output = Path(training.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        delete_scores(output)
        write_json(output / "data_report.json", data.report)
        scored = metrics | report.class_scores(scorer.model.config, logits, splits)
        write_files(output, scored, scorer.model, logits, splits)
        write_json(output / METRICS, scored | {SCORED_MODEL: hash_model(Path(source))})
        logger.info("metrics and plots are in %s", output)
    report.log_metrics(metrics)


def write_files(
    output: Path, metrics: dict[str, Any], model: PreTrainedModel, logits: dict[str, np.ndarray], splits: DatasetDict
) -> None:
    """Write the plots and the predictions of the scored splits into the folder ``output``."""
    report.draw_plots(model.config, logits, splits, metrics.get("per_class", []), output / "plots")
    report.write_predictions(model.config, logits, splits, output)


def set_up_logging(first: bool) -> None:
    """Log messages of this project, in the ``first`` process only, and warnings of libraries."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    for name in ("train", "training", "evaluation", "publishing"):
        logging.getLogger(name).setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    if not first:
        transformers.logging.set_verbosity_error()


def user_error_message(error: Exception) -> str | None:
    """Return the message for an error that a user can correct, on one line, or None for a bug of this project."""
    if isinstance(error, (InputError, TaxonomyError)):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":  # a recipe names the file
        return f"the name of a file is not {error.encoding}, the locale's encoding: set PYTHONUTF8=1"
    if is_full_disk(error):
        return f"the disk is full ({one_line(error)}): make room, then --resume_from_checkpoint auto resumes"
    if should_reduce_batch_size(error):
        return f"{one_line(error)}; give --activation_checkpointing true, or a lower --per_device_train_batch_size"
    if isinstance(error, ImportError) and "install" in str(error):  # a flag needs a package beyond requirements.txt
        return one_line(error)
    if is_file_error(error):
        return f"{error.filename or 'cannot read or write a file'}: {error.strerror}"
    return None


if __name__ == "__main__":
    message = None
    try:
        main(sys.argv[1:])
    except Exception as error:
        message, trace = user_error_message(error), requested_traceback()
        if message is None:
            raise
    if message is not None:
        gc.collect()  # destroy the run and its progress bars now, because they write once more
        exit_with_error("train.py", message, trace=trace)

"""Train a hierarchical classifier: ``python train.py [recipe.yaml] [--flag value …]``.

Scores are measured on the checkpoint as a user loads it, over a full-precision encoder. The checkpoint is selected on the
validation rows. Then its calibration, its thresholds and the weight of its lexical head are fitted on them.
"""

import functools
import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# silence bitsandbytes before its import: it suggests unpinned kernels from the Hub, and warns of each 8-bit layer's cast
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from datasets import DatasetDict
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from checkpoint_hierarchical import check_tokenizer
from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import is_checkpoint, read_config
from hierarchical_clinicalbert.data.splits import LabelledSplits, load_splits, read_sources
from hierarchical_clinicalbert.errors import (
    InputError,
    as_input_error,
    exit_with_error,
    is_file_error,
    is_full_disk,
    one_line,
    requested_traceback,
)
from hierarchical_clinicalbert.evaluation import plots, report
from hierarchical_clinicalbert.evaluation.calibration import label_arrays
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.evaluation.label_issues import write_label_issues
from hierarchical_clinicalbert.evaluation.lexical import fit_classifier, token_counts
from hierarchical_clinicalbert.files import write_json
from hierarchical_clinicalbert.machine import keep_memory
from hierarchical_clinicalbert.publishing.description import (
    METRICS,
    SCORED_MODEL,
    delete_earlier_description,
    delete_scores,
    hash_model,
)
from hierarchical_clinicalbert.training import resume
from hierarchical_clinicalbert.training.arguments import Arguments, check_against_data, parse
from hierarchical_clinicalbert.training.cpu import KEPT_MEMORY
from hierarchical_clinicalbert.training.losses import FocalLoss
from hierarchical_clinicalbert.training.model import (
    build_model,
    fetch_model,
    find_config_folder,
    load_tokenizer,
    size_report,
)
from hierarchical_clinicalbert.training.prototypes import initialise_heads
from hierarchical_clinicalbert.training.publish import check_hub, push, run_facts, run_settings, write_card
from hierarchical_clinicalbert.training.tokens import build_collator, tokenize_splits
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer
from taxonomy_hierarchical import TaxonomyError

logger = logging.getLogger("train")

BEFORE_CALIBRATION = ("_loss", "_ece", "_ece_by_chance")  # suffixes of metrics that may exist before calibration only
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
    requested = training.resume_from_checkpoint if training.do_train else None
    resume_from = resume.find_checkpoint(requested, training.output_dir)

    # ── Data: read, check, split ─────────────────────────────────────────────────────────────────────────────────────
    with training.main_process_first(desc="reading the data"):
        data, stored = load_data(arguments, resume_from)
    if stored and stored.problem_type != data.problem_type:
        kinds = {SINGLE_LABEL: "one label per text", MULTI_LABEL: "any number of labels per text"}
        ours, theirs = kinds[data.problem_type], kinds[stored.problem_type]
        raise InputError(f"{source} is for {theirs}, the data for {ours} (--problem_type {data.problem_type})")

    # ── Model, fit, measure, publish ─────────────────────────────────────────────────────────────────────────────────
    if training.do_train:
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


def train(arguments: Arguments, data: LabelledSplits, resume_from: str | None, prepare: Prepare) -> None:
    """Train, measure and publish a model. All files go to ``--output_dir``."""
    training, form = arguments.training, form_of(data.taxonomy, data.problem_type)
    check_against_data(arguments, data.splits, form)
    heads_init = resume.check_resumed_data(resume_from, data.taxonomy, data.report) if resume_from else None

    # ── Model: encoder, adapter, heads, tokenizer ────────────────────────────────────────────────────────────────────
    fetch_model(arguments.model)  # not before the data are known to be usable
    model = build_model(arguments.model, data.taxonomy, training.seed, data.problem_type)
    if resume_from is not None:
        resume.check_model(resume_from, model)
    if training.push_to_hub:
        check_hub(training, model)
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
    resume.start_run(trainer, arguments.model.model_name_or_path, data, resume_from)
    if resume_from is None:
        heads_init = initialise_heads(trainer, splits["train"], arguments.model)
    settings["heads_init"] = data.report["heads_init"] = heads_init
    if heads_init is None:  # trained heads are kept, and there were no contrastive steps
        settings["contrastive_steps"] = None
    if training.should_save:
        if arguments.data.label_issues:
            vocab_size = model.config.text_config.vocab_size
            data.report["label_issues"] = write_label_issues(form, splits["train"], vocab_size, output)
        write_json(output / "data_report.json", data.report)

    # ── Fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────
    if training.device.type == "cpu":
        keep_memory(*KEPT_MEMORY)
    result = trainer.train(resume_from_checkpoint=resume_from)
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
    training, loss = arguments.training, arguments.loss
    if training.fp16 and training.device.type == "cpu":  # accelerate would train in float32
        raise InputError("--fp16 needs a GPU: leave it out")
    form = form_of(model.config.tree, model.config.problem_type)
    loss_function = FocalLoss(
        form.decisions,
        form.decisions.targets(splits["train"]["labels"][:]),
        gamma=loss.focal_gamma,
        balanced=loss.class_weighting == "balanced",
        label_smoothing=training.label_smoothing_factor,
    )
    patience = training.early_stopping_patience if training.load_best_model_at_end else None
    return HierarchicalTrainer(
        model=model,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=build_collator(tokenizer, form.decisions.targets),
        compute_metrics=form.metrics(),
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
    training, as_trained = arguments.training, dict[str, float]()
    form = form_of(model.config.tree, model.config.problem_type)
    if arguments.model.quantization != "none":
        trainer.compute_metrics = report.pipeline_metrics(model.config)  # training's F1 is at the best threshold
        held_out = DatasetDict({split: rows for split, rows in splits.items() if split == "validation"})
        scores, *_ = report.score_splits(trainer, held_out)
        as_trained = {f"quantized_{name}": value for name, value in scores.items()}
    scorer = report.scoring_trainer(training.output_dir, training, trainer.processing_class, trainer.loss_function)
    scores, logits, decision_scores = report.score_splits(scorer, splits)
    if "validation" not in logits:
        logger.info("no validation rows were scored: no lexical head, and the model's probabilities are not calibrated")
        return as_trained | scores, logits
    if training.should_save:
        file = Path(training.output_dir) / "plots" / "reliability_diagram_uncalibrated.png"
        _, *scored = report.reported_split(form, logits, splits)
        plots.write(form.reliability_diagram(*scored), file)
    vocab_size, max_length = model.config.text_config.vocab_size, trainer.processing_class.model_max_length
    counts, labels = token_counts(splits["train"], vocab_size), label_arrays(form.decisions, splits["train"])
    classifier = fit_classifier(form, counts, labels, arguments.model.lexical_head)
    calibrated, logits = report.calibrate_model(model, classifier, decision_scores, splits, max_length)
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
    if tokenizer.model_max_length == scorer.model.config.calibration.max_length:
        metrics |= report.set_scores(scorer.model.config, logits, splits)
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

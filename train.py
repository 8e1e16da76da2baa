"""Train a hierarchical classifier: ``python train.py [recipe.yaml] [--flag value …]``.

Scores are measured on the checkpoint as a user loads it, over a full-precision encoder. The
checkpoint is selected on the validation rows. Then its calibration, its thresholds and the weight
of its lexical head are fitted on them.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import hierarchical_clinicalbert  # noqa: F401 - before bitsandbytes, see there

# isort: split
import datasets
import transformers
from datasets import DatasetDict
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import set_seed

from hierarchical_clinicalbert.checkpoint_files import METRICS, is_checkpoint, read_config
from hierarchical_clinicalbert.data.labels import read_class_names
from hierarchical_clinicalbert.data.report import log_report
from hierarchical_clinicalbert.data.sources import read_rows
from hierarchical_clinicalbert.data.splits import LabelledSplits, split_rows
from hierarchical_clinicalbert.errors import InputError, run_command
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.evaluation.report import (
    calibrate_splits,
    log_metrics,
    log_removed,
    measure_sets,
    measure_strange_texts,
    write_scores,
)
from hierarchical_clinicalbert.files import lock, write_json
from hierarchical_clinicalbert.machine import keep_memory
from hierarchical_clinicalbert.publishing.card import (
    classify_example,
    delete_description,
    delete_scores,
)
from hierarchical_clinicalbert.publishing.fingerprint import write_fingerprint
from hierarchical_clinicalbert.training import resume
from hierarchical_clinicalbert.training.arguments import Arguments, fit_to_data, parse
from hierarchical_clinicalbert.training.cpu import KEPT_MEMORY
from hierarchical_clinicalbert.training.model import (
    build_model,
    fetch_model,
    load_tokenizer,
    pin_model,
    size_report,
)
from hierarchical_clinicalbert.training.prototypes import (
    find_known_nodes,
    initialise_heads,
    set_heads,
)
from hierarchical_clinicalbert.training.publish import (
    check_hub,
    describe_page,
    run_facts,
    run_settings,
    write_card,
)
from hierarchical_clinicalbert.training.score import (
    fit_lexical_head,
    learn_known_texts,
    score_splits,
    scoring_trainer,
)
from hierarchical_clinicalbert.training.teacher import teach
from hierarchical_clinicalbert.training.tokens import tokenize_splits
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer

logger = logging.getLogger("train")

MAX_LENGTH = 512  # of a text in tokens, unless --max_length is given
BEFORE_CALIBRATION = ("_loss", "_ece")  # suffixes of metrics that may exist before calibration only
SIZES = (  # of `size_report`
    "trained: {trainable_parameters:,} of {all_parameters:,} parameters; "
    "encoder: {encoder_bytes:,} bytes, {encoder_bytes_float32:,} in float32"
)
ADVICE = {  # of `run_command`
    "disk": "make room, then --resume_from_checkpoint auto resumes",
    "memory": (
        "give --activation_checkpointing true, or a lower --per_device_train_batch_size or "
        "--per_device_eval_batch_size"
    ),
    "resume": "--resume_from_checkpoint auto resumes",
}
NEXT = """  python predict.py --model {0} --input texts.csv --output predictions.csv
  python space/app.py --model {0}
  python push_to_hub.py --model {0} --repo_id user/name --dry_run"""
Prepare = Callable[[HierarchicalTrainer], HierarchicalTrainer]


def main(argv: list[str], prepare: Prepare = lambda trainer: trainer) -> None:
    """Run a command line.

    ``prepare`` may change the Trainer before it trains, as in examples/ray_train.py.
    """
    arguments = parse(argv)
    args = arguments.training
    set_up_logging(args.process_index == 0)
    output = Path(args.output_dir)
    locked = (
        lock("--output_dir", output, output / ".train.lock")
        if args.process_index == 0
        else nullcontext()
    )
    with locked, logging_redirect_tqdm():
        run(arguments, prepare)


def run(arguments: Arguments, prepare: Prepare) -> None:
    """Check the output folder, read the data, then train or score."""
    # ── Output folder: before the data are read ───────────────────────────────────────────────────
    args = arguments.training
    source = arguments.model.model_name_or_path
    trains = bool(args.do_train)
    resume.check_output_folder(args, source)
    set_seed(args.seed)
    requested = args.resume_from_checkpoint if trains else None
    resume_from = resume.find_checkpoint(requested, args.output_dir) if requested else None

    # ── Data: read, map labels to nodes, split ────────────────────────────────────────────────────
    with args.main_process_first(desc="reading the data"):
        # before the Hub is asked for a checkpoint's taxonomy
        rows = read_rows(arguments.data, trains)
        model, folder = pin_model(arguments.model)
        stored = read_config(folder) if is_checkpoint(folder) else None
        # the form is the checkpoint's
        if stored and rows.rows.empty and arguments.data.problem_type is None:
            rows = read_rows(
                dataclasses.replace(arguments.data, problem_type=stored.problem_type), trains
            )
        earlier = resume.read_earlier_texts(folder, resume_from, arguments.training.teacher)
        data = split_rows(rows, arguments.data, stored.tree if stored else None, args.seed, earlier)
    if stored and stored.problem_type != data.problem_type:
        theirs = stored.problem_type
        ours = data.problem_type
        raise InputError(
            f"{source} is a checkpoint for {theirs}, the data are for {ours} (--problem_type)"
        )
    if arguments.data.renamed_nodes and stored is None:
        raise InputError(f"--renamed_nodes is for the nodes of a checkpoint, which {source} is not")

    # ── Train or score ────────────────────────────────────────────────────────────────────────────
    arguments = arguments._replace(model=model)
    if trains:
        train(arguments, data, resume_from, prepare)
    elif stored is None:
        raise InputError(f"--do_train false needs a trained checkpoint, which {source} is not")
    elif data.taxonomy != stored.tree:
        raise InputError(
            "--taxonomy differs from the checkpoint's taxonomy; leave it out to score a checkpoint"
        )
    else:
        score_checkpoint(arguments, data)


def train(
    arguments: Arguments, data: LabelledSplits, resume_from: str | None, prepare: Prepare
) -> None:
    """Train, measure and publish a model. All files go to ``--output_dir``."""
    if arguments.training.teacher is not None:
        data = teach(arguments.training.teacher, arguments.data, data)
    form = form_of(data.taxonomy, data.problem_type)
    fitted = fit_to_data(arguments.training, data.splits, form, arguments.data.taxonomy is not None)
    arguments = arguments._replace(training=fitted)
    args = fitted
    output = Path(fitted.output_dir)
    takes_steps = args.num_train_epochs > 0
    heads_init = None
    if resume_from is not None:
        resume.check_resumed_data(resume_from, data.report)
        heads_init = resume.read_data_report(resume_from).get("heads_init")

    # ── Model: encoder, adapter, heads, tokenizer ─────────────────────────────────────────────────
    # the data are known to be usable
    arguments = arguments._replace(model=fetch_model(arguments.model))
    initial = arguments.model.model_name_or_path
    continued = read_config(initial) if is_checkpoint(initial) else None
    renamed = read_class_names(arguments.data.renamed_nodes, "--renamed_nodes")
    known = find_known_nodes(arguments.model, data.taxonomy, renamed)
    if data.unlabelled and known and arguments.training.teacher is None:
        raise InputError(
            "--unlabelled_file without --teacher is for a new classifier, and a checkpoint "
            "has heads"
        )
    if not (
        known or data.unlabelled or "train" in data.splits or form.decisions.scores_are_relative
    ):
        raise InputError(
            "several labels without training rows need --unlabelled_file: names do not tell "
            "how many labels a text has"
        )
    model = build_model(
        arguments.model, data.taxonomy, args.seed, data.problem_type, renamed, takes_steps
    )
    model.config.page = describe_page(args, model.config)
    if resume_from is not None:
        resume.check_model(resume_from, model)
    if args.push_to_hub:
        check_hub(args, model)
    tokenizer = load_tokenizer(arguments.model, model)
    earlier_length = continued.calibration.max_length if continued else None
    default_length = earlier_length or min(MAX_LENGTH, tokenizer.model_max_length)
    max_length = arguments.data.max_length or default_length
    if earlier_length not in (None, max_length):
        change = f"from {earlier_length} to {max_length} tokens"
        advice = "leave it out to keep the checkpoint's limit"
        logger.warning("--max_length changes where texts are truncated %s; %s", change, advice)
    tokenizer.model_max_length = max_length
    splits, lengths = tokenize_splits(data.splits, tokenizer, arguments.training.consistency > 0)
    # which engines read, also without a calibration
    model.config.calibration.max_length = tokenizer.model_max_length
    log_report(data.report, lengths)

    # ── Run: trainer, initial heads, data report ──────────────────────────────────────────────────
    trainer = prepare(
        HierarchicalTrainer(model, args, splits.get("train"), splits.get("validation"), tokenizer)
    )
    size = size_report(model)
    setup = (args.device, args.precision, arguments.model.quantization, arguments.model.tuning)
    logger.info("device %s, precision %s, encoder %s, tuning %s", *setup)
    logger.info(SIZES.format_map(size))
    resume.start_run(trainer, arguments.model.model_name_or_path, data, resume_from)
    untrained: list[str] = []
    if not takes_steps:
        heads_init = "prototypes"
        untrained = set_heads(trainer, splits.get("train"), known, [*data.unlabelled.values()])
    elif resume_from is None:
        heads_init = initialise_heads(trainer, splits["train"], known)
    data_report = data.report | {
        "lengths": lengths,
        "heads_init": heads_init,
        "untrained_classes": untrained,
    }
    if args.should_save:
        write_json(output / "data_report.json", data_report)
    settings = run_settings(arguments, model, tokenizer.model_max_length, heads_init)
    trainer.write_card = functools.partial(write_card, trainer, settings, data_report)

    # ── Fit ───────────────────────────────────────────────────────────────────────────────────────
    if args.device.type == "cpu":
        keep_memory(*KEPT_MEMORY)
    result = trainer.train(resume_from_checkpoint=resume_from)
    if args.should_save:
        delete_description(output)  # of a finished run that was resumed
    trainer.save_model(_internal_call=True)  # else it is pushed here, before it is measured
    trainer.accelerator.wait_for_everyone()  # all processes load it

    # ── Score: the model as trained, and the checkpoint loaded back ───────────────────────────────
    as_trained: dict[str, float] = {}
    if arguments.model.quantization != "none" and "validation" in splits:
        _, as_trained = score_splits(trainer, DatasetDict(validation=splits["validation"]))
    scorer = scoring_trainer(args.output_dir, args, trainer.loss_function)
    scored, uncalibrated = score_splits(scorer, splits)
    scores = {f"quantized_{name}": value for name, value in as_trained.items()} | uncalibrated

    # ── Calibrate: the lexical head and the calibration become part of the checkpoint ─────────────
    if "validation" in scored and not model.config.calibration.scales:
        classifier = None
        if takes_steps:
            vocab_size = model.config.text_config.vocab_size
            wanted = args.lexical_head
            classifier = fit_lexical_head(form, splits["train"], tokenizer, vocab_size, wanted)
        calibration, scored, calibrated = calibrate_splits(form, scored, classifier)
        calibration = dataclasses.replace(calibration, max_length=tokenizer.model_max_length)
        lexical = classifier.weights() if classifier and calibration.lexical_weight else None
        open_world = (
            learn_known_texts(scorer, splits["train"], scored["validation"])
            if takes_steps
            else None
        )
        for one in (model, scorer.model):
            one.set_calibration(calibration, lexical, open_world)
        scores = replace_scores(scores, calibrated) | measure_sets(form, scored, calibration)
        scores |= measure_strange_texts(scored, open_world)
    elif not model.config.calibration.scales:
        logger.info(
            "no validation rows were scored: no lexical head, and the model's probabilities "
            "are not calibrated"
        )
    if continued is not None:
        basis = "its earlier weights" if takes_steps else "its earlier taxonomy"
        log_removed(form, continued, model.config, basis)

    # the Trainer's model may be quantized or sharded
    scorer.model.record_self_test(tokenizer)
    model.config.self_test = scorer.model.config.self_test
    trainer.save_model(_internal_call=True)

    # ── Publish: files, model card, Hub ───────────────────────────────────────────────────────────
    facts = (
        result.metrics
        | run_facts(arguments, size, data.report)
        | {"best_epoch": trainer.best_epoch}
    )
    thresholds = model.config.calibration.thresholds
    if args.should_save:
        metrics = facts | scores | write_scores(form, scored, thresholds, output)
        drawn = {
            name: metric.title
            for name, metric in form.metrics.items()
            if metric.is_key and metric.direction > 0
        }
        plots.write(
            plots.training_curves(trainer.state.log_history, drawn),
            output / "plots" / "training_curves.png",
        )
        shown = classify_example(scorer.model, tokenizer)
        write_card(trainer, settings, data_report, output, metrics, shown)
        write_fingerprint(output, output, scorer.model)
        write_json(output / METRICS, metrics)
        logger.info("checkpoint, metrics and plots are in %s", output)
    log_metrics(form, scores, scored)
    logger.info(
        "best epoch: %.4g of %.4g; next:\n%s",
        trainer.best_epoch,
        trainer.state.epoch,
        NEXT.format(output),
    )
    if args.push_to_hub:
        trainer.push_to_hub()


def replace_scores(
    uncalibrated: dict[str, float], calibrated: dict[str, float]
) -> dict[str, float]:
    """Return the scores after calibration, and those that it replaces as ``uncalibrated_…``."""
    kept = dict(uncalibrated)
    replaced = [name for name in kept if name in calibrated or name.endswith(BEFORE_CALIBRATION)]
    before = {
        f"uncalibrated_{name}": kept.pop(name)
        for name in replaced
        if not name.startswith("quantized_")
    }
    return kept | before | calibrated


def score_checkpoint(arguments: Arguments, data: LabelledSplits) -> None:
    """Score a finished checkpoint on labelled files, loaded as a user loads it."""
    args = arguments.training
    if not set(data.splits) & {"validation", "test"}:
        left_out = sum(data.report["trained_before"]["left_out"].values())
        problem = (
            "give --validation_file or --test_file; to score all rows of one file, give it as "
            "--test_file"
        )
        if left_out:
            problem = (
                f"the checkpoint was trained or calibrated on the texts of all {left_out:,} "
                "rows; give other rows"
            )
        raise InputError(f"nothing to score: {problem}")

    # ── Checkpoint ────────────────────────────────────────────────────────────────────────────────
    scorer = scoring_trainer(fetch_model(arguments.model).model_name_or_path, args)
    tokenizer = scorer.processing_class

    # ── Score ─────────────────────────────────────────────────────────────────────────────────────
    config = scorer.model.config
    form = form_of(data.taxonomy, data.problem_type)
    tokenizer.model_max_length = arguments.data.max_length or tokenizer.model_max_length
    splits, lengths = tokenize_splits(data.splits, tokenizer)
    log_report(data.report, lengths)
    scored, metrics = score_splits(scorer, splits)
    metrics |= measure_strange_texts(scored, getattr(scorer.model.heads, "open_world", None))
    if tokenizer.model_max_length == config.calibration.max_length:
        metrics |= measure_sets(form, scored, config.calibration)

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────
    if args.should_save:
        output = Path(args.output_dir)
        delete_scores(output)
        write_json(output / "data_report.json", data.report | {"lengths": lengths})
        classes = write_scores(form, scored, config.calibration.thresholds, output)
        write_fingerprint(output, Path(scorer.model.name_or_path), scorer.model)
        write_json(output / METRICS, metrics | classes)
        logger.info("metrics and plots are in %s", output)
    log_metrics(form, metrics, scored)


def set_up_logging(first: bool) -> None:
    """Log messages of this project, in the ``first`` process only, and warnings of libraries."""
    logging.basicConfig(
        format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True
    )
    for name in ("train", "hierarchical_clinicalbert"):
        logging.getLogger(name).setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    if not sys.stderr.isatty():  # bars fill a log file
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    if not first:
        transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    run_command("train.py", main, ADVICE)

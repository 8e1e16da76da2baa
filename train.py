"""Train a hierarchical classifier: ``python train.py [recipe.yaml] [--flag value …]``.

Scores are measured on the checkpoint as a user loads it, over a full-precision encoder. The
checkpoint is selected on the validation rows. Then its calibration, its thresholds and the weight
of its lexical head are fitted on them.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import hierarchical_clinicalbert  # noqa: F401 - before bitsandbytes, see there

# isort: split
import datasets
import transformers
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import set_seed

from configuration_hierarchical import HierarchicalConfig
from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.checkpoint_files import is_checkpoint, read_config
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.labels import read_class_names
from hierarchical_clinicalbert.data.sources import read_sources
from hierarchical_clinicalbert.data.splits import LabelledSplits, split_rows
from hierarchical_clinicalbert.errors import InputError, as_input_error, run_command
from hierarchical_clinicalbert.evaluation.report import log_metrics
from hierarchical_clinicalbert.files import lock, write_json
from hierarchical_clinicalbert.publishing.card import delete_scores
from hierarchical_clinicalbert.training import resume
from hierarchical_clinicalbert.training.arguments import (
    HierarchicalTrainingArguments,
    ModelArguments,
    parse,
    takes_steps,
)
from hierarchical_clinicalbert.training.model import (
    build_model,
    fetch_model,
    pin_model,
)
from hierarchical_clinicalbert.training.score import load_scored
from hierarchical_clinicalbert.training.teacher import teach
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer

logger = logging.getLogger("train")

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
    model, data, args = parse(argv)
    set_up_logging(args.process_index == 0)
    output = Path(args.output_dir)
    locked = (
        lock("--output_dir", output, output / ".train.lock")
        if args.process_index == 0
        else nullcontext()
    )
    with locked, logging_redirect_tqdm():
        resume.check_output_folder(args, model.model_name_or_path)  # before the data are read
        if args.do_train:
            train(model, data, args, prepare)
        else:
            score(model, data, args)


def train(
    model: ModelArguments,
    data: DataArguments,
    args: HierarchicalTrainingArguments,
    prepare: Prepare,
) -> None:
    """Train, measure and publish a model. All files go to ``--output_dir``."""
    requested = args.resume_from_checkpoint
    resume_from = resume.find_checkpoint(requested, args.output_dir) if requested else None
    trainer = prepare(build_trainer(model, data, args, resume_from))
    trainer.train(resume_from)
    epochs = trainer.best_epoch, trainer.state.epoch
    logger.info("best epoch: %.4g of %.4g; next:\n%s", *epochs, NEXT.format(args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub()


def build_trainer(
    model: ModelArguments,
    data: DataArguments,
    args: HierarchicalTrainingArguments,
    resume_from: str | None = None,
) -> HierarchicalTrainer:
    """Read the rows and build the model that a command line names."""
    set_seed(args.seed)
    model, stored, rows = read_splits(model, data, args, resume_from)
    if "train" not in rows.splits and data.taxonomy is None:
        sources = "--train_file, --data_path or --dataset_name"
        raise InputError(
            f"no training rows: give {sources}, or --taxonomy for new classes, or --do_train false"
        )
    if args.teacher is not None:
        rows = teach(args.teacher, data, rows)
    renamed = read_class_names(data.renamed_nodes, "--renamed_nodes")
    check_new_classes(rows, stored, renamed, args.teacher)
    trains = takes_steps(args, rows.splits)
    built = build_model(model, rows.taxonomy, args.seed, rows.problem_type, renamed, trains)
    return HierarchicalTrainer(built, args, data=rows, max_length=data.max_length)


def read_splits(
    model: ModelArguments,
    data: DataArguments,
    args: HierarchicalTrainingArguments,
    resume_from: str | None = None,
) -> tuple[ModelArguments, HierarchicalConfig | None, LabelledSplits]:
    """Read the rows, map their labels to nodes, and split them.

    Returns:
        The arguments of the initial model, at one commit of the Hub. Its configuration, if it is a
        checkpoint. The rows.
    """
    source = model.model_name_or_path
    with args.main_process_first(desc="reading the data"):
        # before the Hub is asked for a checkpoint's taxonomy
        rows = read_sources(data, bool(args.do_train))
        model, folder = pin_model(model)
        stored = read_config(folder) if is_checkpoint(folder) else None
        # the form is the checkpoint's
        if stored and rows.rows.empty and data.problem_type is None:
            data = dataclasses.replace(data, problem_type=stored.problem_type)
            rows = read_sources(data, bool(args.do_train))
        earlier = resume.read_earlier_texts(folder, resume_from, args.teacher)
        splits = split_rows(rows, data, stored.tree if stored else None, args.seed, earlier)
    if stored and stored.problem_type != splits.problem_type:
        theirs = stored.problem_type
        ours = splits.problem_type
        raise InputError(
            f"{source} is a checkpoint for {theirs}, the data are for {ours} (--problem_type)"
        )
    if data.renamed_nodes and stored is None:
        raise InputError(f"--renamed_nodes is for the nodes of a checkpoint, which {source} is not")
    return model, stored, splits


def check_new_classes(
    data: LabelledSplits,
    stored: HierarchicalConfig | None,
    renamed: dict[str, str],
    teacher: str | None,
) -> None:
    """Raise InputError if classes without training rows cannot be set from what is given."""
    known = {}
    if stored is not None:
        with as_input_error("--renamed_nodes"):
            known = data.taxonomy.known_nodes(stored.tree, renamed)
    if data.unlabelled and known and teacher is None:
        raise InputError(
            "--unlabelled_file without --teacher is for a new classifier, and a checkpoint "
            "has heads"
        )
    decisions = build_decisions(data.taxonomy, data.problem_type)
    if not (known or data.unlabelled or "train" in data.splits or decisions.scores_are_relative):
        raise InputError(
            "several labels without training rows need --unlabelled_file: names do not tell "
            "how many labels a text has"
        )


def score(model: ModelArguments, data: DataArguments, args: HierarchicalTrainingArguments) -> None:
    """Score a finished checkpoint on labelled files, loaded as a user loads it."""
    # ── Data ──────────────────────────────────────────────────────────────────────────────────────
    source = model.model_name_or_path
    model, stored, rows = read_splits(model, data, args)
    if stored is None:
        raise InputError(f"--do_train false needs a trained checkpoint, which {source} is not")
    if rows.taxonomy != stored.tree:
        raise InputError(
            "--taxonomy differs from the checkpoint's taxonomy; leave it out to score a checkpoint"
        )
    if not set(rows.splits) & {"validation", "test"}:
        left_out = sum(rows.report["trained_before"]["left_out"].values())
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

    # ── Score ─────────────────────────────────────────────────────────────────────────────────────
    loaded, tokenizer = load_scored(fetch_model(model).model_name_or_path, args.device)
    tokenizer.model_max_length = data.max_length or tokenizer.model_max_length
    args.bf16 = args.fp16 = args.push_to_hub = False
    trainer = HierarchicalTrainer(loaded, args, processing_class=tokenizer, data=rows)
    trainer.score_splits()

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────
    if args.should_save:
        output = Path(args.output_dir)
        delete_scores(output)
        write_json(output / "data_report.json", trainer.report)
        trainer.write_scores()
        logger.info("metrics and plots are in %s", output)
    log_metrics(trainer.form, trainer.scores, trainer.scored)


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

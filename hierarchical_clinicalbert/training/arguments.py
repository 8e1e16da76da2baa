"""Define, parse and check the flags of train.py."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import HubStrategy

from configuration_hierarchical import DEFAULT_ENCODER, DEFAULT_ENCODER_REVISION
from hierarchical_clinicalbert.checkpoint_files import is_local
from hierarchical_clinicalbert.data.arguments import DataArguments, flag
from hierarchical_clinicalbert.errors import ArgumentParser, InputError, as_input_error
from hierarchical_clinicalbert.evaluation.forms import Form, direction_of
from hierarchical_clinicalbert.evaluation.metrics import of_all_levels
from hierarchical_clinicalbert.machine import has_bf16
from hierarchical_clinicalbert.training.recipe import insert_recipe, nearest
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

# training rows per leaf, on average, below which heads start from prototypes, and phrases count in
# the lexical head
FEW_ROWS = 32


# groups of flags, see `flag`
model_flag = partial(flag, group="model")
heads_flag = partial(flag, group="heads")
training_flag = partial(flag, group="training")
publishing_flag = partial(flag, group="publishing")
# of transformers: another value would change the scored rows, the scored model, or how a run
# resumes
fixed_flag = partial(flag, help=argparse.SUPPRESS, group="training", fixed=True)


# ruff: noqa: RUF009 - `flag` returns a dataclass field
@dataclass
class ModelArguments:
    model_name_or_path: str = model_flag(
        DEFAULT_ENCODER, "Encoder, or checkpoint to continue: a Hub id or a folder."
    )
    model_revision: str | None = model_flag(
        None, "Commit, tag or branch on the Hub. The checkpoint records the commit."
    )
    quantization: Literal["none", "8bit", "4bit"] | None = model_flag(
        None, "Precision of the frozen weights. Default: 4bit with an adapter, else none."
    )
    tuning: Literal["lora", "full"] | None = model_flag(
        None,
        "lora trains an adapter and the heads, full trains every weight. Default: the "
        "checkpoint's, else lora.",
    )
    lora_r: int = model_flag(16, "Rank of the adapter.", interval="[1, inf)")
    lora_alpha: int = model_flag(
        32, "The adapter's output is scaled by lora_alpha / lora_r.", interval="[1, inf)"
    )
    pooling: Literal["mean", "cls", "label_attention", "family_attention"] | None = heads_flag(
        None,
        "Mean of the token vectors, the first one, or means weighted for each node or family of "
        "leaves. Default: the checkpoint's, else mean.",
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path == DEFAULT_ENCODER and self.model_revision is None:
            self.model_revision = DEFAULT_ENCODER_REVISION


@dataclass
class HierarchicalTrainingArguments(TrainingArguments):
    """TrainingArguments of transformers, with defaults for this task, and settings of the loss and
    the heads.
    """

    output_dir: str = training_flag("results", "Folder for the checkpoint.")
    resume_from_checkpoint: str | None = training_flag(
        None, "Checkpoint to resume from, or auto: the last one in --output_dir."
    )
    overwrite_output_dir: bool = training_flag(
        False, "Overwrite the folder's run. Training deletes its checkpoints."
    )
    do_train: bool | None = training_flag(
        None, "Train. Default: yes, unless --do_eval or --do_predict is given."
    )
    do_eval: bool | None = training_flag(
        None, "Score the validation rows at the end; calibrate after training. Default: yes."
    )
    do_predict: bool | None = training_flag(None, "Score the test rows. Default: yes.")
    num_train_epochs: float = training_flag(
        5.0, "Passes over the training rows. 0: new heads, no training.", interval="[0, inf)"
    )
    max_steps: int = training_flag(-1, "Steps, in place of --num_train_epochs.")
    per_device_train_batch_size: int = training_flag(
        16, "Texts per device and step.", interval="[1, inf)"
    )
    per_device_eval_batch_size: int = training_flag(
        32, "Texts per device and step in evaluation.", interval="[1, inf)"
    )
    gradient_accumulation_steps: int = training_flag(1, "Batches of a step.", interval="[1, inf)")
    activation_checkpointing: bool | None = training_flag(
        None, "Compute activations twice, to save memory."
    )
    learning_rate: float = training_flag(
        6e-4, "Peak learning rate of the encoder or its adapter.", interval="(0, inf)"
    )
    heads_learning_rate: float | None = heads_flag(
        None, "Peak learning rate of the heads. Default: --learning_rate.", interval="(0, inf)"
    )
    heads_init: Literal["prototypes", "random"] | None = heads_flag(
        None,
        f"Initial heads. Default: prototypes, of texts and names, below {FEW_ROWS} rows a class.",
    )
    contrastive_steps: int = heads_flag(
        0, "Steps of contrastive training, before heads are initialised.", interval="[0, inf)"
    )
    lexical_head: bool | None = heads_flag(
        None, "Linear classifier over the tokens. Default: true up to a size, see the log."
    )
    weight_decay: float = training_flag(0.01, "Weight decay.", interval="[0, inf)")
    max_grad_norm: float = training_flag(
        1.0, "Largest norm of the gradient. 0: any.", interval="[0, inf)"
    )
    label_smoothing_factor: float = training_flag(0.0, "Label smoothing.", interval="[0, 1)")
    focal_gamma: float = training_flag(
        0.0, "Exponent of (1 - p) in the focal loss. 0: cross-entropy.", interval="[0, inf)"
    )
    class_weighting: Literal["none", "balanced"] = training_flag(
        "none", "balanced: more weight for the rarer outcomes of each decision."
    )
    consistency: float = training_flag(
        0.0, "Weight of the loss between two views of a text. 0: whole texts.", interval="[0, inf)"
    )
    teacher: str | None = training_flag(
        None, "Output of predict.py --probabilities, or a file with columns text and probabilities."
    )
    teacher_weight: float = training_flag(
        0.5, "Share of the teacher in the loss. The rest is the labels'.", interval="[0, 1]"
    )
    teacher_temperature: float = training_flag(
        2.0, "Divisor of the scores of both in that share.", interval="(0, inf)"
    )
    warmup_steps: float = training_flag(
        0.1, "Number of warm-up steps, or, below 1, their share of all steps."
    )
    lr_scheduler_type: str = training_flag("cosine", "Schedule of the learning rate.")
    eval_strategy: str = training_flag("epoch", "When to evaluate.")
    eval_steps: float | None = training_flag(
        None, "Steps between evaluations, or, below 1, their share of all."
    )
    save_strategy: str = training_flag("epoch", "When to save.")
    save_steps: float = training_flag(500, "Steps between saves, or, below 1, their share of all.")
    # the Trainer's filter waits for the GPU at every step, and logs earlier losses in place of one
    # that is not finite
    logging_nan_inf_filter: bool = training_flag(False, argparse.SUPPRESS)
    save_total_limit: int | None = training_flag(
        2, "Number of checkpoints to keep.", interval="[1, inf)"
    )
    load_best_model_at_end: bool = training_flag(True, "Load the best checkpoint at the end.")
    metric_for_best_model: str | None = training_flag(
        "macro_f1", "Metric that selects the best checkpoint."
    )
    early_stopping_patience: int | None = training_flag(
        2,
        (
            "Stop after this many evaluations without improvement, with "
            "--load_best_model_at_end. 0: never."
        ),
        interval="[0, inf)",
    )
    train_sampling_strategy: str = training_flag(
        "group_by_length",
        "Order of the training rows. group_by_length reduces padding.",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )
    report_to: list[str] = training_flag(["none"], "Services to log to: tensorboard, trackio, ...")
    title: str | None = publishing_flag(
        None, "Title of the card and the page. Default: from the names of the roots."
    )
    medical: bool | None = publishing_flag(
        None, "Warn against use for diagnosis. Default: with the default taxonomy."
    )
    project: str | None = training_flag(
        None, "Project that trackio logs to. Default: the name of --output_dir."
    )
    run_name: str | None = training_flag(
        None, "Name of the run in these services. Default: the name of --output_dir."
    )
    logging_steps: float = training_flag(
        10, "Steps between log lines, or, below 1, their share of all."
    )
    bf16: bool | None = training_flag(None, "bfloat16 autocast. Default: true if native.")
    seed: int = training_flag(42, "Seed.", interval="[0, 4294967296)")
    data_seed: int | None = training_flag(
        None, "Seed of the order of rows. Default: --seed.", interval="[0, 4294967296)"
    )
    dataloader_num_workers: int = training_flag(
        0, "Processes that load batches.", interval="[0, inf)"
    )
    push_to_hub: bool = publishing_flag(False, "Push the model at each save.")
    hub_model_id: str | None = publishing_flag(
        None, "Repository on the Hub. Default: the name of --output_dir."
    )
    hub_private_repo: bool | None = publishing_flag(None, "Create a private repository.")
    hub_strategy: HubStrategy | str = publishing_flag(
        "every_save", "When to push: end or every_save."
    )

    batch_eval_metrics: bool = fixed_flag(False)
    bf16_full_eval: bool = fixed_flag(False)
    dataloader_drop_last: bool = fixed_flag(False)
    dataloader_persistent_workers: bool = fixed_flag(False)
    enable_jit_checkpoint: bool = fixed_flag(False)
    eval_do_concat_batches: bool = fixed_flag(True)
    fp16_full_eval: bool = fixed_flag(False)
    label_names: list[str] | None = fixed_flag(None)
    prediction_loss_only: bool = fixed_flag(False)
    remove_unused_columns: bool = fixed_flag(False)
    restore_callback_states_from_checkpoint: bool = fixed_flag(True)

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = has_bf16(self.use_cpu) and not self.fp16
            self.fp16 = self.fp16 or (torch.cuda.is_available() and not (self.use_cpu or self.bf16))
        if self.greater_is_better is None and direction_of(self.metric_for_best_model or "") < 0:
            # transformers assumes that a metric other than a loss is better if greater
            self.greater_is_better = False
        folder = Path(self.output_dir).resolve().name
        self.run_name = self.run_name or folder
        self.project = self.project or folder
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a bar fills a log file
        do_eval = self.do_eval
        super().__post_init__()
        # transformers sets do_eval if it evaluates during training; here it asks for scores at the
        # end
        self.do_eval = do_eval
        if self.do_train is None:
            self.do_train = not (self.do_eval or self.do_predict)
        # the Trainer would otherwise prefer the precision of accelerate launch
        self.mixed_precision = "no" if self.precision == "fp32" else self.precision

    @property
    def precision(self) -> str:
        """Type of matrix products: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


def has_few_rows(count: int, tree: Taxonomy) -> bool:
    """Whether a number of training rows is so low that names of classes help, see `FEW_ROWS`."""
    return count < FEW_ROWS * tree.num_leaves


class Arguments(NamedTuple):
    model: ModelArguments
    data: DataArguments
    training: HierarchicalTrainingArguments


# they follow a metric of evaluation
METRIC_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def parse(argv: list[str]) -> Arguments:
    """Parse ``[recipe.yaml] [--flag value …]``, or raise InputError."""
    # ── Parser: a bare switch means true ──────────────────────────────────────────────────────────
    classes = [*Arguments.__annotations__.values()]
    usage = "train.py [recipe.yaml] [--flag value ...]"
    parser = Parser(
        dataclass_types=classes, prog="train.py", usage=usage, formatter_class=HelpFormatter
    )
    shown = "show all flags of transformers' TrainingArguments, too"
    parser.add_argument("--help-all", action="help", help=shown, group="options")
    inherited = (
        TrainingArguments.__annotations__.keys()
        - HierarchicalTrainingArguments.__annotations__.keys()
    )
    hidden = set() if "--help-all" in argv else inherited
    for action in parser._actions:
        if action.type is string_to_bool:
            action.nargs = "?"
            action.const = True
        # the other half of a switch
        if action.dest in hidden or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
        elif action.dest in inherited:
            action.help = (action.help or "").partition(". ")[0]

    # ── Arguments: flags override the recipe ──────────────────────────────────────────────────────
    if argv and not argv[0].startswith("-"):
        argv = insert_recipe(argv, {action.dest: action for action in parser._actions})
    for word in argv:
        name = word.split("=")[0]
        if word.startswith("--") and name not in parser._option_string_actions:
            raise InputError(f"unknown flag {name}; {nearest(name, parser._option_string_actions)}")
    with as_input_error("cannot use these flags"):
        *parsed, rest = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    if rest:
        raise InputError(f"unexpected words on the command line: {' '.join(rest)}")

    # ── Checks, then defaults that depend on other flags ──────────────────────────────────────────
    arguments = Arguments(*parsed)
    check_values(arguments)
    model, data, args = arguments
    if is_local(model.model_name_or_path) and model.model_revision is not None:
        problem = f"does not apply to the folder {model.model_name_or_path}"
        raise InputError(f"--model_revision {model.model_revision} {problem}")
    if not args.do_train:
        # without training, the rows of a training file are not scored
        data.validation_size = data.test_size = 0
    elif not args.num_train_epochs:  # all rows are for the new heads
        data.validation_size = data.validation_size or 0
        data.test_size = data.test_size or 0
    return arguments


# what a flag of this type takes, in its help
VALUES = {int: "INTEGER", float: "NUMBER", string_to_bool: "true|false"}


class Parser(HfArgumentParser, ArgumentParser):
    """A parser of dataclasses whose errors are one line, and whose help is in groups, see
    `flag`.
    """

    def __init__(self, *args: Any, **settings: Any):
        self.groups: dict[str, str] = {}  # of the help, by the name of a flag
        super().__init__(*args, add_help=False, **settings)
        self.add_argument(
            "-h", "--help", action="help", help="show this help message and exit", group="options"
        )

    def add_argument(
        self,
        *names: str,
        group: str | None = None,
        interval: str | None = None,
        fixed: bool = False,
        **settings: Any,
    ) -> argparse.Action:
        """Add an argument of a field.

        `check_values` reads its interval, and whether it is fixed.
        """
        action = super().add_argument(*names, **settings)
        inherited_group = "publishing" if action.dest.startswith("hub_") else "training"
        self.groups[action.dest] = group or inherited_group
        return action

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        for group in ("options", "data", "model", "heads", "training", "publishing"):
            formatter.start_section(group)
            formatter.add_arguments(
                [action for action in self._actions if self.groups[action.dest] == group]
            )
            formatter.end_section()
        return formatter.format_help()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show each flag once, and its default unless that is None: the help of such a flag says what
    it means.
    """

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = "|".join(action.choices) if action.choices else VALUES.get(action.type, "TEXT")
        return f"{action.option_strings[0]} {values if action.nargs != 0 else ''}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def check_values(arguments: Arguments) -> None:
    """Raise InputError for a value that would fail only after hours, or be silently misread."""
    # ── Single values ─────────────────────────────────────────────────────────────────────────────
    for part in arguments:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name, None)
            interval = field.metadata.get("interval")
            if interval is not None and value is not None:
                check_interval(field.name, value, interval)
            if field.metadata.get("fixed") and value not in (field.default, None):
                raise InputError(
                    f"--{field.name} is not supported: it would change the scores, or how a "
                    "run resumes"
                )

    # ── Other problems, and whether they occur ────────────────────────────────────────────────────
    _, data, args = arguments
    by_steps = args.eval_strategy == args.save_strategy == "steps"
    columns = data.label_column or []
    delimiter = data.label_delimiter
    without_rows = not (data.train_file or data.data_path or data.dataset_name)
    # accelerate would not shard on CPUs, and not say so
    fsdp = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    problems = {
        (
            "--load_best_model_at_end needs a save at every evaluation: give the same "
            "--eval_steps and --save_steps"
        ): (args.load_best_model_at_end and by_steps and args.eval_steps != args.save_steps),
        "--lr_scheduler_type must not follow a metric: give another": args.lr_scheduler_type
        in METRIC_SCHEDULERS,
        "--max_steps must be at least 1; leave it out to train for --num_train_epochs": (
            args.max_steps == 0
        ),
        "--num_train_epochs 0 takes no steps: leave out --max_steps and --resume_from_checkpoint": (
            not args.num_train_epochs
            and (args.max_steps > 0 or args.resume_from_checkpoint is not None)
        ),
        (
            "--teacher teaches in training steps: leave it out, or train with "
            "--num_train_epochs above 0"
        ): (args.teacher is not None and not (args.do_train and args.num_train_epochs)),
        "--unlabelled_file needs --teacher, or classes without training rows": (
            args.teacher is None
            and data.unlabelled_file is not None
            and not (args.do_train and without_rows)
        ),
        "--do_train false renames no nodes: leave out --renamed_nodes": (
            data.renamed_nodes is not None and not args.do_train
        ),
        "--label_delimiter must not be empty": delimiter == "",
        "--label_delimiter needs one --label_column": delimiter is not None and len(columns) > 1,
        "FSDP needs GPUs; on CPUs use recipes/accelerate/ddp.yaml": fsdp
        and args.device.type == "cpu",
    }
    for problem, occurs in problems.items():
        if occurs:
            raise InputError(problem)


def check_interval(name: str, value: float, interval: str) -> None:
    """Raise InputError for a value of a flag that is not in an interval, such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    # that the interval includes
    bounds = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
    if not (low < value < high or value in bounds):
        lower = "at least" if interval[0] == "[" else "more than"
        upper = (
            ""
            if high == float("inf")
            else f" and {'at most' if high in bounds else 'below'} {high:,.0f}"
        )
        raise InputError(f"--{name} must be {lower} {low:,.0f}{upper}, not {value}")


def takes_steps(args: HierarchicalTrainingArguments, splits: Container[str]) -> bool:
    """Return whether a run takes training steps; else it only sets the heads of new nodes."""
    return "train" in splits and args.num_train_epochs > 0


def fit_to_data(
    args: HierarchicalTrainingArguments, splits: Mapping[str, Any], form: Form
) -> HierarchicalTrainingArguments:
    """Return the arguments for tokenized splits. Without training rows, there are no steps
    (``num_train_epochs`` 0); without validation rows, training is not evaluated.

    InputError: the splits do not have what the arguments need.
    """
    trains = takes_steps(args, splits)
    changes: dict[str, Any] = {}
    if not trains:
        changes = {"num_train_epochs": 0.0, "max_steps": -1, "save_strategy": "no"}
    elif "validation" not in splits:
        logger.info("no validation rows: early stopping is off, and the last weights are kept")
        changes = {"save_strategy": "epoch"} if args.save_strategy == "best" else {}
    elif args.load_best_model_at_end and args.eval_strategy == "no":
        raise InputError(
            "--eval_strategy no selects no best checkpoint: also give "
            "--load_best_model_at_end false"
        )
    if not trains or "validation" not in splits:
        changes |= {"eval_strategy": "no", "load_best_model_at_end": False, "eval_on_start": False}
    fitted = dataclasses.replace(args, **changes)
    if trains and (fitted.load_best_model_at_end or fitted.save_strategy == "best"):
        check_best_metric(
            fitted.metric_for_best_model or "loss", form, splits["validation"]["labels"][:]
        )
        return fitted
    # else the Trainer looks for the metric in each evaluation; the log shows the lowest loss as the
    # best
    unset: dict[str, Any] = dict.fromkeys(("metric_for_best_model", "greater_is_better"))
    return dataclasses.replace(fitted, **unset)


def check_best_metric(name: str, form: Form, nodes: list[list[int]]) -> None:
    """Raise InputError unless rows with these labels have the metric ``name``, and it can select a
    checkpoint.
    """
    labels = form.decisions.targets(nodes).numpy()
    # no node is probable
    measured = form.measure(np.full((len(nodes), form.decisions.num_classes), -9.0), labels)
    metrics = of_all_levels(form.metrics, form.tree.depth)
    available = ["loss", *(metric for metric in measured if metrics[metric].direction)]
    if name.removeprefix("eval_") not in available:
        problem = f"--metric_for_best_model {name} is not measured on these validation rows"
        raise InputError(f"{problem}; it is one of {', '.join(available)}")

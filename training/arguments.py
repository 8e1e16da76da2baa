"""Define, parse and check the flags of train.py.

Worth knowing:

1. A recipe is converted to command-line words, which are parsed before the other words: see `training.recipe`.
2. An unknown flag is an error that names the nearest known one.
3. The precision depends on the machine if neither ``--bf16`` nor ``--fp16`` is given.
"""

import difflib
import inspect
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from transformers import EvalPrediction, HfArgumentParser, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations

from configuration_hierarchical import DEFAULT_ENCODER, DEFAULT_ENCODER_REVISION
from errors import InputError, is_fault, one_line
from taxonomy_hierarchical import Taxonomy
from training.precision import has_bf16
from training.recipe import recipe_words, replaced_sources

if TYPE_CHECKING:
    from training.splits import LabelledSplits

logger = logging.getLogger(__name__)

ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]
FEW_ROWS = 32  # training rows a class, on average, below which heads are initialised from the class names


# ruff: noqa: RUF009 - `flag` returns a dataclass field
def flag(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field with the metadata that HfArgumentParser reads. Lists are copied for each instance."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Flags of the encoder, its quantization and the trained weights."""

    model_name_or_path: str = flag(
        DEFAULT_ENCODER, "Encoder, or checkpoint of this project to continue: a Hub id or a folder."
    )
    model_revision: str | None = flag(
        None, "Commit, tag or branch of the model on the Hub. The checkpoint records the commit."
    )
    quantization: Literal["none", "8bit", "4bit"] | None = flag(
        None, "Quantization of the frozen encoder during training. Default: 4bit with --tuning lora, else none."
    )
    tuning: Literal["lora", "full"] = flag("lora", "lora trains an adapter and the heads, full trains every weight.")
    lora_r: int = flag(16, "Rank of the adapter.")
    lora_alpha: int = flag(32, "The adapter's output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = flag(0.0, "Dropout on the adapter's input.")
    lora_target_modules: list[str] = flag(
        ["all-linear"], "Layers with an adapter: all-linear, or the names of linear layers, such as query value."
    )
    pooling: Literal["mean", "cls"] = flag(
        "mean", "Vector of a text: the mean of its token vectors, or the vector of its first token."
    )
    heads_init: Literal["label_names", "random"] | None = flag(
        None,
        "Initialise new heads from the encoder's embeddings of the class names, or at random. Default: label_names "
        f"with fewer than {FEW_ROWS} training rows per class, if the names match the texts; else random.",
    )
    lexical_head: bool | None = flag(
        None,
        "Fit a linear classifier on the tokens, beside the encoder. Default: true if it has at most 2^24 weights.",
    )
    cache_dir: str | None = flag(None, "Folder for downloads.")


@dataclass
class DataArguments:
    """Flags of the data: files, columns, taxonomy, splits, truncation."""

    dataset_name: str | None = flag(None, "Data set on the Hub.")
    dataset_revision: str | None = flag(None, "Commit, tag or branch of the data set.")
    data_path: str | None = flag(
        None, "File (.csv .tsv .json .jsonl .parquet) to split, or folder saved by `datasets`."
    )
    train_file: str | None = flag(None, "File with the training rows.")
    validation_file: str | None = flag(None, "File with the rows that select the checkpoint and calibrate it.")
    test_file: str | None = flag(None, "File with the rows for the final scores.")
    text_column: str | None = flag(None, "Column with the texts. Default: chosen by its name.")
    label_column: list[str] | None = flag(
        None, "Column with the labels, or one column per level, from the root down. Default: chosen by its name."
    )
    taxonomy: str | None = flag(
        None,
        "Nested .yaml or .json file, or .csv file of parent,child rows. Default: the five classes of the Medical "
        "Abstracts corpus if they contain all labels, else the paths in the labels.",
    )
    label_separator: str = flag("/", "Separator between the names in the path of a label.")
    class_names: str | None = flag(
        None, "Names of coded labels: .csv or .tsv file with the columns code and name, or JSON object."
    )
    max_length: int = flag(
        512, "Texts are truncated to this number of tokens, or to the encoder's limit if it is smaller."
    )
    validation_size: float = flag(0.1, "Share of the training texts for validation, if no validation rows are given.")
    test_size: float = flag(0.1, "Share of the texts for the test, if --data_path is split.")


@dataclass
class LossArguments:
    """Flags of `training.losses` and `training.views`. The loss also uses ``--label_smoothing_factor``."""

    focal_gamma: float = flag(0.0, "Exponent of (1 - p) in the focal loss. 0: cross-entropy.")
    class_weighting: Literal["none", "balanced"] = flag(
        "none", "Weights of sibling classes. balanced: inversely proportional to their training rows."
    )
    level_weights: list[float] = flag(
        [1.0], "Weights of the decisions at level 1, 2, …; the last one applies to all deeper levels."
    )
    consistency: float = flag(
        0.0,
        "Train on two halves of each text, with this weight of their disagreement in the loss. 0: on whole texts.",
    )


@dataclass
class HierarchicalTrainingArguments(TrainingArguments):
    """TrainingArguments of transformers, with defaults for this task."""

    output_dir: str = flag("results", "Folder for the checkpoint.")
    overwrite_output_dir: bool = flag(
        False,
        "Write into a folder that already holds a run. Training deletes the checkpoints and scores of that run.",
    )
    do_train: bool | None = flag(None, "Train. Default: yes, unless --do_eval or --do_predict is given.")
    do_eval: bool | None = flag(None, "Score the validation rows at the end, and calibrate on them.")
    do_predict: bool | None = flag(None, "Score the test rows.")
    num_train_epochs: float = flag(5.0, "Number of passes over the training rows.")
    per_device_train_batch_size: int = flag(16, "Texts per device and step.")
    per_device_eval_batch_size: int = flag(32, "Texts per device and step in evaluation.")
    learning_rate: float = flag(6e-4, "Peak learning rate of the encoder or its adapter.")
    heads_learning_rate: float | None = flag(None, "Peak learning rate of the heads. Default: --learning_rate.")
    weight_decay: float = flag(0.01, "Weight decay.")
    warmup_steps: float = flag(0.1, "Number of warm-up steps, or, below 1, their share of all steps.")
    lr_scheduler_type: str = flag("cosine", "Schedule of the learning rate.")
    eval_strategy: str = flag("epoch", "When to evaluate.")
    save_strategy: str = flag("epoch", "When to save.")
    # the Trainer's filter would log the mean of earlier losses in place of a loss that is not finite
    logging_nan_inf_filter: bool = flag(False, "No effect: a loss that is not finite ends the run.")
    save_total_limit: int | None = flag(2, "Number of checkpoints to keep.")
    load_best_model_at_end: bool = flag(True, "Load the best checkpoint at the end.")
    metric_for_best_model: str = flag("macro_f1", "Metric that selects the best checkpoint.")
    restore_callback_states_from_checkpoint: bool = flag(
        True, "Resume with the saved count of evaluations without improvement."
    )
    early_stopping_patience: int | None = flag(
        2, "Stop after this number of evaluations without improvement. 0: never."
    )
    train_sampling_strategy: str = flag(
        "group_by_length",
        "Order of the training rows. group_by_length batches texts of similar length, to reduce padding.",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )
    report_to: list[str] = flag(["none"], "Services to log to: tensorboard, trackio, …")
    logging_steps: float = flag(10, "Number of steps between log lines, or, below 1, their share of all steps.")
    bf16: bool | None = flag(
        None,
        "bfloat16 autocast. Default: the precision of accelerate launch, else true if the machine has bfloat16.",
    )

    def __post_init__(self):
        if not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()):
            self.use_cpu = True
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch --mixed_precision
        if launcher not in ("no", "fp16", "bf16"):
            raise InputError(
                f"accelerate launch has --mixed_precision {launcher}, which is not supported: use no, bf16 or fp16"
            )
        if self.bf16 is None:
            precision = launcher
            if precision == "no" and has_bf16(self.use_cpu):
                precision = "bf16"
            elif precision == "no" and torch.cuda.is_available() and not self.use_cpu:
                precision = "fp16"
            self.bf16 = precision == "bf16" and not self.fp16
            self.fp16 = self.fp16 or precision == "fp16"
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("ece"):
            self.greater_is_better = False  # transformers assumes that a metric other than a loss is better if greater
        do_eval = self.do_eval
        super().__post_init__()
        # transformers sets do_eval if it evaluates during training; here it asks for scores at the end
        self.do_eval = do_eval
        if self.do_train is None:
            self.do_train = not (self.do_eval or self.do_predict)
        # the Trainer would otherwise prefer the launcher's precision to an explicit --bf16 false
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"

    @property
    def precision(self) -> str:
        """Type of matrix products: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


class Arguments(NamedTuple):
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    training: HierarchicalTrainingArguments


# Intervals: a bracket includes the bound, a parenthesis excludes it.
RANGES = {
    **dict.fromkeys(("lora_r", "lora_alpha", "per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), "[1, inf)"),
    **dict.fromkeys(("lora_dropout", "label_smoothing_factor"), "[0, 1)"),
    **dict.fromkeys(("learning_rate", "heads_learning_rate", "num_train_epochs"), "(0, inf)"),
    **dict.fromkeys(("focal_gamma", "consistency", "weight_decay", "max_grad_norm"), "[0, inf)"),
    **dict.fromkeys(("early_stopping_patience", "dataloader_num_workers"), "[0, inf)"),
    "save_total_limit": "[1, inf)",
    **dict.fromkeys(("seed", "data_seed"), "[0, 4294967296)"),
    "max_length": "[8, inf)",
}
# Flags of transformers that would drop rows from the scores, change the scored model, or remove the scores.
NO_USE = {
    "batch_eval_metrics": False,
    "bf16_full_eval": False,
    "dataloader_drop_last": False,
    "eval_do_concat_batches": True,
    "fp16_full_eval": False,
    "label_names": None,
    "prediction_loss_only": False,
    "remove_unused_columns": True,
}


def parse(argv: list[str]) -> Arguments:
    """Parse ``[recipe.yaml] [--flag value …]``.

    Raises:
        InputError: a flag is unknown, a value is invalid, or flags contradict each other.
    """
    # ── Parser: a bare switch means true, an error is one line ───────────────────────────────────────────────────────
    parser = HfArgumentParser(
        [*Arguments.__annotations__.values()],
        prog="train.py",
        usage="train.py [recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.type is string_to_bool:  # a bare --do_predict means true even if the default is None
            action.nargs, action.const = "?", True
    parser.error = exit_parser  # argparse prints the usage of all 150 flags
    takes_list = {option: action.nargs in ("+", "*") for action in parser._actions for option in action.option_strings}

    # ── Words: flags after the recipe override it ────────────────────────────────────────────────────────────────────
    if argv and not argv[0].startswith("-"):
        flags = {name.removeprefix("--"): is_list for name, is_list in takes_list.items() if name.startswith("--")}
        argv = recipe_words(argv[0], flags, replaced_sources(argv)) + argv[1:]
    for word in argv:
        name = word.split("=")[0]
        if word.startswith("--") and name not in takes_list:
            near = difflib.get_close_matches(name, takes_list, n=1)
            raise InputError(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        if is_fault(error):
            raise
        raise InputError(one_line(error)) from error
    if rest:
        raise InputError(f"unexpected words on the command line: {' '.join(rest)}")

    # ── Checks, then defaults that depend on other flags ─────────────────────────────────────────────────────────────
    arguments = Arguments(*parsed)
    check_values(arguments)
    set_defaults(arguments)
    return arguments


def exit_parser(message: str) -> NoReturn:
    """Raise the message of argparse as an InputError, with one spelling of the flag."""
    raise InputError(re.sub(r"^argument (--\w+)(/--[\w-]+)?: ", r"\1: ", message))


def set_defaults(arguments: Arguments) -> None:
    """Set the defaults that depend on other flags."""
    model, data = arguments.model, arguments.data
    if model.quantization is None:
        model.quantization = "4bit" if model.tuning == "lora" else "none"
    if model.model_name_or_path == DEFAULT_ENCODER and model.model_revision is None:
        model.model_revision = DEFAULT_ENCODER_REVISION
    if not arguments.training.do_train:
        data.validation_size = data.test_size = 0  # without training, the rows of a training file are not scored


def check_values(arguments: Arguments) -> None:
    """Check values that would fail only after hours, or be silently misread.

    Raises:
        InputError: a value is not allowed.
    """
    model, _, loss, training = arguments
    check_ranges({name: value for part in arguments for name, value in vars(part).items()})
    if model.tuning == "full" and model.quantization not in (None, "none"):
        raise InputError(
            "--tuning full trains every weight, and quantized weights cannot be trained: use --quantization none"
        )
    if training.max_steps == 0 or training.max_steps < -1:
        raise InputError(
            f"--max_steps must be at least 1, or -1 to train for --num_train_epochs, not {training.max_steps}"
        )
    if training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "steps":
        evaluated, saved = training.eval_steps, training.save_steps
        if evaluated != saved:  # the best weights may not be saved
            raise InputError(
                f"--load_best_model_at_end needs a save at every evaluation: give the same --eval_steps and --save_steps, "
                f"not {evaluated:g} and {saved:g}, or --save_strategy best"
            )
    checkpoint_kwargs = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys()
    if unknown := set(training.gradient_checkpointing_kwargs or {}) - checkpoint_kwargs:
        raise InputError(f"--gradient_checkpointing_kwargs: torch's checkpoint has no argument {min(unknown)!r}")
    weights = loss.level_weights
    if not all(0 <= weight < float("inf") for weight in weights) or max(weights, default=0) == 0:
        raise InputError(f"--level_weights must be non-negative and not all zero, not {weights}")
    pairs = (training.optim_args or "").replace(" ", "").split(",")
    if malformed := [pair for pair in pairs if pair and pair.count("=") != 1]:
        raise InputError(f"--optim_args has {malformed[0]!r}: give name=value pairs, separated by commas")
    if DebugOption.UNDERFLOW_OVERFLOW in training.debug:
        raise InputError(
            "--debug underflow_overflow fails on an encoder's boolean masks: the detector of transformers needs numbers"
        )
    if not training.output_dir:
        raise InputError("--output_dir needs the name of a folder")
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in installed:
            raise InputError(
                f"--report_to {name}: no such package is installed; available: {', '.join(installed) or 'none'}"
            )
    if (training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and training.device.type == "cpu":
        raise InputError("FSDP needs GPUs; for processes on CPUs use recipes/accelerate/ddp.yaml")


def check_ranges(values: dict[str, Any]) -> None:
    """Check that values are in `RANGES`, and that the flags in `NO_USE` keep their defaults.

    Raises:
        InputError: names the flag and the value.
    """
    for name, interval in RANGES.items():
        low, high = map(float, interval[1:-1].split(","))
        value = values[name]
        if value is not None and not (low < value < high or (value == low and interval[0] == "[")):
            lower = "at least" if interval[0] == "[" else "more than"
            upper = "" if high == float("inf") else f" and below {high:,.0f}"
            raise InputError(f"--{name} must be {lower} {low:,.0f}{upper}, not {value}")
    for name, default in NO_USE.items():
        if values[name] not in (default, None):
            raise InputError(
                f"--{name} has no use here: every row is scored, in one pass, with its label and the unchanged model"
            )


def check_against_data(arguments: Arguments, data: "LabelledSplits", compute_metrics: ComputeMetrics) -> None:
    """Check flags against the data. Without validation rows, turn off evaluation during training.

    Raises:
        InputError: there are no training rows, no evaluation selects the best checkpoint, or all level weights are 0.
    """
    training, weights = arguments.training, arguments.loss.level_weights
    if "train" not in data.splits:
        raise InputError("no training rows: give --train_file, --data_path or --dataset_name, or --do_train false")
    if "validation" not in data.splits:
        logger.info("no validation rows: early stopping is off, and the last weights are kept")
        training.eval_strategy, training.load_best_model_at_end, training.eval_on_start = "no", False, False
    elif training.load_best_model_at_end and training.eval_strategy == "no":
        raise InputError(
            "--eval_strategy no cannot select the best checkpoint: also give --load_best_model_at_end false"
        )
    if training.load_best_model_at_end:
        labels = np.unique(data.splits["validation"]["label"][:])
        check_best_metric(training.metric_for_best_model, data.taxonomy, labels, compute_metrics)
    if not any(weights[: data.taxonomy.depth]):
        raise InputError(
            f"--level_weights {' '.join(map(str, weights))}: all levels have weight 0, since the "
            f"taxonomy has {data.taxonomy.depth} level{'s'[: data.taxonomy.depth > 1]}"
        )


def check_best_metric(name: str, taxonomy: Taxonomy, labels: np.ndarray, compute_metrics: ComputeMetrics) -> None:
    """Check that evaluation measures ``--metric_for_best_model``, and that it ranks models.

    Args:
        name: of the metric, with or without ``eval_``.
        labels: distinct labels of the validation rows.

    Raises:
        InputError: the metric is not available. The message lists those that are.
    """
    # the set of metrics depends on the levels of the labels, and on whether some are leaves
    examples = {(label < taxonomy.num_leaves, taxonomy.levels[label]): label for label in labels.tolist() if label >= 0}
    labels = np.array([*examples.values()], dtype=int)
    measured = compute_metrics(EvalPrediction(np.zeros((len(labels), taxonomy.num_leaves)), labels))
    available = ["loss", *(metric for metric in measured if not metric.endswith("_by_chance"))]
    if name.removeprefix("eval_") not in available:
        raise InputError(
            f"--metric_for_best_model {name} is not measured on these validation rows; it is one of {', '.join(available)}"
        )

"""The flags of train.py, and the checks of their values.

Worth knowing:

1. A recipe becomes command-line words, read before the rest of the command line: see `training.recipe`.
2. An unknown flag is an error that names the nearest known one.
3. Precision is chosen for the machine if neither ``--bf16`` nor ``--fp16`` is given.
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


@dataclass
class ModelArguments:
    """Which encoder, how it is stored in memory, and what of it is trained."""

    model_name_or_path: str = field(
        default=DEFAULT_ENCODER,
        metadata={"help": "Encoder, or a checkpoint of this project to continue: a Hub id or a folder."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of that repository; pinned to its commit."}
    )
    quantization: Literal["none", "8bit", "4bit"] | None = field(
        default=None,
        metadata={"help": "Storage of the frozen encoder during training. Default: 4bit with lora, none with full."},
    )
    tuning: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "Train a LoRA adapter and the heads, or every weight."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Linear layers that get an adapter: all-linear, or names such as query value."},
    )
    pooling: Literal["mean", "cls"] = field(
        default="mean", metadata={"help": "How token vectors become one vector: their mean, or the first token."}
    )
    heads_init: Literal["label_names", "random"] | None = field(
        default=None,
        metadata={
            "help": "How fresh heads are initialised: from the encoder's embeddings of the class names, or at random. Default: "
            f"label_names below {FEW_ROWS} training rows a class, if the names fit the texts."
        },
    )
    lexical_head: bool | None = field(
        default=None,
        metadata={
            "help": "A linear classifier over the tokens, beside the encoder. Default: if it has at most 2^24 weights."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})


@dataclass
class DataArguments:
    """Where the texts are, what their labels mean, how they are split and truncated."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its commit, tag or branch."})
    data_path: str | None = field(
        default=None,
        metadata={"help": "One file (.csv .tsv .json .jsonl .parquet) to be split, or a folder saved by `datasets`."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training rows."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows that select the checkpoint and calibrate it."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows for the final scores."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts. Default: found by name."})
    label_column: list[str] | None = field(
        default=None,
        metadata={"help": "Column of the labels, or several, from the root down. Default: found by name."},
    )
    taxonomy: str | None = field(
        default=None,
        metadata={"help": "Nested .yaml/.json or parent,child rows in .csv. Default: the five classes of the Medical "
                          "Abstracts corpus where they fit, else the paths found in the labels."},
    )  # fmt: skip
    label_separator: str = field(default="/", metadata={"help": "Separator between the names of a label's path."})
    class_names: str | None = field(
        default=None, metadata={"help": "Names of coded labels: a .csv file (code, name), or a JSON object."}
    )
    max_length: int = field(
        default=512, metadata={"help": "Tokens kept of a text; the encoder's limit if that is less."}
    )
    validation_size: float = field(
        default=0.1, metadata={"help": "Share of the rows, if no validation rows are given."}
    )
    test_size: float = field(default=0.1, metadata={"help": "Share of the rows, if one file is split."})


@dataclass
class LossArguments:
    """`training.losses.HierarchicalFocalLoss`, to which ``--label_smoothing_factor`` belongs too, and `training.views`."""

    focal_gamma: float = field(default=0.0, metadata={"help": "Exponent of (1 - p)."})
    class_weighting: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "Weights of the classes within a group of siblings."}
    )
    level_weights: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Weight of the decisions at level 1, 2, …; the last one serves all deeper levels."},
    )
    consistency: float = field(
        default=0.0,
        metadata={
            "help": "Train on two halves of each text; weight of their disagreement in the loss. 0: on whole texts."
        },
    )


@dataclass
class HierarchicalTrainingArguments(TrainingArguments):
    """The arguments of transformers, with defaults for this task."""

    output_dir: str = field(default="results", metadata={"help": "Where the checkpoint is written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output folder that already holds a checkpoint."}
    )
    do_train: bool | None = field(
        default=None, metadata={"help": "Train. Default: yes, unless --do_eval or --do_predict is given."}
    )
    do_eval: bool | None = field(
        default=None, metadata={"help": "Score the validation rows at the end, and calibrate on them."}
    )
    do_predict: bool | None = field(default=None, metadata={"help": "Score the test rows."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the training rows."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Texts a device and step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts a device and step of evaluation."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate of the encoder or its adapter."})
    heads_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the heads. Default: learning_rate."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or, below 1, their share."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save."})
    # its substitute for a loss that is not finite is the mean of earlier ones; the trainer stops instead
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No use here: a loss that is not finite ends the run."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str = field(default="macro_f1", metadata={"help": "What best means."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run keeps its count of evaluations without improvement."}
    )
    early_stopping_patience: int | None = field(
        default=2, metadata={"help": "Evaluations without improvement before stopping; 0 to never stop early."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Batches of texts of like length need little padding.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Where to log: tensorboard, trackio, …"}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast. Default: the launcher's precision, else bfloat16 if the machine has it."},
    )

    def __post_init__(self):
        if not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()):
            self.use_cpu = True
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch --mixed_precision
        if launcher not in ("no", "fp16", "bf16"):
            raise InputError(
                f"accelerate was told mixed precision {launcher}, which is not supported: tell it no, bf16 or fp16"
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
            self.greater_is_better = False  # a calibration error, which transformers does not know
        score_validation = self.do_eval
        super().__post_init__()
        # transformers turns it on for evaluations during training; here it stands for the scores at the end
        self.do_eval = score_validation
        if self.do_train is None:
            self.do_train = not (self.do_eval or self.do_predict)
        # what the launcher said is in the flags now; Trainer would otherwise prefer it to an explicit --bf16 false
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"

    @property
    def precision(self) -> str:
        """The type of matrix products: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


class Arguments(NamedTuple):
    """All flags of a run."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    training: HierarchicalTrainingArguments


# intervals: a bracket includes its end, a parenthesis does not
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
# flags of transformers that would leave rows out of the scores, change the scored model, or remove the scores
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
        InputError: an unknown flag, a bad value, flags that contradict each other.
    """
    # ── Parser: bare switches mean true, errors are one line ─────────────────────────────────────────────────────────
    parser = HfArgumentParser(
        [*Arguments.__annotations__.values()],
        prog="train.py",
        usage="train.py [recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.type is string_to_bool:  # so that a bare --do_predict means true, also if the default is None
            action.nargs, action.const = "?", True
    parser.error = exit_parser  # argparse would print its usage, some 150 flags of it
    known = {option: action.nargs in ("+", "*") for action in parser._actions for option in action.option_strings}

    # ── Words: recipe first, so that flags override it ───────────────────────────────────────────────────────────────
    if argv and not argv[0].startswith("-"):
        flags = {option.removeprefix("--"): several for option, several in known.items() if option.startswith("--")}
        argv = recipe_words(argv[0], flags, replaced_sources(argv)) + argv[1:]
    for word in argv:
        name = word.split("=")[0]
        if word.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
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
    """Raise argparse's message as an InputError, with one spelling of the flag instead of both."""
    raise InputError(re.sub(r"^argument (--\w+)(/--[\w-]+)?: ", r"\1: ", message))


def set_defaults(arguments: Arguments) -> None:
    """Set the defaults that depend on other flags."""
    model, data = arguments.model, arguments.data
    if model.quantization is None:
        model.quantization = "4bit" if model.tuning == "lora" else "none"
    if model.model_name_or_path == DEFAULT_ENCODER and model.model_revision is None:
        model.model_revision = DEFAULT_ENCODER_REVISION
    if not arguments.training.do_train:
        data.validation_size = data.test_size = 0  # a training file's rows are not scored


def check_values(arguments: Arguments) -> None:
    """Refuse values that would fail, or silently mean something else, after hours.

    Raises:
        InputError: names the flag, the value and what is allowed.
    """
    model, _, loss, training = arguments
    check_ranges({name: value for part in arguments for name, value in vars(part).items()})
    if model.tuning == "full" and model.quantization not in (None, "none"):
        raise InputError(
            "--tuning full trains every weight, which quantized ones do not allow: use --quantization none"
        )
    if training.max_steps == 0 or training.max_steps < -1:
        raise InputError(
            f"--max_steps must be at least 1, or -1 for as many as the epochs have, not {training.max_steps}"
        )
    if training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "steps":
        evaluated, saved = training.eval_steps, training.save_steps
        if evaluated != saved:  # the best may be one that was not saved
            raise InputError(
                f"--load_best_model_at_end needs what is evaluated to be saved: give the same --eval_steps and --save_steps, not "
                f"{evaluated:g} and {saved:g}, or --save_strategy best"
            )
    given = set(training.gradient_checkpointing_kwargs or {})
    if unknown := given - inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys():
        raise InputError(
            f"--gradient_checkpointing_kwargs has {min(unknown)!r}, which torch's checkpoint does not know"
        )
    weights = loss.level_weights
    if not all(0 <= weight < float("inf") for weight in weights) or max(weights, default=0) == 0:
        raise InputError(f"--level_weights must be non-negative and not all zero, not {weights}")
    if wrong := [one for one in (training.optim_args or "").replace(" ", "").split(",") if one and one.count("=") != 1]:
        raise InputError(f"--optim_args has {wrong[0]!r}: give name=value, and a comma between two of them")
    if DebugOption.UNDERFLOW_OVERFLOW in training.debug:
        raise InputError(
            "--debug underflow_overflow fails on an encoder's boolean masks: transformers' detector takes numbers"
        )
    if not training.output_dir:
        raise InputError("--output_dir needs the name of a folder")
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in installed:
            raise InputError(
                f"--report_to {name}: no such package is installed; here are {', '.join(installed) or 'none'}"
            )
    if (training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and training.device.type == "cpu":
        raise InputError("FSDP needs GPUs; for processes on CPUs use recipes/accelerate/ddp.yaml")


def check_ranges(values: dict[str, Any]) -> None:
    """Refuse values outside `RANGES`, and flags that `NO_USE` lists."""
    for name, range_ in RANGES.items():
        low, high = map(float, range_[1:-1].split(","))
        value = values[name]
        if value is not None and not (low < value < high or (value == low and range_[0] == "[")):
            least = "at least" if range_[0] == "[" else "more than"
            most = "" if high == float("inf") else f" and below {high:,.0f}"
            raise InputError(f"--{name} must be {least} {low:,.0f}{most}, not {value}")
    for name, usual in NO_USE.items():
        if values[name] not in (usual, None):
            raise InputError(
                f"--{name} has no use here: every row is scored, at once, with its label and the model as it is"
            )


def check_against_data(arguments: Arguments, data: "LabelledSplits", compute_metrics: ComputeMetrics) -> None:
    """Refuse flags that do not fit the data. Without validation rows, turn evaluation during training off.

    Raises:
        InputError: no training rows, no evaluation to select the best checkpoint by, or no decision to train.
    """
    training, weights = arguments.training, arguments.loss.level_weights
    if "train" not in data.splits:
        raise InputError("no training rows: give --train_file, --data_path or --dataset_name, or --do_train false")
    if "validation" not in data.splits:
        logger.info("no validation rows: no early stopping, and the last weights are kept")
        training.eval_strategy, training.load_best_model_at_end, training.eval_on_start = "no", False, False
    elif training.load_best_model_at_end and training.eval_strategy == "no":
        raise InputError("--eval_strategy no finds no best checkpoint: give --load_best_model_at_end false too")
    if training.load_best_model_at_end:
        labels = np.unique(data.splits["validation"]["label"][:])
        check_best_metric(training.metric_for_best_model, data.taxonomy, labels, compute_metrics)
    if not any(weights[: data.taxonomy.depth]):
        raise InputError(
            f"--level_weights {' '.join(map(str, weights))}: nothing is left to train, since the "
            f"taxonomy has {data.taxonomy.depth} level{'s'[: data.taxonomy.depth > 1]}"
        )


def check_best_metric(name: str, taxonomy: Taxonomy, labels: np.ndarray, compute_metrics: ComputeMetrics) -> None:
    """Refuse a ``--metric_for_best_model`` that evaluation will not measure, or that does not rank models.

    Args:
        name: of the metric, with or without ``eval_``.
        labels: those that occur among the validation rows.

    Raises:
        InputError: lists the metrics that there are.
    """
    # what is measured depends on how deep labels go, and whether some are leaves
    kinds = {(label < taxonomy.num_leaves, taxonomy.levels[label]): label for label in labels.tolist() if label >= 0}
    some = np.array([*kinds.values()], dtype=int)
    measured = compute_metrics(EvalPrediction(np.zeros((len(some), taxonomy.num_leaves)), some))
    known = ["loss", *(metric for metric in measured if not metric.endswith("_by_chance"))]
    if name.removeprefix("eval_") not in known:
        raise InputError(
            f"--metric_for_best_model {name} is not measured on these validation rows; it is one of {', '.join(known)}"
        )

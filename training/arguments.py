"""The command line and the recipe of a training run.

Worth knowing:

1. A recipe is a YAML file of flags. It is turned into command-line words and read by the same parser, before the real
   command line, so that both are checked alike and a flag after the recipe overrides it.
2. An unknown flag or key is an error that names the nearest known one.
3. Precision is chosen for the machine when neither ``--bf16`` nor ``--fp16`` is given.
"""

import difflib
import inspect
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations

from configuration_hierarchical import DEFAULT_ENCODER, DEFAULT_ENCODER_REVISION
from errors import InputError, is_fault, one_line
from taxonomy_hierarchical import WithoutAliases, quote_name, yaml_problem
from training.precision import has_bf16

FEW_ROWS = 32  # a class, on average, below which heads begin as the labels' names


@dataclass
class ModelArguments:
    """Which encoder, how it is stored in memory, and what of it is trained."""

    model_name_or_path: str = field(
        default=DEFAULT_ENCODER,
        metadata={
            "help": "Encoder, or a checkpoint of ours, which continues from its adapter and heads: a Hub id or a folder."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of that repository; pinned to its commit."}
    )
    quantization: Literal["none", "8bit", "4bit"] | None = field(
        default=None,
        metadata={"help": "How the frozen encoder is held while training. Default: 4bit with lora, none with full."},
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
            "help": "What fresh heads begin as: the encoder's vectors of the labels' names, or chance. Default: "
            f"label_names below {FEW_ROWS} training rows a class, where the names fit the texts."
        },
    )
    head_dropout: float = field(default=0.1, metadata={"help": "Dropout before the heads."})
    lexical_head: bool | None = field(
        default=None,
        metadata={
            "help": "A linear classifier over the words beside the encoder. Default: where it has 2^24 weights at most."
        },
    )
    encoder_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout inside the encoder while training. Default: 0 with lora, the encoder's own with full."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, … Default: the library's choice."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})


@dataclass
class DataArguments:
    """Where the texts are, what their labels mean, how they are split and cut."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its commit, tag or branch."})
    data_path: str | None = field(
        default=None,
        metadata={"help": "One file (.csv .tsv .json .jsonl .parquet) to be split, or a folder saved by `datasets`."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Rows for early stopping and choices."})
    test_file: str | None = field(default=None, metadata={"help": "Rows for the last measurement."})
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
    label_separator: str = field(default="/", metadata={"help": "What stands between the names of a label's path."})
    class_names: str | None = field(
        default=None, metadata={"help": "Names of coded labels: a .csv file (code, name), or a JSON object."}
    )
    max_length: int = field(
        default=512, metadata={"help": "Tokens kept of a text; the encoder's limit if that is less."}
    )
    validation_size: float = field(default=0.1, metadata={"help": "Share of the rows, where it must be carved out."})
    test_size: float = field(default=0.1, metadata={"help": "Share of the rows, where one file is split."})


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
            "help": "Train on two halves of each text; how much it counts that they disagree. 0: on whole texts."
        },
    )


@dataclass
class HierarchicalTrainingArguments(TrainingArguments):
    """transformers' own arguments, with defaults for this task."""

    output_dir: str = field(default="results", metadata={"help": "Where the checkpoint is written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output folder that already holds a checkpoint."}
    )
    do_train: bool | None = field(
        default=None, metadata={"help": "Train. Default: unless only --do_eval/--do_predict."}
    )
    do_eval: bool | None = field(
        default=None, metadata={"help": "At the end score the validation rows, and calibrate on them."}
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
        default=False, metadata={"help": "No use in training: a loss that is not finite ends it."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str = field(default="macro_f1", metadata={"help": "What best means."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run knows how long it has been without improvement."}
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
        metadata={"help": "bfloat16 autocast. Default: what accelerate was told, or where the machine has it."},
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
        asked = self.do_eval
        super().__post_init__()
        self.do_eval = asked  # which it turns on for evaluations during training; this is about the scores at the end
        # what the launcher said is in the flags now; Trainer would otherwise prefer it to an explicit --bf16 false
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"


# where data comes from: a flag of one line on the command line replaces what a recipe says of the others
SOURCES = (
    ("dataset_name", "dataset_revision"),
    ("data_path",),
    ("train_file", "validation_file", "test_file"),
)
ALL_ARGUMENTS = (ModelArguments, DataArguments, LossArguments, HierarchicalTrainingArguments)


# intervals: a bracket takes its end in, a parenthesis does not
RANGES = {
    **dict.fromkeys(("lora_r", "lora_alpha", "per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), "[1, inf)"),
    **dict.fromkeys(("lora_dropout", "head_dropout", "encoder_dropout", "label_smoothing_factor"), "[0, 1)"),
    **dict.fromkeys(("learning_rate", "heads_learning_rate", "num_train_epochs"), "(0, inf)"),
    **dict.fromkeys(("focal_gamma", "consistency", "weight_decay", "max_grad_norm"), "[0, inf)"),
    **dict.fromkeys(("early_stopping_patience", "dataloader_num_workers"), "[0, inf)"),
    "save_total_limit": "[1, inf)",
    **dict.fromkeys(("seed", "data_seed"), "[0, 4294967296)"),
    "max_length": "[8, inf)",
}
# flags of transformers under which the scores would not be those of all rows or of the model, or there would be none
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


class Recipe(WithoutAliases, yaml.SafeLoader):
    """YAML without aliases, in which values stay as they were written, but for null, and a key that occurs twice is an error,
    as the second one would win unseen."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith(":null")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{quote_name(twice)} occurs twice")
        return super().construct_mapping(node, deep)


def recipe_words(path: str | Path, flags: dict[str, bool], left_out: Collection[str] = ()) -> list[str]:
    """The flags of a recipe as command-line words.

    Args:
        flags: every flag, by its name in a recipe, and whether it takes several values.
        left_out: keys of the recipe that the command line has replaced.

    Raises:
        InputError: the recipe cannot be read, is not a mapping, or has a key that is no flag or a value that is no text,
            number or list of these.
    """
    try:
        written = Path(path).read_text(encoding="utf-8-sig")
        recipe, values_of = yaml.load(written, Recipe), yaml.load(written, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {path} is not UTF-8 text: save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"the recipe {path} is not YAML: {yaml_problem(error)}") from error
    except RecursionError as error:
        raise InputError(f"the recipe {path} is nested too deeply: it is a mapping of flags to values") from error
    if not isinstance(recipe, dict):
        raise InputError(f"the recipe {path} must be a mapping of flags to values")
    words: list[str] = []
    known: set[str] = set()
    for key, value in recipe.items():
        if str(key).replace("-", "_") in known:
            raise InputError(f"the recipe {path} has {quote_name(key)} twice, once with another spelling")
        known.add(str(key).replace("-", "_"))
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; its keys are flags of train.py, see --help"
            raise InputError(f"the recipe {path} has an unknown key {quote_name(key)}{hint}")
        if value is None or key in left_out:
            continue
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not flags[key]:
            raise InputError(f"the recipe {path}: {key} takes one value, not a list of {len(value)}")
        if any(isinstance(one, list | dict) for one in values) and not isinstance(value, dict):
            raise InputError(f"the recipe {path}: {key} takes a plain list, without lists or mappings in it")
        if flags[key]:
            words += [f"--{key}", *map(str, values)]
        else:
            if isinstance(value, dict):  # codes and names are texts; the arguments of others, numbers and booleans too
                value = json.dumps(value if key.replace("-", "_") == "class_names" else values_of[key], default=str)
            words.append(f"--{key}={value}")
    return words


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, LossArguments, HierarchicalTrainingArguments]:
    """Reads ``[recipe.yaml] [--flag value …]``.

    Raises:
        InputError: an unknown flag, a bad value, flags that contradict each other.
    """
    parser = HfArgumentParser(
        ALL_ARGUMENTS, prog="train.py", usage="train.py [recipe.yaml] [--flag value ...]", allow_abbrev=False
    )

    def refuse(message: str) -> None:
        # argparse calls a flag by both its spellings
        raise InputError(re.sub(r"^argument (--\w+)(/--[\w-]+)?: ", r"\1: ", message))

    for action in parser._actions:
        if action.type is string_to_bool:  # so that a bare --do_predict means true, also where the default is to decide
            action.nargs, action.const = "?", True
    parser.error = refuse  # argparse would print its usage, some 150 flags of it
    known = {option: action.nargs in ("+", "*") for action in parser._actions for option in action.option_strings}
    if argv and not argv[0].startswith("-"):
        given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
        used = [source for source in SOURCES if given & set(source)]
        left_out = {name for source in SOURCES if used and source not in used for name in source}
        flags = {option.removeprefix("--"): many for option, many in known.items() if option.startswith("--")}
        argv = recipe_words(argv[0], flags, left_out) + argv[1:]
    for word in argv:
        name = word.split("=")[0]
        if word.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    try:
        model, data, loss, training, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        if is_fault(error):
            raise
        raise InputError(one_line(error)) from error
    if rest:
        raise InputError(f"unexpected words on the command line: {' '.join(rest)}")
    if model.quantization is None:
        model.quantization = "4bit" if model.tuning == "lora" else "none"
    if model.tuning == "full" and model.quantization != "none":
        raise InputError(
            "--tuning full trains every weight, which quantized ones do not allow: use --quantization none"
        )
    check_values(model, data, loss, training)
    if model.model_name_or_path == DEFAULT_ENCODER and model.model_revision is None:
        model.model_revision = DEFAULT_ENCODER_REVISION
    return model, data, loss, training


def check_values(
    model: ModelArguments, data: DataArguments, loss: LossArguments, training: HierarchicalTrainingArguments
) -> None:
    """Raises InputError where a value would fail, or quietly mean something else, after hours."""
    values = {**vars(training), **vars(model), **vars(data), **vars(loss)}
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
    asked = set(training.gradient_checkpointing_kwargs or {})
    if unknown := asked - inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys():
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
    here = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in here:
            raise InputError(f"--report_to {name}: no such package is installed; here are {', '.join(here) or 'none'}")

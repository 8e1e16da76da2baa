"""Build a model that is ready to train: encoder, quantization, adapter, heads.

If ``--model_name_or_path`` is a checkpoint of this project, training continues with its adapter and
the heads of known nodes. A checkpoint on the Hub is downloaded at one commit first, and treated as
a folder from then on.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub import snapshot_download
from peft import LoraConfig, inject_adapter_in_model, prepare_model_for_kbit_training
from peft.functional import cast_adapter_dtype, set_adapter
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from checkpoint_hierarchical import check_tokenizer, load_encoder, special_tokens
from configuration_hierarchical import DEFAULT_ENCODER, Calibration, HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import (
    MODEL_FILES,
    find_snapshot,
    is_checkpoint,
    read_config,
    require_encoder,
)
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.machine import has_bf16
from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code
from hierarchical_clinicalbert.training.arguments import ModelArguments
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy, list_names

logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # of a text in tokens, unless another is given
HEAD_DROPOUT = 0.1  # of the pooled vector, in training


# ── Build a model, or continue one ────────────────────────────────────────────────────────────────


def build_model(
    arguments: ModelArguments,
    taxonomy: Taxonomy | str | Path,
    seed: int = 42,
    problem_type: str | None = None,
    renamed: dict[str, str] | None = None,
    takes_steps: bool = True,
) -> HierarchicalForSequenceClassification:
    """Build a model that is ready to train. With LoRA the encoder is frozen, and only adapter and
    heads are trained.

    Args:
        arguments: the encoder or checkpoint, its quantization, adapter and pooling.
        taxonomy: a taxonomy, or its file.
        seed: of new weights.
        problem_type: "single_label_classification", one path a text, which is the default; or
            "multi_label_classification".
        renamed: new names of a checkpoint's nodes.
        takes_steps: whether the model is trained afterwards. Then a checkpoint's calibration is
            removed.

    Raises:
        InputError: the model cannot be loaded, or does not fit the arguments.
    """
    if not isinstance(taxonomy, Taxonomy):
        taxonomy = read_taxonomy(taxonomy)
    arguments = fill_in(fetch_model(arguments), takes_steps)
    torch.manual_seed(seed)
    name = arguments.model_name_or_path
    revision = arguments.model_revision
    if is_checkpoint(name):
        return continue_checkpoint(arguments, taxonomy, renamed, takes_steps)

    # ── Configuration ─────────────────────────────────────────────────────────────────────────────
    with as_input_error(f"cannot load the encoder {name}"):
        # the default of trust_remote_code prompts at a terminal
        text_config = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False
        )
        if arguments.tuning == "lora":
            turn_off_dropout(text_config)  # inside a frozen encoder, the largest cost of a CPU step
        config = HierarchicalConfig(
            text_config=text_config,
            taxonomy=taxonomy,
            # the absolute path of a folder, so that the checkpoint loads from any directory
            encoder_name_or_path=str(Path(name).resolve()) if Path(name).is_dir() else name,
            encoder_revision=revision,
            pooling=arguments.pooling or "mean",
            head_dropout=HEAD_DROPOUT,
            problem_type=problem_type,
        )
        encoder = load_encoder(config, **load_arguments(arguments))
    logger.info("encoder: %s%s", config.encoder_name_or_path, f" at {revision}" if revision else "")

    # ── Adapter and heads ─────────────────────────────────────────────────────────────────────────
    model = HierarchicalForSequenceClassification(config, encoder=encoder)
    if arguments.tuning == "lora":
        add_adapter(encoder, arguments)
    model.heads.to(encoder.device)
    model.new_nodes = range(taxonomy.num_nodes)
    return model


def fill_in(arguments: ModelArguments, takes_steps: bool) -> ModelArguments:
    """Return the arguments with a checkpoint's settings, or the defaults, where none are given."""
    name = arguments.model_name_or_path
    stored = read_config(name) if is_checkpoint(name) else None
    is_full = stored is not None and stored.adapter_subfolder is None
    tuning = arguments.tuning or ("full" if is_full else "lora")
    by_default = "4bit" if tuning == "lora" and takes_steps else "none"
    quantization: Any = arguments.quantization or by_default
    if tuning == "full" and quantization != "none":
        raise InputError(
            "--tuning full trains every weight, and quantized weights cannot be trained: use "
            "--quantization none"
        )
    pooling: Any = arguments.pooling or (stored.pooling if stored else "mean")
    return replace(arguments, tuning=tuning, quantization=quantization, pooling=pooling)


def add_adapter(encoder: nn.Module, arguments: ModelArguments) -> None:
    """Freeze an encoder, and inject a LoRA adapter over its linear layers, with new weights in
    float32, in place.

    InputError: the encoder has no linear layers, or PEFT cannot adapt them.
    """
    # the Trainer enables it
    prepare_model_for_kbit_training(encoder, use_gradient_checkpointing=False)
    # PEFT's own all-linear also adapts a pooler
    linear = (name for name, module in encoder.named_modules() if isinstance(module, nn.Linear))
    targets = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not targets:
        raise InputError(f"{type(encoder).__name__} has no linear layers: give --tuning full")
    lora = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        target_modules=targets,
        task_type="FEATURE_EXTRACTION",
    )
    with as_input_error(f"cannot adapt {type(encoder).__name__}", "give --tuning full"):
        inject_adapter_in_model(lora, encoder)
    # over 4-bit layers it is bfloat16, in which small steps round to zero
    cast_adapter_dtype(encoder, "default")


def continue_checkpoint(
    arguments: ModelArguments, taxonomy: Taxonomy, renamed: dict[str, str] | None, takes_steps: bool
) -> HierarchicalForSequenceClassification:
    """Load the model of a checkpoint, with heads for ``taxonomy``.

    The arguments are those of `build_model`.
    """
    path = arguments.model_name_or_path
    config = read_config(path)
    tuning = "full" if config.adapter_subfolder is None else "lora"
    if (arguments.tuning, arguments.pooling) != (tuning, config.pooling):
        same = f"--tuning {tuning} --pooling {config.pooling}"
        weights = "an adapter" if tuning == "lora" else "full or merged weights"
        raise InputError(
            f"{path} holds {weights}, with {config.pooling} pooling: continue it with {same}"
        )
    if tuning == "lora":
        turn_off_dropout(config.text_config)
    with as_input_error(f"cannot load the checkpoint {path}"):
        model = HierarchicalForSequenceClassification.from_pretrained(
            path, config=config, merge_adapter=False, **load_arguments(arguments)
        )
    if takes_steps:
        # the stored one is fitted to the earlier weights
        model.set_calibration(Calibration(max_length=config.calibration.max_length))
    if tuning == "lora":
        settings = adapter_settings(model.encoder.peft_config["default"])
        logger.info(
            "the adapter keeps its settings: %s",
            ", ".join(f"{name} {settings[name]}" for name in settings),
        )
        prepare_model_for_kbit_training(model.encoder, use_gradient_checkpointing=False)
        set_adapter(model.encoder, "default")
    stored = model.config.tree
    if not taxonomy.descriptions:
        taxonomy = Taxonomy(taxonomy.to_nested(), taxonomy.separator, stored.descriptions)
    known = taxonomy.known_nodes(stored, renamed)
    if stored != taxonomy or any(node != earlier for node, earlier in known.items()):
        with as_input_error(f"cannot change the taxonomy of {path}"):
            new, dropped = model.add_nodes(taxonomy, renamed=renamed, trains=takes_steps)
        kept = stored.num_nodes - len(dropped)
        logger.info(
            "heads kept: %d; initialised: %s; dropped: %s",
            kept,
            list_names(new),
            list_names(dropped),
        )
    elif not takes_steps:
        raise InputError(
            "no training steps, and --taxonomy is the checkpoint's: nothing would change"
        )
    model.config.set_taxonomy(taxonomy)
    model.new_nodes = [node for node in range(taxonomy.num_nodes) if node not in known]
    return model


def adapter_settings(adapter: LoraConfig) -> dict[str, Any]:
    """Return the settings of an adapter, by the flags that give them."""
    return {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha}


# ── Fetch and load ────────────────────────────────────────────────────────────────────────────────


def pin_model(arguments: ModelArguments) -> tuple[ModelArguments, str]:
    """Pin ``--model_revision`` to its commit. Return the arguments, and the folder of the initial
    model's config.json.

    Nothing but config.json is downloaded. For the default encoder, which is no checkpoint, the
    second value is its id.
    """
    name = arguments.model_name_or_path
    snapshot = None if name == DEFAULT_ENCODER else find_snapshot(name, arguments.model_revision)
    if snapshot is None:
        return arguments, name
    return replace(arguments, model_revision=snapshot.name), str(snapshot)


def fetch_model(arguments: ModelArguments) -> ModelArguments:
    """Pin ``--model_revision`` to a commit of the Hub.

    Download a checkpoint of this project and continue from its folder.
    """
    name = arguments.model_name_or_path
    snapshot = find_snapshot(name, arguments.model_revision)
    if snapshot is not None:
        arguments = replace(arguments, model_revision=snapshot.name)
        if is_checkpoint(snapshot):
            with as_input_error(f"cannot download the checkpoint {name} at {snapshot.name}"):
                folder = snapshot_download(
                    name, revision=snapshot.name, allow_patterns=list(MODEL_FILES)
                )
            logger.info("checkpoint: %s at %s", name, snapshot.name)
            arguments = replace(arguments, model_name_or_path=folder, model_revision=None)
    if is_checkpoint(arguments.model_name_or_path):
        # again: only its config.json was at hand before
        refuse_foreign_code(arguments.model_name_or_path)
        require_encoder(arguments.model_name_or_path)
    return arguments


def load_arguments(arguments: ModelArguments) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` for training, with quantization or in
    float32.

    4-bit is NF4 with double quantization and bfloat16 products (QLoRA: Dettmers et al., 2023). CPUs
    that emulate bfloat16 multiply in float32.
    """
    gpu = torch.cuda.is_available()
    if arguments.quantization == "none":
        return {"dtype": torch.float32}  # master weights; autocast converts them
    settings: dict[str, Any] = {"load_in_8bit": True}
    if arguments.quantization == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
        settings["bnb_4bit_compute_dtype"] = (
            torch.bfloat16 if gpu or has_bf16(cpu=True) else torch.float32
        )
        # which needs all parameters in one floating-point type
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            settings["bnb_4bit_quant_storage"] = torch.float32
    # quantization happens on the device
    device = {"device_map": {"": torch.cuda.current_device()}} if gpu else {}
    return {"quantization_config": BitsAndBytesConfig(**settings), **device}


def turn_off_dropout(text_config: PretrainedConfig) -> None:
    """Set all dropout probabilities of an encoder's configuration to 0, in place."""
    for name, value in text_config.to_dict().items():
        if ("dropout" in name or "_pdrop" in name) and isinstance(value, float):
            setattr(text_config, name, 0.0)


def load_tokenizer(
    model: HierarchicalForSequenceClassification, max_length: int | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's encoder or checkpoint, which truncates texts at
    ``max_length`` tokens, by default as in the checkpoint, else at `MAX_LENGTH` or one window.

    The configuration stores that length, and the special tokens, which each window of a longer text
    gets.
    """
    config = model.config
    name = model.name_or_path or config.encoder_name_or_path
    continued = is_checkpoint(name)
    revision = config.encoder_revision or "main"
    with as_input_error(f"cannot load the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=continued
        )
        check_tokenizer(tokenizer, model)
    # else saved: the pipeline would run code that the encoder names
    tokenizer.init_kwargs.pop("auto_map", None)
    # "cls" pooling reads the first token, and positions start there
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"  # predictions report truncation at the end of a text
    if "attention_mask" not in tokenizer.model_input_names:  # else batches would have no mask
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    config.tokens_before, config.tokens_after = special_tokens(tokenizer)
    config.self_test = None  # of an earlier checkpoint, which training changes

    # ── Length ────────────────────────────────────────────────────────────────────────────────────
    window = tokenizer.model_max_length
    if model.window is not None:
        window = min(window, model.window)
    earlier = config.calibration.max_length
    tokenizer.model_max_length = max_length or earlier or min(MAX_LENGTH, window)
    if earlier not in (None, tokenizer.model_max_length):
        change = f"from {earlier} to {max_length} tokens"
        advice = "leave it out to keep the checkpoint's limit"
        logger.warning("--max_length changes where texts are truncated %s; %s", change, advice)
    # which engines read, also without a calibration
    config.calibration.max_length = tokenizer.model_max_length
    return tokenizer


def size_report(model: HierarchicalForSequenceClassification) -> dict[str, int | float]:
    """Count all and trainable parameters, and the bytes of the encoder's weights, as stored and in
    float32.
    """
    encoder = model.encoder
    heads = model.heads
    adapter = sum(
        parameter.numel() for name, parameter in encoder.named_parameters() if "lora_" in name
    )
    # the encoder's method counts 4-bit weights, stored two to a byte; the model's method counts
    # stored elements
    total = encoder.num_parameters() + sum(parameter.numel() for parameter in heads.parameters())
    trainable = model.num_parameters(only_trainable=True)
    stored = encoder.state_dict()  # with the scales of quantized weights
    return {
        "trainable_parameters": trainable,
        "all_parameters": total,
        "trainable_share": trainable / total,
        "encoder_bytes": sum(
            tensor.nbytes for name, tensor in stored.items() if "lora_" not in name
        ),
        "encoder_bytes_float32": 4 * (encoder.num_parameters() - adapter),
    }

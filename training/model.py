"""Build a model that is ready to train: encoder, quantization, adapter, heads.

Worth knowing:

1. An encoder on the Hub is pinned to a commit, which the checkpoint records.
2. Dropout inside a frozen encoder is the largest cost of a CPU step. LoRA training turns it off.
3. If ``--model_name_or_path`` is a checkpoint of this project, training continues with its adapter and the heads of
   known nodes. A checkpoint on the Hub is downloaded at one commit first, and treated as a folder from then on.
"""

import logging
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from peft import LoraConfig, inject_adapter_in_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from checkpoint_files import MODEL_FILES, WEIGHTS, WEIGHTS_INDEX, is_checkpoint, read_config
from checkpoint_hierarchical import check_tokenizer, load_encoder, position_limit
from configuration_hierarchical import HierarchicalConfig
from errors import InputError, one_line, refusing
from modeling_hierarchical import HierarchicalForSequenceClassification, HierarchicalHeads
from publishing.hub import HUB_ERRORS
from taxonomy_hierarchical import Taxonomy
from training.arguments import HierarchicalTrainingArguments, ModelArguments

logger = logging.getLogger(__name__)

HEAD_DROPOUT = 0.1  # of the pooled vector, in training


def fetch_checkpoint(arguments: ModelArguments) -> None:
    """Download a checkpoint of this project from the Hub, and point ``--model_name_or_path`` to its folder.

    All files come from one commit, that of ``--model_revision``. The name of a plain encoder is unchanged.

    Raises:
        InputError: the checkpoint cannot be downloaded.
    """
    name, revision, cache = arguments.model_name_or_path, arguments.model_revision, arguments.cache_dir
    if Path(name).exists():
        return
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, cache_dir=cache))
    except (*HUB_ERRORS, ValueError):  # `build_model` reports the reason
        return
    if not is_checkpoint(str(config.parent)):
        return
    commit = config.parent.name
    with refusing(f"cannot download the checkpoint {name} at {commit}"):
        folder = snapshot_download(name, revision=commit, cache_dir=cache, allow_patterns=list(MODEL_FILES))
    logger.info("checkpoint: %s at %s", name, commit)
    arguments.model_name_or_path, arguments.model_revision = folder, None


def quantization_config(quantization: str | None) -> BitsAndBytesConfig | None:
    """Return the settings of 4-bit or 8-bit storage, or None.

    4-bit is NF4 with double quantization and bfloat16 products (QLoRA: Dettmers et al., 2023).
    """
    if quantization == "4bit":
        # FSDP needs all parameters in one floating-point type, so packed weights are stored as the others are
        storage = torch.float32 if parse_flag_from_env("ACCELERATE_USE_FSDP") else torch.uint8
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "8bit" else None


def build_model(arguments: ModelArguments, taxonomy: Taxonomy, seed: int) -> HierarchicalForSequenceClassification:
    """Build a model that is ready to train. With LoRA the encoder is frozen, and only adapter and heads are trained.

    Args:
        seed: seed for initialising heads and adapter.

    Raises:
        InputError: the encoder cannot be loaded, or a flag does not fit it.
    """
    torch.manual_seed(seed)
    if is_checkpoint(arguments.model_name_or_path):
        return continue_checkpoint(arguments, taxonomy)

    # ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────
    revision, name = pinned_revision(arguments), arguments.model_name_or_path
    with refusing(f"cannot load the encoder {name}"):
        text_config = AutoConfig.from_pretrained(
            name,
            revision=revision or "main",
            cache_dir=arguments.cache_dir,
            trust_remote_code=False,  # the default prompts at a terminal
        )
        if arguments.tuning == "lora":
            turn_off_dropout(text_config)
        config = HierarchicalConfig(
            text_config=text_config,
            taxonomy=taxonomy,
            # the absolute path of a folder, so that the checkpoint loads from any directory
            encoder_name_or_path=str(Path(name).resolve()) if Path(name).is_dir() else name,
            encoder_revision=revision,
            pooling=arguments.pooling,
            head_dropout=HEAD_DROPOUT,
        )

    # ── Encoder, adapter and heads ───────────────────────────────────────────────────────────────────────────────────
    encoder = load(config, arguments)
    model = HierarchicalForSequenceClassification(config, encoder=encoder)
    if arguments.tuning == "lora":
        prepare_model_for_kbit_training(encoder, use_gradient_checkpointing=False)  # the Trainer switches it on
        targets = arguments.lora_target_modules
        lora = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=linear_names(encoder) if targets == ["all-linear"] else targets,
            task_type="FEATURE_EXTRACTION",
        )
        try:
            inject_adapter_in_model(lora, encoder)
        except ValueError as error:
            raise InputError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from error
        to_float32(model)
    model.heads.to(encoder.device)
    return model


def to_float32(model: nn.Module) -> None:
    """Convert trained parameters to float32.

    PEFT injects adapters over 4-bit layers in bfloat16, in which small optimizer steps round to zero.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def continue_checkpoint(arguments: ModelArguments, taxonomy: Taxonomy) -> HierarchicalForSequenceClassification:
    """Load the model of a checkpoint for further training, with heads for ``taxonomy``.

    Raises:
        InputError: the checkpoint cannot be loaded, or was trained with another tuning or pooling.
    """
    path = arguments.model_name_or_path
    config = read_config(path)
    tuning = "full" if config.adapter_subfolder is None else "lora"
    if tuning != arguments.tuning:
        raise InputError(f"{path} was trained with --tuning {tuning}; continue it the same way")
    if arguments.pooling != config.pooling:
        raise InputError(f"{path} was trained with --pooling {config.pooling}; continue it the same way")
    if tuning == "lora":
        turn_off_dropout(config.text_config)
    # these were fitted to the earlier weights
    config.temperatures = config.conformal_thresholds = config.conformal_max_length = None
    with refusing(f"cannot load the checkpoint {path}"):
        model = HierarchicalForSequenceClassification.from_pretrained(
            path, config=config, merge_adapter=False, **load_arguments(arguments)
        )
    model.set_lexical_head(None)
    if tuning == "lora":
        adapter = model.encoder.peft_config["default"]
        settings = f"r = {adapter.r}, alpha = {adapter.lora_alpha}, dropout = {adapter.lora_dropout}"
        targets = ", ".join(sorted(adapter.target_modules))
        logger.info("the adapter keeps the checkpoint's settings: %s, target modules %s", settings, targets)
        prepare_model_for_kbit_training(model.encoder, use_gradient_checkpointing=False)
        adapter.inference_mode = False
        for module in model.encoder.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter("default")
        to_float32(model)
    if model.config.tree != taxonomy:
        change_taxonomy(model, taxonomy)
    return model


def change_taxonomy(model: HierarchicalForSequenceClassification, taxonomy: Taxonomy) -> None:
    """Replace a model's heads by heads for another taxonomy.

    A node whose path exists in the old taxonomy keeps its head. The other heads are initialised.
    """
    old, old_heads, config = model.config.tree, model.heads, model.config
    config.taxonomy, config.label_separator = taxonomy.to_nested(), taxonomy.separator
    leaves = taxonomy.labels[: taxonomy.num_leaves]
    config.id2label = dict(enumerate(leaves))
    config.label2id = {label: i for i, label in enumerate(leaves)}
    model.heads = HierarchicalHeads(config).to(old_heads.weight.device)
    model.num_labels = len(leaves)
    model._init_weights(model.heads)  # initialize_weights() would draw a new adapter as well
    old_id = {old.path_names(i): i for i in range(old.num_nodes)}
    kept = {i: old_id[path] for i in range(taxonomy.num_nodes) if (path := taxonomy.path_names(i)) in old_id}
    with torch.no_grad():
        new_ids, old_ids = [*kept], [*kept.values()]
        model.heads.weight[new_ids] = old_heads.weight[old_ids]
        model.heads.bias[new_ids] = old_heads.bias[old_ids]
    fresh = [taxonomy.labels[i] for i in range(taxonomy.num_nodes) if i not in kept]
    dropped = [old.labels[i] for i in range(old.num_nodes) if i not in kept.values()]
    logger.info("heads kept: %d; initialised: %s; dropped: %s", len(kept), fresh or "none", dropped or "none")


def pinned_revision(arguments: ModelArguments) -> str | None:
    """Return the commit of the encoder's revision, or None for a folder.

    Raises:
        InputError: the repository or revision is not on the Hub, or a folder is given with a revision.
    """
    name, revision = arguments.model_name_or_path, arguments.model_revision
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"--model_revision {revision} does not apply to the folder {name}")
        return None
    if revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision):
        return revision
    try:
        return HfApi().model_info(name, revision=revision).sha
    except (*HUB_ERRORS, ValueError) as error:
        raise InputError(f"cannot find the encoder {name} on the Hub: {one_line(error)}") from error


def load_arguments(arguments: ModelArguments) -> dict:
    """Return the keyword arguments of `from_pretrained` for training."""
    kwargs = {"quantization_config": quantization_config(arguments.quantization), "cache_dir": arguments.cache_dir}
    if arguments.quantization != "none" and torch.cuda.is_available():
        kwargs["device_map"] = {"": torch.cuda.current_device()}  # quantization happens on this device
    if arguments.quantization == "none":
        kwargs["dtype"] = torch.float32  # master weights; autocast converts them
    return {name: value for name, value in kwargs.items() if value is not None}


def load(config: HierarchicalConfig, arguments: ModelArguments) -> PreTrainedModel:
    """Load the encoder's weights, quantized or in float32."""
    with refusing(f"cannot load the encoder {config.encoder_name_or_path}"):
        encoder = load_encoder(config, **load_arguments(arguments))
    revision = f" at {config.encoder_revision}" if config.encoder_revision else ""
    file = "safetensors" if has_safetensors(config, arguments.cache_dir) else "a .bin file, unpickled as tensors only"
    logger.info("encoder: %s%s, from %s", config.encoder_name_or_path, revision, file)
    return encoder


def has_safetensors(config: HierarchicalConfig, cache_dir: str | None) -> bool:
    """Return whether the encoder has safetensors, which transformers prefers to .bin files."""
    folder = Path(config.encoder_name_or_path)
    if folder.is_dir():
        return any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    cached = (
        try_to_load_from_cache(str(folder), n, cache_dir, config.encoder_revision) for n in (WEIGHTS, WEIGHTS_INDEX)
    )
    return any(isinstance(path, str) for path in cached)


def linear_names(encoder: PreTrainedModel) -> list[str]:
    """Return the last name parts of an encoder's linear layers, sorted, for ``target_modules`` of PEFT.

    PEFT's own "all-linear" also includes the layer of a pooler.
    """
    return sorted(
        {name.rsplit(".", 1)[-1] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    )


def turn_off_dropout(text_config: PretrainedConfig) -> None:
    """Set every dropout probability in an encoder's configuration to 0."""
    for name, value in text_config.to_dict().items():
        if any(word in name for word in ("dropout", "_pdrop")) and isinstance(value, float):
            setattr(text_config, name, 0.0)


def load_tokenizer(arguments: ModelArguments, model: HierarchicalForSequenceClassification) -> PreTrainedTokenizerBase:
    """Load the encoder's tokenizer, and limit ``model_max_length`` to the encoder's positions.

    Raises:
        InputError: the tokenizer cannot be loaded or is another encoder's, or the encoder has no position limit.
    """
    continued = is_checkpoint(arguments.model_name_or_path)
    with refusing(f"cannot load the tokenizer of {arguments.model_name_or_path}"):
        if continued:
            tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, trust_remote_code=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                arguments.model_name_or_path,
                revision=model.config.encoder_revision or "main",
                cache_dir=arguments.cache_dir,
                trust_remote_code=False,
            )
        check_tokenizer(tokenizer, model)
    tokenizer.padding_side = "right"  # "cls" pooling reads the first token, and positions start there
    tokenizer.truncation_side = "right"  # predictions report truncation at the end of a text
    limit = position_limit(model.encoder)
    if limit is None:
        raise InputError(f"{type(model.encoder).__name__} names no max_position_embeddings; use another encoder")
    # a checkpoint's tokenizer stores its --max_length, which this run may exceed
    tokenizer.model_max_length = limit if continued else min(tokenizer.model_max_length, limit)
    return tokenizer


def limit_length(max_length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the smaller of ``--max_length`` and the tokenizer's limit."""
    limit = tokenizer.model_max_length
    if max_length > limit:
        logger.info("--max_length %d exceeds the model's limit: texts are truncated at %d tokens", max_length, limit)
    return min(max_length, limit)


def size_report(model: HierarchicalForSequenceClassification) -> dict[str, int | float]:
    """Count all and trainable parameters, and the bytes of the encoder's weights, as stored and in float32."""
    packed = packed_parameters(model.encoder)
    own = [p for name, p in model.encoder.named_parameters() if "lora_" not in name]
    count = {id(p): packed.get(id(p), p.numel()) for p in model.parameters()}
    trainable = sum(count[id(p)] for p in model.parameters() if p.requires_grad)
    return {
        "trainable_parameters": trainable,
        "all_parameters": sum(count.values()),
        "trainable_share": trainable / sum(count.values()),
        "encoder_bytes": sum(p.numel() * p.element_size() + statistics_bytes(p) for p in own),
        "encoder_bytes_float32": 4 * sum(count[id(p)] for p in own),
    }


def log_setup(arguments: ModelArguments, training: HierarchicalTrainingArguments, size: dict[str, int | float]) -> None:
    """Log device, precision and sizes.

    Args:
        size: from `size_report`.
    """
    logger.info(
        "device %s, precision %s, encoder %s, tuning %s", training.device, training.precision,
        arguments.quantization if arguments.quantization != "none" else "not quantized", arguments.tuning,
    )  # fmt: skip
    logger.info(
        "trainable: %s of %s parameters (%.2f %%); encoder: %.1f MB, %.1f MB in float32",
        f"{size['trainable_parameters']:,}", f"{size['all_parameters']:,}", 100 * size["trainable_share"],
        size["encoder_bytes"] / 1e6, size["encoder_bytes_float32"] / 1e6,
    )  # fmt: skip


def packed_parameters(module: nn.Module) -> dict[int, int]:
    """Return the number of weights in each 4-bit parameter, by its id. Two weights share a byte."""
    return {
        id(p): p.quant_state.shape.numel() for p in module.parameters() if getattr(p, "quant_state", None) is not None
    }


def statistics_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes of a quantized parameter's scales."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code]
        return sum(t.numel() * t.element_size() for t in tensors)
    scales = getattr(parameter, "SCB", None)
    return 0 if scales is None else scales.numel() * scales.element_size()

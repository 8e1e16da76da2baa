"""Read, check, merge and write the two forms of a checkpoint.

Worth knowing:

1. The self-contained form has all weights in ``model.safetensors``. The adapter form has
   ``heads.safetensors`` and a plain PEFT adapter in ``adapter/``; its encoder is fetched by name.
   The adapter is in a subfolder because a root-level ``adapter_config.json`` on the Hub makes
   ``AutoModel`` load the bare encoder instead.
2. Loading merges the adapter into the encoder's weights, which needs no PEFT and makes every
   forward faster.
3. transformers fetches and copies only those shipped files that another one imports by a relative
   import.
"""

import copy
import inspect
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import cached_file, is_peft_available, logging

try:
    from .configuration_hierarchical import HierarchicalConfig
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from configuration_hierarchical import HierarchicalConfig

logger = logging.get_logger(__name__)

MODEL_CLASS = "modeling_hierarchical.HierarchicalForSequenceClassification"
AUTO_MAP = {
    "AutoConfig": "configuration_hierarchical.HierarchicalConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForSequenceClassification": MODEL_CLASS,
}
CUSTOM_PIPELINES = {
    "hierarchical-text-classification": {
        "impl": "pipeline_hierarchical.HierarchicalTextClassificationPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}
MODULES = (
    "taxonomy",
    "configuration",
    "decisions",
    "open_world",
    "checkpoint",
    "modeling",
    "cpu",
    "pipeline",
)
SHIPPED_FILES = tuple(f"{module}_hierarchical.py" for module in MODULES)
ADAPTER_SUBFOLDER = "adapter"
ADAPTER_PREFIX = "base_model.model."  # how PeftModel names the module that it wraps
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADS_WEIGHTS = "heads.safetensors"
ADAPTER_FILES = (
    HEADS_WEIGHTS,
    f"{ADAPTER_SUBFOLDER}/adapter_config.json",
    f"{ADAPTER_SUBFOLDER}/{ADAPTER_WEIGHTS}",
)
SELF_TEST_TEXT = (
    "Colonoscopy was performed in 120 patients with suspected inflammatory bowel disease."
)
BLOCK = 2**16  # values of a tensor that are projected at once
# how far rounding may move a log-probability, in nats, by what rounds most
SELF_TEST_TOLERANCES = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.3, "quantized": 1.0}
# one lock for the whole process, although each checkpoint has its own copy of this module
LOADING = vars(threading).setdefault("_hierarchical_loading", threading.RLock())
# their convolutions and hashes include padding tokens
PADDING_SENSITIVE = ("convbert", "nystromformer", "yoso")
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)
# arguments for the checkpoint's repository and code: the encoder has another repository, and its
# code is in transformers
NOT_FOR_THE_ENCODER = (
    *("revision", "subfolder", "trust_remote_code", "code_revision", "adapter_kwargs"),
    *("_from_auto", "_from_pipeline", "_commit_hash"),
)
# settings of a LoRA adapter that `merge_lora` reads, or that have no effect on the merged weights
HARMLESS_LORA_SETTINGS = (
    *("task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *(
        "auto_mapping",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "megatron_core",
        "qalora_group_size",
    ),
)


# ── Load a checkpoint ─────────────────────────────────────────────────────────────────────────────


def load_checkpoint(
    model_class: type,
    load_self_contained: Callable,
    name: str | Path,
    config: Any,
    merge_adapter: bool,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint of either form. ``load_self_contained`` is transformers' `from_pretrained`
    for ``model_class``.

    Raises ValueError if weights are missing, or do not fit config.json.
    """
    # AutoModel passes a config whose class is another object than `HierarchicalConfig` here, so the
    # test is for the base class
    if not isinstance(config, PretrainedConfig):
        dtype = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        # by the next call
        removed = dtype | {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        source = name if config is None else config
        config, kwargs = HierarchicalConfig.from_pretrained(
            source, return_unused_kwargs=True, **kwargs
        )
        kwargs |= removed
    info_wanted = kwargs.pop("output_loading_info", False)
    # transformers replaces functions of torch.nn.init, and some of its own, while it loads
    with LOADING:
        if config.adapter_subfolder is not None:
            model, info = load_adapter_form(model_class, name, config, merge_adapter, **kwargs)
        else:
            with as_value_error(name):
                model, info = load_self_contained(
                    name, config=config, output_loading_info=True, **kwargs
                )
            refuse_missing(name, model, info)
            if getattr(model, "hf_quantizer", None) is not None:
                restore_dtypes(model)
            if left_over := [
                weight for weight in info["unexpected_keys"] if weight.startswith("heads.")
            ]:
                raise ValueError(
                    f"the weight {min(left_over)!r} of {name} does not fit its config.json"
                )
    drop_stale_calibration(model)
    return (model, info) if info_wanted else model


def load_adapter_form(
    model_class: type, name: str | Path, config: Any, merge_adapter: bool, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Load the encoder by its name and revision, then the adapter and heads.

    Return the model and the loading info.
    """
    hub = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
    heads_file, config_file, adapter_file = (
        Path(cached_file(name, file, **hub)) for file in ADAPTER_FILES
    )
    heads = load_file(heads_file)
    adapter_config = read_adapter_config(config_file)
    adapter = load_file(adapter_file)
    encoder = load_encoder(
        config, **{key: kwargs[key] for key in kwargs if key not in NOT_FOR_THE_ENCODER}
    )
    with init.no_init_weights():  # all weights are loaded below
        model = model_class(copy.deepcopy(config), encoder=encoder)
    if offloaded := [
        name for name, weight in encoder.named_parameters() if weight.is_meta
    ]:  # PEFT would skip them silently
        advice = (
            "give the model more memory, or load a checkpoint that was published by "
            "push_to_hub.py --merge"
        )
        raise ValueError(
            f"the encoder's {offloaded[0]} is offloaded, and the adapter cannot be added to "
            f"it: {advice}"
        )
    if merge_adapter and is_mergeable(encoder, adapter_config):
        merge_lora(encoder, adapter, adapter_config)
        load_heads(model, heads)
    else:
        inject_adapter(encoder, config_file.parent)
        load_heads_and_adapter(model, heads, adapter)
    model.heads.to(encoder.device)
    # how pipelines and Trainers see that a model is already placed
    if hasattr(encoder, "hf_device_map"):
        devices = {
            ".".join(filter(None, ("encoder", part))): device
            for part, device in encoder.hf_device_map.items()
        }
        model.hf_device_map = {**devices, "heads": next(iter(devices.values()))}
    model.name_or_path = model.config.name_or_path = str(name)
    # a missing or unexpected weight has raised ValueError
    return model.eval(), {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }


def load_encoder(config: HierarchicalConfig, **kwargs: Any) -> PreTrainedModel:
    """Load the encoder that ``config`` names, at its pinned revision, by
    `AutoModel.from_pretrained`.

    Raises ValueError if the folder or weights are missing, the commit is not pinned, a local folder
    hides the encoder of the Hub, or `check_encoder` raises it.
    """
    name = config.encoder_name_or_path
    revision = config.encoder_revision
    if os.path.isdir(name):
        if revision is not None and not os.path.isabs(name):
            problem = (
                f"the folder {name} of the working directory hides the encoder {name} of the Hub"
            )
            raise ValueError(
                f"{problem}, at commit {revision}: load from another directory, or rename "
                "the folder"
            )
        revision = "main"
    elif os.path.isabs(name):
        advice = (
            "publish it by push_to_hub.py --merge, or set encoder_name_or_path and "
            "encoder_revision in config.json"
        )
        raise ValueError(
            f"the encoder is the folder {name}, which is not on this machine: {advice}"
        )
    elif re.fullmatch("[0-9a-f]{40}", revision or "") is None:
        commit = f"the commit of {name} that this checkpoint was trained on, 40 hexadecimal digits"
        raise ValueError(f"encoder_revision must be {commit}, not {revision!r}")
    kwargs |= {
        "config": config.text_config,
        "revision": revision,
        **without_pooler(config.text_config),
    }
    # None prompts at a terminal
    kwargs |= {"output_loading_info": True, "trust_remote_code": False}
    with quiet_loading(), as_value_error(name):
        encoder, info = AutoModel.from_pretrained(name, **kwargs)
    refuse_missing(name, encoder, info)
    check_encoder(encoder)
    return encoder


def build_encoder(text_config: PretrainedConfig) -> PreTrainedModel:
    """Build an encoder with new weights, or raise ValueError if `check_encoder` does."""
    encoder = AutoModel.from_config(text_config, **without_pooler(text_config))
    check_encoder(encoder)
    return encoder


def without_pooler(text_config: PretrainedConfig) -> dict[str, bool]:
    """Return the argument that omits an encoder's pooler.

    A pooler would get no gradient, which is an error under DDP.
    """
    parameters = inspect.signature(MODEL_MAPPING[type(text_config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def load_heads(model: Any, heads: dict[str, Tensor]) -> None:
    """Load stored heads into a model, or raise ValueError if names or shapes differ."""
    check_weights("heads", heads, model.heads.state_dict())
    model.heads.load_state_dict(heads)


def load_heads_and_adapter(
    model: Any, heads: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    """Load stored heads and adapter weights into a model with an adapter."""
    peft = import_peft()
    adapter = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in adapter.items()}
    check_weights("adapter", adapter, adapter_weights(model.encoder))
    load_heads(model, heads)
    peft.set_peft_model_state_dict(model.encoder, adapter)


def adapter_weights(
    encoder: PreTrainedModel, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the weights of an encoder's adapter, by default the current ones."""
    # "auto", the default of save_embedding_layers, compares with the encoder's newest configuration
    # on the Hub
    return import_peft().get_peft_model_state_dict(
        encoder, state_dict=state_dict, save_embedding_layers=False
    )


def inject_adapter(encoder: PreTrainedModel, folder: Path) -> None:
    """Inject the adapter of a folder's adapter_config.json into an encoder, in place, with new
    weights in float32.
    """
    peft = import_peft()
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(folder), encoder)
    encoder.requires_grad_(False)
    # PEFT gives an adapter the dtype of the encoder, or of 4-bit computation: stored weights would
    # be rounded to it
    peft.functional.cast_adapter_dtype(encoder, "default")


def share_encoder(model: Any, other: Any) -> None:
    """Let a model use the encoder weights of ``other``, so that memory holds them once. Both keep
    their own adapter and heads.

    Load both with ``merge_adapter=False``. Predictions do not change. Both models then contain the
    same linear modules. So weights that a pipeline packs for the CPU are held once, too. Move both
    models to a device, or neither. An adapter that is merged afterwards changes both.

    Raises ValueError where an adapter is merged, weights are quantized, or the models have
    different encoders.
    """
    if not (model.has_adapter and other.has_adapter):
        raise ValueError(
            "only encoders whose adapters are separate can be shared: load both with "
            "merge_adapter=False"
        )
    own, shared = (
        {
            name.replace(".base_layer", ""): (name, weight)
            for name, weight in weights
            if "lora_" not in name
        }
        for weights in (model.encoder.named_parameters(), other.encoder.named_parameters())
    )
    names = [
        f"{one.config.encoder_name_or_path} at {one.config.encoder_revision}"
        for one in (model, other)
    ]
    if names[0] != names[1]:
        raise ValueError(f"the encoders are different: {' and '.join(names)}")
    kinds = [
        [(weight.dtype, weight.device, type(weight)) for _, weight in one.values()]
        for one in (own, shared)
    ]
    if kinds[0] != kinds[1] or not all(dtype.is_floating_point for dtype, *_ in kinds[0]):
        raise ValueError(
            "the encoders differ in dtype or device, or are quantized: load both with the "
            "same arguments"
        )
    for place, (name, weight) in own.items():
        shared_name, shared_weight = shared[place]
        weight.data = shared_weight.data
        layer, _, _ = name.rpartition(".")
        shared_layer, _, _ = shared_name.rpartition(".")
        module = other.encoder.get_submodule(shared_layer)
        if isinstance(module, nn.Linear):
            model.encoder.set_submodule(layer, module)


def import_peft() -> Any:
    """Import PEFT lazily, because its import is slow. Raise ImportError if it is not installed."""
    if is_peft_available():
        import peft.functional

        return peft
    raise ImportError("the checkpoint holds a PEFT adapter: pip install peft")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence warnings about poolers and pretraining heads.

    Disable the online conversion of .bin files: it gets the token.
    """
    name = "DISABLE_SAFETENSORS_CONVERSION"
    with LOADING:  # both settings are global to the process
        verbosity = logging.get_verbosity()
        conversion = os.environ.get(name)
        logging.set_verbosity_error()
        os.environ[name] = "1"
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            os.environ.pop(name)
            if conversion is not None:
                os.environ[name] = conversion


# ── Check what was loaded ─────────────────────────────────────────────────────────────────────────


@contextmanager
def as_value_error(name: str | Path) -> Iterator[None]:
    """Replace two errors of transformers by a clear ValueError: weights of other shapes, and code
    in a .bin file.
    """
    try:
        yield
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            problem = f"the weights of {name} have other shapes than its configuration says"
        elif type(error).__name__ == "UnpicklingError":
            problem = (
                f"{name} holds a .bin file with more than tensors, which could run code: it is "
                "not loaded"
            )
        else:
            raise
        raise ValueError(problem) from error


def refuse_missing(name: str | Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise ValueError if weights are missing. transformers only warns, and initialises them at
    random.
    """
    if missing := info["missing_keys"]:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{min(missing)!r}"
        )


def restore_dtypes(model: PreTrainedModel) -> None:
    """Give the weights of a quantized model that are not quantized the dtype that was asked for,
    and the heads float32.

    transformers leaves every ``weight`` of a stored quantized model in the dtype in which it was
    stored.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(
                torch.float32 if name.startswith("heads.") else model.config.dtype
            )


def check_encoder(encoder: PreTrainedModel) -> None:
    """Raise ValueError for a model with a decoder, or one whose outputs change with padding."""
    config = encoder.config
    if config.is_encoder_decoder:
        problem = "has a decoder: use an encoder-only model"
    elif (
        config.model_type in PADDING_SENSITIVE
        or "attention_mask" not in inspect.signature(encoder.forward).parameters
    ):
        problem = "gives other outputs when its inputs are padded: use another encoder"
    else:
        return
    raise ValueError(f"{type(encoder).__name__} {problem}")


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise ValueError for a tokenizer without padding token or vocabulary, or with ids beyond the
    encoder's embeddings.
    """
    name = tokenizer.name_or_path
    embeddings = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} has no padding token: set pad_token in its "
            "tokenizer_config.json"
        )
    # for a folder without tokenizer files, transformers builds a tokenizer with special tokens only
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"{name} holds no tokenizer: its vocabulary has {len(tokenizer)} special tokens "
            "and no words"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings:
        problem = (
            f"its largest token id is {largest:,}, and the encoder has {embeddings:,} embeddings"
        )
        raise ValueError(f"the tokenizer of {name} does not belong to this encoder: {problem}")


def project(tensor: Tensor) -> tuple[float, float]:
    """Return the product of a tensor with fixed weights of mean square 1/4, and a bound on the
    effect of rounding it.

    Independent errors of at most eps/2 of each value change the product by much less than eps times
    the tensor's norm.
    """
    blocks = tensor.detach().cpu().flatten().split(BLOCK)
    weights = torch.arange(BLOCK, dtype=torch.float64).cos()
    projection = 0.0
    squares = 0.0
    for number, block in enumerate(blocks):
        values = block.double()
        projection += math.cos(number + 0.5) * (values @ weights[: len(values)]).item()
        squares += (values @ values).item()
    precision = coarsest_precision(tensor)
    if precision is None:
        return projection, 0.0
    smallest = precision.smallest_normal * precision.eps
    return projection, precision.eps * math.sqrt(squares) + smallest * math.sqrt(tensor.numel())


def coarsest_precision(tensor: Tensor) -> Any:
    """Return `torch.finfo` of the coarsest dtype that holds all values of a tensor, or None for
    whole numbers.
    """
    if not tensor.dtype.is_floating_point:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.to(dtype).to(tensor.dtype).equal(tensor):
            return torch.finfo(dtype)
    return torch.finfo(tensor.dtype)


def drop_stale_calibration(model: Any) -> None:
    """Remove a model's calibration, and what p-values need, if its heads were trained afterwards.

    Rounding to another dtype is no training.
    """
    recorded = model.config.calibration.heads
    weight = model.heads.weight
    if recorded is None or weight.is_meta:
        return
    product, rounding = project(weight)
    if abs(product - recorded[0]) > 2 * max(rounding, recorded[1]):
        logger.warning(
            "the heads were trained after the calibration was fitted: probabilities are not "
            "calibrated, and there are no prediction sets and p-values until it is fitted again"
        )
        model.config.self_test = None
        model.set_calibration(type(model.config.calibration)())


def record_self_test(model: Any, tokenizer: Any = None) -> None:
    """Store a model's log-probabilities of `SELF_TEST_TEXT` in its configuration, for
    `check_self_test`.

    `set_calibration` and `add_nodes` do so where a test is stored. Call it after training of your
    own.

    Args:
        tokenizer: the model's tokenizer. By default the tokens are those that the configuration
        stores.
    """
    if tokenizer is None:
        input_ids = model.config.self_test["input_ids"]
    else:
        input_ids = tokenizer(SELF_TEST_TEXT, verbose=False)["input_ids"]
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    log_probs = self_test_log_probs(model, input_ids)
    for module in in_training:
        module.training = True
    model.config.self_test = {
        "input_ids": input_ids,
        "log_probs": [round(value, 6) for value in log_probs.tolist()],
        "dtype": coarsest_dtype(model),
        **library_versions(),
    }


def check_self_test(model: Any, tokenizer: Any) -> None:
    """Raise ValueError where a model has other log-probabilities of `SELF_TEST_TEXT` than when it
    was saved.

    Releases of transformers have loaded other models' remote code with random weights, or with
    wrong logits. Nothing is computed with the versions that saved the checkpoint, or where no test
    is stored.
    """
    stored = model.config.self_test
    versions = library_versions()
    if stored is None or versions.items() <= stored.items():
        return
    if tokenizer(SELF_TEST_TEXT, verbose=False)["input_ids"] != stored["input_ids"]:
        problem = "its tokenizer splits the text of the self-test into other tokens"
    else:
        log_probs = self_test_log_probs(model, stored["input_ids"])
        largest = (log_probs - torch.tensor(stored["log_probs"])).abs().max().item()
        dtypes = {stored["dtype"], coarsest_dtype(model)}
        tolerance = max(SELF_TEST_TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
        if largest <= tolerance:
            return
        explained = f"and rounding ({' and '.join(sorted(dtypes))}) explains up to {tolerance}"
        problem = f"a log-probability of its self-test differs by {largest:.2g}, {explained}"
    saved, here = (
        f"torch {of['torch']} and transformers {of['transformers']}" for of in (stored, versions)
    )
    advice = "install these versions, or call record_self_test if you have changed the model"
    raise ValueError(
        f"{model.name_or_path}: {problem}. It was saved with {saved}, here are {here}: {advice}"
    )


@torch.inference_mode()
def self_test_log_probs(model: Any, input_ids: list[int]) -> Tensor:
    """Return a model's log-probabilities of all nodes for one text, (num_nodes,)."""
    tokens = torch.tensor([input_ids], device=model.device)
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return output.node_log_probs[0].float().cpu()


def coarsest_dtype(model: Any) -> str:
    """Return the name of the encoder's dtype, or "quantized"."""
    if any(weight.dtype in (torch.int8, torch.uint8) for weight in model.encoder.parameters()):
        return "quantized"
    return str(model.encoder.dtype).removeprefix("torch.")


def library_versions() -> dict[str, str]:
    """Return the versions that may change a model's results, without torch's build, such as
    ``+cpu``.
    """
    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    is_special = encoded["special_tokens_mask"]
    first = is_special.index(0)
    last = len(ids) - is_special[::-1].index(0)
    return ids[:first], ids[last:]


def position_limit(encoder: PreTrainedModel) -> int | None:
    """Return the longest input, in tokens, that an encoder has positions for; None if its
    configuration has no limit.
    """
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and limit < 1:  # XLNet's -1
        return None
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    # RoBERTa's family counts positions from padding_idx + 1
    offset = getattr(table, "padding_idx", None)
    return limit if limit is None or offset is None else limit - offset - 1


def check_weights(what: str, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError if stored tensors are missing, unexpected or of another shape.

    The message names the first.
    """
    for name in sorted(stored.keys() | expected.keys()):
        if name not in expected:
            problem = "does not fit this model"
        elif name not in stored:
            problem = "is missing from the checkpoint"
        elif stored[name].shape != expected[name].shape:
            problem = (
                f"has shape {tuple(stored[name].shape)}, expected {tuple(expected[name].shape)}"
            )
        else:
            continue
        raise ValueError(f"the {what} weight {name!r} {problem}")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json, or raise ValueError if PEFT did not write it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "peft_type" not in content:
            raise ValueError("it names no peft_type")
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a PEFT adapter: {error}") from error
    return content


# ── Merge an adapter ──────────────────────────────────────────────────────────────────────────────


def adapted_layers(encoder: nn.Module, targets: list[str] | str) -> dict[str, nn.Module]:
    """Return the modules that PEFT adapts: their names end with a target, or fully match the
    pattern of targets.
    """
    pattern = (
        targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    )
    return {name: module for name, module in encoder.named_modules() if re.fullmatch(pattern, name)}


def is_mergeable(encoder: nn.Module, adapter_config: dict[str, Any]) -> bool:
    """Return whether `merge_lora` can merge an adapter: plain LoRA, over linear layers with
    floating-point weights.
    """
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}
    for name, value in adapter_config.items():
        if value and name not in HARMLESS_LORA_SETTINGS and value not in plain.get(name, ()):
            return False
    return all(
        type(module) is nn.Linear
        # torchao quantizes by a tensor subclass in a plain layer
        and type(module.weight) is nn.Parameter
        and module.weight.is_floating_point()
        for module in adapted_layers(encoder, adapter_config["target_modules"]).values()
    )


@torch.no_grad()
def merge_lora(
    encoder: nn.Module, adapter: dict[str, Tensor], adapter_config: dict[str, Any]
) -> None:
    """Add a stored LoRA adapter to the weights that it adapts: W + (alpha / r) · B · A (Hu et al.,
    2021, section 4.1).
    """
    r = adapter_config["r"]
    expected = {}
    layers: dict[str, Any] = adapted_layers(encoder, adapter_config["target_modules"])
    for name, layer in layers.items():
        expected[f"{name}.lora_A.weight"] = torch.empty(r, layer.in_features, device="meta")
        expected[f"{name}.lora_B.weight"] = torch.empty(layer.out_features, r, device="meta")
    adapter = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in adapter.items()}
    check_weights("adapter", adapter, expected)
    for name, layer in layers.items():
        weight = layer.weight
        a, b = (
            adapter[f"{name}.lora_{part}.weight"].to(weight.device, torch.float32) for part in "AB"
        )
        merged = torch.addmm(weight.float(), b, a, alpha=adapter_config["lora_alpha"] / r)
        # a new tensor: the old one can be a memory map of the weights file
        weight.data = merged.to(weight.dtype)


# ── Write a checkpoint ────────────────────────────────────────────────────────────────────────────


def save_checkpoint(
    model: Any,
    save_self_contained: Callable,
    folder: Path,
    is_main_process: bool,
    state_dict: dict | None,
    **kwargs: Any,
) -> None:
    """Write a model and the code that loads it.

    ``save_self_contained`` is transformers' `save_pretrained`.
    """
    if kwargs.get("push_to_hub"):  # which would publish before the code is written
        raise ValueError(
            "save_pretrained writes a folder; to publish it, run push_to_hub.py on that folder"
        )
    if state_dict is None:  # else the heads may be sharded
        drop_stale_calibration(model)
    # raises for a changed id2label, which loading would refuse
    type(model.config).from_dict(model.config.to_dict())
    # before anything is written
    code = {name: (Path(__file__).parent / name).read_bytes() for name in SHIPPED_FILES}
    if not model.has_adapter:
        prepare_self_contained(model)
        if getattr(model, "hf_quantizer", None) is not None:
            # transformers cannot undo what it does to quantized weights while it loads them
            kwargs.setdefault("save_original_format", False)
        save_self_contained(
            folder, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
    elif is_main_process:
        save_adapter_form(model, folder, model.state_dict() if state_dict is None else state_dict)
    if is_main_process:
        follow_umask(folder)
        remove_other_form(folder, model.has_adapter)
        for file, content in code.items():
            (folder / file).write_bytes(content)


def set_auto_map(config: Any) -> None:
    """Set ``auto_map`` and ``custom_pipelines`` in a configuration, and remove the encoder's local
    path.
    """
    # copies: transformers puts classes into the second one when a pipeline is given this
    # configuration
    config.auto_map, config.custom_pipelines = copy.deepcopy((AUTO_MAP, CUSTOM_PIPELINES))
    config.text_config.name_or_path = ""


def prepare_self_contained(model: Any) -> None:
    """Set up the model's configuration for the self-contained form.

    ValueError: the weights cannot be saved.
    """
    for name, weight in model.named_parameters():
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} was repacked by bitsandbytes for this CPU: load the model again to save it"
            )
    set_auto_map(model.config)
    model.config.adapter_subfolder = None
    # a local path is useless on another machine, and this form never loads the encoder by name
    if os.path.isabs(model.config.encoder_name_or_path):
        model.config.encoder_name_or_path = os.path.basename(model.config.encoder_name_or_path)


def save_adapter_form(model: Any, folder: Path, state_dict: dict[str, Tensor]) -> None:
    """Write the heads, the adapter and the configuration, without the encoder."""
    heads, encoder = (
        {
            name.removeprefix(prefix): tensor
            for name, tensor in state_dict.items()
            if name.startswith(prefix)
        }
        for prefix in ("heads.", "encoder.")
    )
    adapter = {
        ADAPTER_PREFIX + name: tensor
        for name, tensor in adapter_weights(model.encoder, encoder).items()
    }
    (folder / ADAPTER_SUBFOLDER).mkdir(parents=True, exist_ok=True)
    save_file(heads, folder / HEADS_WEIGHTS, {"format": "pt"})
    save_file(adapter, folder / ADAPTER_SUBFOLDER / ADAPTER_WEIGHTS, {"format": "pt"})

    adapter_config = copy.deepcopy(model.encoder.peft_config["default"])
    adapter_config.inference_mode = True
    adapter_config.base_model_name_or_path = model.config.encoder_name_or_path
    adapter_config.revision = model.config.encoder_revision
    adapter_config.save_pretrained(folder / ADAPTER_SUBFOLDER)

    config = copy.deepcopy(model.config)
    set_auto_map(config)
    config.architectures = [type(model).__name__]
    config.adapter_subfolder = ADAPTER_SUBFOLDER
    # dtype and quantization are not stored: loading takes those of the encoder's repository
    config.dtype = config.text_config.dtype = None
    for part in (config, config.text_config):
        vars(part).pop("quantization_config", None)
    config.save_pretrained(folder)


def follow_umask(folder: Path) -> None:
    """Set the permissions of weights files by the umask. safetensors creates files that only their
    owner can read.
    """
    os.umask(umask := os.umask(0o077))  # the umask can only be read by setting it
    for file in [
        *folder.glob("*.safetensors"),
        *(folder / ADAPTER_SUBFOLDER).glob("*.safetensors"),
    ]:
        file.chmod(0o666 & ~umask)


def remove_other_form(folder: Path, adapter_form: bool) -> None:
    """Delete weights of another form from an earlier save to the folder: they could be loaded, or
    published too.
    """
    whole = "model.safetensors"
    shards = "model-*-of-*.safetensors"
    index = "model.safetensors.index.json"
    # transformers has already deleted earlier shards
    of_whole = (whole if any(folder.glob(shards)) else index,)
    for pattern in (whole, shards, index) if adapter_form else (*ADAPTER_FILES, *of_whole):
        for file in folder.glob(pattern):
            file.unlink()

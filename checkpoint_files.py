"""Which files make a checkpoint, and is one whole? Every room and command asks here.

A checkpoint has one of two forms: an adapter with heads, over an encoder that is stored elsewhere, or the whole model.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from checkpoint_hierarchical import ADAPTER_SUBFOLDER, ADAPTER_WEIGHTS, HEADS_WEIGHTS, SHIPPED_FILES
from configuration_hierarchical import HierarchicalConfig
from errors import InputError, refusing

ADAPTER_FILES = (HEADS_WEIGHTS, f"{ADAPTER_SUBFOLDER}/adapter_config.json", f"{ADAPTER_SUBFOLDER}/{ADAPTER_WEIGHTS}")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model"),
)
ONNX_FILE = "onnx/model.onnx"
# patterns; the first are what loading a checkpoint reads, the second what is published
MODEL_FILES = (
    *("config.json", *SHIPPED_FILES, *TOKENIZER_FILES),
    *(*ADAPTER_FILES, WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors"),
)
CHECKPOINT_FILES = (*MODEL_FILES, "README.md", "metrics.json", "plots/*.png", ONNX_FILE)


def list_files(folder: Path, patterns: tuple[str, ...] = CHECKPOINT_FILES) -> list[str]:
    """List the files of a checkpoint in a folder, relative to it. Whatever else lies there is left out."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(files, allow_patterns=list(patterns)))


def read_model_type(folder: str | Path) -> Any:
    """Read the ``model_type`` of the configuration in a folder; None without a configuration.

    Raises:
        InputError: config.json is no configuration.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    with refusing(f"{path} is not a configuration"):
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is no JSON object")
    return known.get("model_type")


def is_checkpoint(name_or_path: str | Path) -> bool:
    """Tell whether a folder holds a checkpoint of this project."""
    return read_model_type(name_or_path) == HierarchicalConfig.model_type


def read_config(folder: str | Path) -> HierarchicalConfig:
    """Read the configuration of a checkpoint of this project."""
    with refusing(f"{Path(folder) / 'config.json'} cannot be used"):
        return HierarchicalConfig.from_pretrained(folder)


def find_damage(folder: Path, adapter_form: bool) -> str | None:
    """Say which weights of a checkpoint are missing or damaged; None if they are whole.

    A safetensors file names its size in its header, so a truncated file is recognised without reading it.
    """
    needed, index = [WEIGHTS], folder / WEIGHTS_INDEX
    if adapter_form:
        needed = list(ADAPTER_FILES)
    elif index.is_file():
        try:
            needed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
    for name in needed:
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if name.endswith(".safetensors"):
                with safe_open(folder / name, "pt"):
                    pass
        except (SafetensorError, OSError):
            return f"{name} is damaged"
    return None


def read_checkpoint(folder: Path) -> HierarchicalConfig:
    """Check that a folder holds a whole checkpoint, and read its configuration.

    Raises:
        InputError: it holds no checkpoint, or a file is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json")
    if (model_type := read_model_type(folder)) != HierarchicalConfig.model_type:
        raise InputError(f"{folder} holds a {model_type!r} model, not one of ours")
    config = read_config(folder)
    beside = (*SHIPPED_FILES, "tokenizer_config.json", "README.md")
    missing = next((f"{name} is missing" for name in beside if not (folder / name).is_file()), None)
    if problem := find_damage(folder, config.adapter_subfolder is not None) or missing:
        raise InputError(f"{folder} is not whole: {problem}; train.py writes whole checkpoints")
    return config

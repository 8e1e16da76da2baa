"""Recognise the weights that were scored: a card with scores is published beside these weights
only.

The fingerprint stands in `FINGERPRINT`, beside metrics.json. Weights that were cast, merged or
saved again keep it, within the rounding of their dtypes. Training changes it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import RepoCard
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_hierarchical import project
from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import (
    ADAPTER_FILES,
    CARD,
    FINGERPRINT,
    METRICS,
    WEIGHTS,
    list_files,
    read_json_object,
)
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.files import write_json

ENCODER = "encoder."
HEADS = "heads."
QUANTIZED = (torch.int8, torch.uint8)


def write_fingerprint(folder: Path, scored: Path, model: torch.nn.Module) -> None:
    """Write `FINGERPRINT` into a folder with scores.

    Args:
        scored: the folder of the checkpoint that was scored.
        model: the model that was loaded from it. A merged adapter is part of its encoder's weights.
    """
    tensors = {name: project(tensor) for name, tensor in stored_tensors(scored)}
    for name, tensor in model.state_dict().items():
        if name.startswith(ENCODER) and name not in tensors:
            tensors[name] = project(tensor)
    settings = hash_settings(HierarchicalConfig.from_pretrained(scored))
    write_json(folder / FINGERPRINT, {"settings": settings, "tensors": tensors})


def check_scores(folder: Path, config: HierarchicalConfig, card: RepoCard) -> None:
    """Raise InputError if the card or metrics.json of a checkpoint hold scores of other weights, or
    may do so.
    """
    has_results = "model-index" in card.data.to_dict()
    if not has_results and not (folder / METRICS).is_file():
        return
    problem = find_change(folder, config)
    if problem is not None:
        advice = (
            f"train or score the model again, or remove {METRICS}, and the results and "
            f"model-index of {CARD}"
        )
        raise InputError(
            f"{folder}: {CARD} or {METRICS} may hold scores of other weights: {problem}; {advice}"
        )


def find_change(folder: Path, config: HierarchicalConfig) -> str | None:
    """Return what differs between a checkpoint and its fingerprint, or None.

    A tensor differs if its projection does, by more than the rounding of the coarser of the two
    dtypes.
    """
    if not (folder / FINGERPRINT).is_file():
        return f"{FINGERPRINT} is missing"
    recorded = read_json_object(folder / FINGERPRINT)
    if recorded.get("settings") != hash_settings(config):
        return "the taxonomy or the calibration differs"
    with as_input_error(f"{folder / FINGERPRINT} cannot be used"):
        tensors = {
            name: (float(first), float(second))
            for name, (first, second) in recorded["tensors"].items()
        }

    is_quantized = getattr(config.text_config, "quantization_config", None) is not None
    missing = {name for name in tensors if name.startswith(HEADS)}
    for name, tensor in stored_tensors(folder):
        missing.discard(name)
        if tensor.dtype in QUANTIZED:
            continue
        if name not in tensors:
            if is_quantized:  # the scales of quantized weights
                continue
            return f"{name} is new"
        projection, rounding = project(tensor)
        recorded_projection, recorded_rounding = tensors[name]
        difference = abs(projection - recorded_projection)
        if not difference <= 2 * max(rounding, recorded_rounding):
            return f"{name} differs"
    return f"{min(missing)} is missing" if missing else None


def hash_settings(config: HierarchicalConfig) -> str:
    """Return a hash of what decides the predictions beside the weights."""
    calibration = config.calibration.stored()
    settings = [config.taxonomy, config.label_separator, config.problem_type, calibration]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint's files.

    The heads' names are those of the self-contained form.
    """
    for name in list_files(folder, (*ADAPTER_FILES, WEIGHTS, "model-*-of-*.safetensors")):
        if name.endswith(".safetensors"):
            prefix = HEADS if name == "heads.safetensors" else ""
            for key, tensor in load_file(folder / name).items():
                yield f"{prefix}{key}", tensor

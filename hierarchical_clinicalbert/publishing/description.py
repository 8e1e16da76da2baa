"""Keep what describes a model (scores, plots, predictions, card) with that model.

Worth knowing:

1. metrics.json records hashes of the scored model (`hash_model`). `check_description` compares them with the model beside it, so
   that no model is published with the scores of another one.
2. metrics.json is written last, after plots and card. A run that replaces the weights of a finished one deletes its description
   first, and metrics.json last. So a killed run leaves no scores of another model that would pass.
3. Scoring writes metrics.json into another folder. It has the hashes of the scored checkpoint, too.
"""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from checkpoint_hierarchical import ADAPTER_SUBFOLDER
from hierarchical_clinicalbert.checkpoint_files import (
    CARD,
    METRICS,
    SCORE_FILES,
    encoder_on_hub,
    read_config,
    read_json_object,
    weights_files,
)
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.files import write_json
from hierarchical_clinicalbert.publishing import card

SCORED_MODEL = "scored_model"  # the entry of metrics.json with the hashes
# Fields that do not change the scores, or that libraries set anew whenever they save a model. The encoder is compared by itself,
# because a folder may move, and may be published later.
NOT_HASHED = {
    *("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "auto_map", "custom_pipelines"),
    *("encoder_name_or_path", "encoder_revision", "descriptions", "page"),
    # of adapter_config.json
    *("peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
}


# ── The model that was scored ────────────────────────────────────────────────────────────────────────────────────────


def hash_model(folder: Path) -> dict[str, str | None]:
    """Return SHA-256 hashes of a checkpoint's tensors and configuration, and the encoder of an adapter.

    The hashes do not depend on how tensors are distributed over files. The encoder is None if it is a folder, or among the tensors.
    """
    config = read_config(folder)
    adapter_form = config.adapter_subfolder is not None

    # ── Tensors: name, dtype, shape and bytes ────────────────────────────────────────────────────────────────────────
    tensors = hashlib.sha256()
    with ExitStack() as stack:
        names = [name for name in weights_files(folder) if name.endswith(".safetensors")]
        files = [stack.enter_context(safe_open(folder / name, "pt")) for name in names]
        for name, i in sorted((name, i) for i, file in enumerate(files) for name in file.keys()):  # noqa: SIM118
            tensor = files[i].get_tensor(name)
            tensors.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            tensors.update(tensor.reshape(-1).view(torch.uint8).numpy())

    # ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────
    settings = [read_json_object(folder / "config.json")]
    if adapter_form:
        adapter = read_json_object(folder / ADAPTER_SUBFOLDER / "adapter_config.json")
        if isinstance(adapter.get("target_modules"), list):
            adapter["target_modules"].sort()  # PEFT saves a set
        settings.append(adapter)
    content = json.dumps([hashed_fields(fields) for fields in settings], sort_keys=True)
    return {
        "tensors": tensors.hexdigest(),
        "configuration": hashlib.sha256(content.encode()).hexdigest(),
        "encoder": encoder_on_hub(config) if adapter_form else None,
    }


def hashed_fields(value: Any) -> Any:
    """Return a configuration without the fields in `NOT_HASHED`, and without those that are not set."""
    if not isinstance(value, dict):
        return value
    kept = {name: one for name, one in value.items() if name not in NOT_HASHED and one is not None}
    return {name: hashed_fields(one) for name, one in kept.items()}


def check_description(folder: Path) -> str | None:
    """Raise InputError if a checkpoint's metrics.json has the scores of another model. Return a warning if it has no hashes."""
    file = folder / METRICS
    recorded = read_json_object(file).get(SCORED_MODEL) if file.is_file() else None
    if not isinstance(recorded, dict):
        problem = f"{file} has no hashes of the scored model" if file.is_file() else f"{file} is missing"
        return f"{problem}: check that the card describes this model"
    found = hash_model(folder)
    known = [part for part in found if None not in (found[part], recorded.get(part))]
    changed = [part for part in known if found[part] != recorded[part]]
    if changed:
        problem = f"{file} has the scores of another model (other: {', '.join(changed)})"
        raise InputError(f"{problem}: finish its run by train.py --resume_from_checkpoint auto, or undo the change")
    return None


def describe_merged(folder: Path) -> None:
    """Replace the hashes in a copied metrics.json by those of the merged model, which was checked before it was merged.

    Otherwise the merged folder, downloaded from the Hub, could never be published again.
    """
    file = folder / METRICS
    if file.is_file() and SCORED_MODEL in (metrics := read_json_object(file)):
        write_json(file, metrics | {SCORED_MODEL: hash_model(folder)})


# ── Delete the description of an earlier model ───────────────────────────────────────────────────────────────────────


def delete_scores(folder: Path) -> None:
    for pattern in SCORE_FILES:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def delete_description(folder: Path) -> None:
    """Delete the scores and the card. A card that a person wrote or edited is renamed."""
    card.keep_edited(folder)
    (folder / CARD).unlink(missing_ok=True)
    delete_scores(folder)


def delete_earlier_description(folder: Path) -> None:
    """Delete the description of a finished model, before other weights replace it.

    Without metrics.json there is no finished model. Then a card has no scores, and stays: an upload may be reading it.
    """
    if (folder / METRICS).exists():
        delete_description(folder)

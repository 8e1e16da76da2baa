"""Keep what describes a model (scores, plots, predictions, card) with that model.

Worth knowing:

1. metrics.json records a hash of the scored model (`hash_model`). `check_description` compares it with the model beside it, so
   that no model is published with the scores of another one.
2. metrics.json is written last, after plots and card. A run that replaces the weights of a finished one deletes its description
   first, and metrics.json last. So a killed run leaves no scores of another model that would pass.
3. Scoring writes metrics.json into another folder. It has the hash of the scored checkpoint, too.
"""

import hashlib
import json
from pathlib import Path

from hierarchical_clinicalbert.checkpoint_files import CARD, METRICS, SCORE_FILES, read_json_object, weights_files
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.publishing import card

SCORED_MODEL = "scored_model"  # the entry of metrics.json with the hash
# fields of config.json that do not change the scores, that libraries set anew, or that change when an encoder is moved or published
NOT_HASHED = (
    *("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "auto_map", "custom_pipelines"),
    *("encoder_name_or_path", "encoder_revision", "descriptions", "page"),
)


# ── The model that was scored ────────────────────────────────────────────────────────────────────────────────────────


def hash_model(folder: Path) -> str:
    """Return the SHA-256 hash of a checkpoint's weights and of the fields of its configuration that change scores."""
    config = read_json_object(folder / "config.json")
    fields = {name: value for name, value in config.items() if name not in NOT_HASHED and value is not None}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in weights_files(folder):
        if name.endswith(".safetensors"):
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_description(folder: Path) -> str | None:
    """Raise InputError if a checkpoint's metrics.json has the scores of another model. Return a warning if it has no hash."""
    file = folder / METRICS
    recorded = read_json_object(file).get(SCORED_MODEL) if file.is_file() else None
    if not isinstance(recorded, str):
        return f"{file} with a hash of the scored model is missing: check that the card describes this model"
    if recorded != hash_model(folder):
        problem = f"{file} has the scores of another model"
        raise InputError(f"{problem}: finish its run by train.py --resume_from_checkpoint auto, or undo the change")
    return None


# ── Delete the description of an earlier model ───────────────────────────────────────────────────────────────────────


def delete_scores(folder: Path) -> None:
    for pattern in SCORE_FILES:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def delete_description(folder: Path) -> None:
    """Delete the scores and the card of a model, before other weights replace it. A card that a person wrote or edited is renamed."""
    card.keep_edited(folder)
    (folder / CARD).unlink(missing_ok=True)
    delete_scores(folder)

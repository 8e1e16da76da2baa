"""Define which files form a checkpoint, and check that a folder holds a complete one."""

import json
import logging
import os
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from checkpoint_hierarchical import ADAPTER_FILES, SHIPPED_FILES
from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.connection import go_offline_without_hub
from hierarchical_clinicalbert.errors import PACKAGE, ROOT, InputError, as_input_error
from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code

logger = logging.getLogger(__name__)

# ── The manifest: paths and glob patterns, relative to a checkpoint's folder ──────────────────────

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CARD = "README.md"
METRICS = "metrics.json"
PLOTS = "plots/*.png"
OWN_PLOTS = (  # that a run writes and deletes: other plots are the user's
    *("plots/training_curves.png", "plots/reliability_diagram.png", "plots/f1_by_frequency.png"),
    *("plots/confusion_matrix_level_[0-9].png", "plots/confusion_matrix_level_[0-9][0-9].png"),
)
FINGERPRINT = "fingerprint.json"  # of the weights that the scores belong to
ENDPOINT_FILES = ("handler.py", "requirements.txt")  # for Inference Endpoints
ONNX_FILE = "onnx/model.onnx"
QUANTIZED_ONNX_FILE = "onnx/model_quantized.onnx"
# where text-embeddings-inference reads the length to truncate at
TRUNCATION_FILE = "sentence_bert_config.json"
EXPORTED_FILES = (ONNX_FILE, QUANTIZED_ONNX_FILE, TRUNCATION_FILE)
# files that are read to load a checkpoint, those that are published, and those with the scores of a
# run
MODEL_FILES = (
    *("config.json", *SHIPPED_FILES, *TOKENIZER_FILES),
    *(*ADAPTER_FILES, WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors"),
)
CHECKPOINT_FILES = (
    *MODEL_FILES,
    CARD,
    METRICS,
    FINGERPRINT,
    PLOTS,
    *ENDPOINT_FILES,
    *EXPORTED_FILES,
)
TRAINED_TEXTS = "trained_texts.json"  # hashes, which are never published: see `data.trained_texts`
SCORE_FILES = (
    "validation_predictions.csv",
    "test_predictions.csv",
    *OWN_PLOTS,
    METRICS,
    FINGERPRINT,
)


def list_files(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Return the paths of a checkpoint's files, relative to its folder.

    Other files are left out.
    """
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in files)


def list_own_files(folder: Path) -> list[str]:
    """Return the paths of the files that may be published, relative to a checkpoint's folder.

    InputError: a link leads out of the folder. The Hub's cache may link to blobs of its repository.
    """
    names = list_files(folder, CHECKPOINT_FILES)
    root = folder.resolve()
    snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
    repositories = [one.parent for one in snapshots if one.parent.name.startswith("models--")]
    allowed = [root, *(repository / "blobs" for repository in repositories)]

    for name in names:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(one) for one in allowed):
            problem = f"{folder / name} is linked to {target}, outside the checkpoint's folder"
            raise InputError(f"{problem}: replace the link by a copy to publish it, or delete it")
    return names


def published_files(folder: Path) -> dict[str, Path | bytes]:
    """Return a checkpoint's files to publish, by path in the repository, plus handler.py and
    requirements.txt.
    """
    files: dict[str, Path | bytes] = {name: folder / name for name in list_own_files(folder)}
    files["handler.py"] = PACKAGE / "publishing" / "handler.py"
    packages = ("torch", "transformers")  # loading merges the adapter, so it needs no PEFT
    kept = [line for line in list_requirements() if Requirement(line).name in packages]
    files["requirements.txt"] = "".join(f"{line}\n" for line in kept).encode()
    return files


def list_requirements() -> list[str]:
    """Return the packages that this one needs, of the repository or as pip installed it."""
    file = ROOT / "requirements.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    return requires("hierarchical-clinicalbert") or []


def find_trained_texts(checkpoint: str | Path) -> Path | None:
    """Return the file with hashes of the texts that a checkpoint was trained on, if there is one.

    For a ``checkpoint-N``, the run's folder is searched too.
    """
    # a symbolic link belongs to the run that contains the link
    folder = Path(os.path.abspath(checkpoint))
    is_part = re.fullmatch(r"checkpoint-\d+", folder.name)
    folders = [folder, folder.parent] if is_part else [folder]
    return next((file for one in folders if (file := one / TRAINED_TEXTS).is_file()), None)


def is_local(name: str) -> bool:
    """Return whether a model is a local folder, or raise InputError if the name is neither a folder
    nor an id on the Hub.
    """
    if Path(name).is_dir():
        return True
    # cannot be an id on the Hub
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"cannot load the model {name}: there is no such folder")
    return False


def find_snapshot(name: str, revision: str | None) -> Path | None:
    """Download a model's config.json from the Hub. Return its cache folder, named by the commit;
    None for a local folder.

    If the Hub cannot be reached, a model in the cache is used.

    Raises InputError if ``name`` is neither a local folder, nor a model on the Hub or in the cache.
    """
    if is_local(name):
        return None
    with as_input_error(f"cannot load the model {name}"):
        require_hub_or_cache("model", name, revision)
        return Path(cached_file(name, "config.json", revision=revision)).parent


def require_encoder(folder: str | Path) -> None:
    """Raise InputError if the encoder of a checkpoint's adapter is on the Hub, which cannot be
    reached, and not in the cache.
    """
    # as JSON, because the checkpoint's own code may read a newer format
    config = read_json_object(Path(folder) / "config.json")
    name, revision = (
        str(config.get(field)) for field in ("encoder_name_or_path", "encoder_revision")
    )
    # `load_encoder` refuses other revisions, with its reason
    is_pinned = re.fullmatch("[0-9a-f]{40}", revision)
    if config.get("adapter_subfolder") is not None and is_pinned and not Path(name).is_dir():
        with as_input_error(f"cannot load the encoder {name}"):
            require_hub_or_cache("encoder", name, revision)


def require_hub_or_cache(what: str, name: str, revision: str | None) -> None:
    """Raise InputError if the Hub cannot be reached, and the cache holds no configuration and
    weights of a model.
    """
    was_offline = is_offline_mode()
    problem = go_offline_without_hub()
    if problem is None:
        return
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    files = Path(file).parent.iterdir() if isinstance(file, str) else ()
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        download = (
            f"hf download {name}{f' --revision {revision}' if revision else ''} --cache-dir FOLDER"
        )
        remedy = (
            f"on a connected machine run `{download}` and copy the content of FOLDER to "
            f"{constants.HF_HUB_CACHE}"
        )
        reasons = f"there is no such folder, {problem}, and the cache does not hold it"
        raise InputError(f"cannot load the {what} {name}: {reasons}: {remedy}")
    if not was_offline:  # once, and not at all if the user has chosen it
        logger.warning("%s: models are loaded from the cache", problem)


def read_json_object(path: Path, problem: str = "cannot be used") -> dict[str, Any]:
    """Read a JSON file that holds an object, or raise InputError."""
    with as_input_error(f"{path} {problem}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    return content


def is_checkpoint(name_or_path: str | Path) -> bool:
    """Return whether a local folder holds a checkpoint of this project; False for an id.

    InputError: its config.json is damaged.
    """
    path = Path(name_or_path) / "config.json"
    stored = read_json_object(path, "is not a configuration") if path.is_file() else {}
    return stored.get("model_type") == HierarchicalConfig.model_type


def read_config(folder: str | Path) -> HierarchicalConfig:
    """Read the configuration of a checkpoint of this project.

    InputError: it cannot be used, or see `refuse_foreign_code`.
    """
    with as_input_error(f"{Path(folder) / 'config.json'} cannot be used"):
        refuse_foreign_code(folder)
        return HierarchicalConfig.from_pretrained(folder)


def encoder_on_hub(config: HierarchicalConfig) -> str | None:
    """Return the id and commit of a checkpoint's encoder, or None if it is a folder on this
    machine.
    """
    name = config.encoder_name_or_path
    revision = config.encoder_revision
    return None if revision is None or Path(name).is_absolute() else f"{name} at {revision}"


def find_damage(folder: Path) -> str | None:
    """Return a message that names the first missing or damaged weights file, or None if all are
    complete.
    """
    needed = [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    try:
        if read_json_object(folder / "config.json").get("adapter_subfolder") is not None:
            needed = [*ADAPTER_FILES]
        elif index.is_file():
            needed = sorted({*read_json_object(index)["weight_map"].values()})
    except InputError as error:
        return str(error)
    for name in needed:
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if name.endswith(".safetensors"):
                # its header holds the sizes, so a truncated file is an error
                with safe_open(folder / name, "pt"):
                    pass
        except (SafetensorError, OSError):
            return f"{name} is damaged"
    return None


def read_checkpoint(folder: Path) -> HierarchicalConfig:
    """Check that a folder holds a complete checkpoint of this project, or raise InputError; return
    its configuration.
    """
    if not is_checkpoint(folder):
        raise InputError(
            f"{folder} is not a checkpoint of this project: its config.json is missing or "
            "of another model"
        )
    needed = (*SHIPPED_FILES, *TOKENIZER_FILES, CARD)
    missing = next((f"{name} is missing" for name in needed if not (folder / name).is_file()), None)
    if problem := find_damage(folder) or missing:
        raise InputError(
            f"{folder} is not a complete checkpoint: {problem}; train.py writes complete ones"
        )
    return read_config(folder)

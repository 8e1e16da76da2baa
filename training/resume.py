"""Which checkpoint a broken run goes on from, and what goes when a run is overwritten.

Worth knowing:

1. trainer_state.json is the last file of a checkpoint to be written, and older checkpoints are deleted after that: a
   process that is killed leaves at most one checkpoint without it, and never none that is whole.
2. A safetensors file names its size in its header, and a file of torch has its directory at its end, so that one which
   was cut short is recognised without reading it.
"""

import errno
import json
import logging
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from configuration_hierarchical import Taxonomy
from modeling_hierarchical import HEADS_WEIGHTS
from training import InputError
from training.model import is_checkpoint, read_config

logger = logging.getLogger(__name__)


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The folder that ``--resume_from_checkpoint`` stands for: itself, or for "auto" the last whole one of the run.

    Raises:
        InputError: the folder that was asked for is not there, or not whole.
    """
    if asked is None:
        return None
    if asked != "auto":
        problem = damage(Path(asked)) if Path(asked).is_dir() else "there is no such folder"
        if problem is not None:
            raise InputError(f"cannot resume from {asked}: {problem}")
        return asked
    for folder in reversed(checkpoints(Path(output_dir))):
        problem = damage(folder)
        if problem is None:
            logger.info("resuming from %s", folder)
            return str(folder)
        logger.warning("skipped %s: %s", folder, problem)
    logger.info("resuming from nothing: %s holds no whole checkpoint", output_dir)
    return None


def check_taxonomy(checkpoint: str, taxonomy: Taxonomy) -> None:
    """Raises InputError where a checkpoint's heads are of another taxonomy: of the same shape, they would fit unseen."""
    if not is_checkpoint(checkpoint):  # shards of FSDP come without a configuration
        return
    known = read_config(checkpoint).tree
    if (known.names, known.parents) != (taxonomy.names, taxonomy.parents):
        raise InputError(
            f"cannot resume from {checkpoint}: it has another taxonomy, or its classes in another order; give the same "
            "--taxonomy, or --overwrite_output_dir true without --resume_from_checkpoint"
        )


def delete_run(output_dir: Path) -> None:
    """Deletes the checkpoints of a run that is overwritten, which would be gone on from, and what it had measured."""
    for folder in checkpoints(output_dir):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    predictions = ("validation_predictions.csv", "test_predictions.csv")
    for pattern in ("metrics.json", *predictions, "plots/*.png", "plots/*.html"):
        for file in output_dir.glob(pattern):
            file.unlink(missing_ok=True)


def is_full_disk(error: Exception) -> bool:
    """Whether a write failed for want of room. safetensors, tokenizers and torch have errors of their own for it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in ("No space left", "os error 28", "PytorchStreamWriter failed"))


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders ``checkpoint-N`` of a run, by N."""
    numbers = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal():
            numbers[int(number)] = folder
    return [numbers[number] for number in sorted(numbers)]


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from going on from a checkpoint, or None."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return "it was not finished: trainer_state.json is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json cannot be read"
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if not sharded and not any((checkpoint / name).is_file() for name in (HEADS_WEIGHTS, "model.safetensors")):
        return "it holds no weights"
    if not any(checkpoint.glob("optimizer*")):
        return "it holds no state of the optimizer (--save_only_model?)"
    for file in checkpoint.rglob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.relative_to(checkpoint)} is damaged"
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} is damaged"
    return None

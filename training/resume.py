"""Which checkpoint a broken run goes on from, and what goes when a run is overwritten.

Worth knowing:

1. trainer_state.json is the last file of a checkpoint to be written, and older checkpoints are deleted after that: a
   process that is killed leaves at most one checkpoint without it, and never none that is whole.
2. A file of torch has its directory at its end, so that a truncated one is recognised without reading it.
"""

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from checkpoint_files import find_damage, is_checkpoint, read_config
from errors import InputError, refusing
from modeling_hierarchical import ADAPTER_SUBFOLDER, HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

ANEW = "or --overwrite_output_dir true without --resume_from_checkpoint"


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
        later = checkpoints(Path(asked).parent) if is_of_run(asked, output_dir=Path(output_dir)) else []
        while later and later[0].name != Path(asked).name:
            later.pop(0)
        if later[1:]:  # which "auto" would take for the continuation
            names = ", ".join(folder.name for folder in later[1:])
            raise InputError(
                f"cannot resume from {asked}: {names} came after it in this run; move them away, or give another --output_dir"
            )
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
            f"--taxonomy, {ANEW}"
        )


def check_data(checkpoint: str, report: dict[str, Any]) -> None:
    """Raises InputError where rows that a run was trained on may be held out now, since they are carved otherwise.

    Args:
        report: of the data, to be compared with the one in the checkpoint's run.
    """
    file = Path(checkpoint).parent / "data_report.json"
    if not file.is_file():
        return
    with refusing(f"{file} cannot be read"):
        known = json.loads(file.read_text(encoding="utf-8"))
        now, before = json.loads(json.dumps(report)), {name: known[name] for name in ("split", "columns", "sources")}
    hashes, hashes_before = (
        [sorted(source["sha256"].values()) for source in one["sources"] if source["split"] != "test"]
        for one in (now, before)
    )
    if not (now["split"]["carved"] or before["split"]["carved"]):
        if hashes != hashes_before:
            logger.warning("the data are others than those that %s was trained on", checkpoint)
        return
    if hashes != hashes_before or any(now[name] != before[name] for name in ("split", "columns")):
        raise InputError(
            f"cannot resume from {checkpoint}: the data, their columns, --seed or the shares of the splits are others, so "
            f"that rows it was trained on would be held out now; give the same, {ANEW}"
        )


def check_model(checkpoint: str, model: HierarchicalForSequenceClassification) -> None:
    """Raises InputError where a checkpoint is of another encoder, adapter or pooling: of the same shape, it would fit unseen."""
    if not is_checkpoint(checkpoint):
        return
    known, config = read_config(checkpoint), model.config
    whole = known.adapter_subfolder is None
    pairs = {
        "--tuning": ("full" if whole else "lora", "lora" if model.has_adapter else "full"),
        "--model_name_or_path": tuple(Path(one.encoder_name_or_path).name for one in (known, config)),
        "--model_revision": (known.encoder_revision, config.encoder_revision),
        "--pooling": (known.pooling, config.pooling),
    }
    if model.has_adapter and not whole:
        own = model.encoder.peft_config["default"]
        path = Path(checkpoint) / ADAPTER_SUBFOLDER / "adapter_config.json"
        with refusing(f"{path} cannot be read"):
            given = json.loads(path.read_text(encoding="utf-8"))
            pairs |= {
                "--lora_r": (given["r"], own.r),
                "--lora_alpha": (given["lora_alpha"], own.lora_alpha),
                "--lora_target_modules": (sorted(given["target_modules"]), sorted(own.target_modules)),
            }
    for flag, (before, now) in pairs.items():
        if before != now:
            raise InputError(
                f"cannot resume from {checkpoint}: it was trained with another {flag}, {before}, not {now}; give the same, {ANEW}"
            )


def delete_run(output_dir: Path) -> None:
    """Deletes the checkpoints of a run that is overwritten, which would be gone on from, and what it had measured."""
    for folder in checkpoints(output_dir):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    delete_measured(output_dir)


def delete_measured(output_dir: Path) -> None:
    """Deletes what was measured in a folder."""
    predictions = ("validation_predictions.csv", "test_predictions.csv")
    for pattern in ("metrics.json", *predictions, "plots/*.png"):
        for file in output_dir.glob(pattern):
            file.unlink(missing_ok=True)


def is_of_run(asked: str | None, output_dir: Path) -> bool:
    """Whether ``--resume_from_checkpoint`` goes on with the run in a folder, rather than beginning one there."""
    return asked == "auto" or (asked is not None and Path(asked).parent.resolve() == output_dir.resolve())


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
    if not any(checkpoint.glob("pytorch_model_fsdp*")):
        problem = find_damage(checkpoint, adapter_form=(checkpoint / ADAPTER_SUBFOLDER).is_dir())
        if problem is not None:
            return problem
    if not any(checkpoint.glob("optimizer*")):
        return "it holds no state of the optimizer (--save_only_model?)"
    if (checkpoint / "optimizer.pt").is_file() and not (checkpoint / "scheduler.pt").is_file():
        return "scheduler.pt is missing"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} is damaged"
    return None

"""Find the checkpoint to resume from; prepare the output folder and clean up an overwritten run.

Worth knowing:

1. trainer_state.json is the last file of a checkpoint to be written, and older checkpoints are deleted after that. A killed
   process leaves at most one checkpoint without it, and always a complete one once there was one.
2. A file of torch has its directory at its end, so that a truncated one is recognised without reading it.
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from checkpoint_files import find_damage, is_checkpoint, read_config
from checkpoint_hierarchical import ADAPTER_SUBFOLDER
from errors import InputError, refusing
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy
from training.arguments import HierarchicalTrainingArguments
from training.files import check_writable
from training.trained_texts import UNTRAINED, TrainedTexts, read_trained_texts, write_trained_texts

logger = logging.getLogger(__name__)

START_ANEW = "or --overwrite_output_dir true without --resume_from_checkpoint"


def check_output_folder(training: HierarchicalTrainingArguments, model: str) -> None:
    """Refuse to overwrite a finished or started run, and to delete the model that a run starts from.

    ``--resume_from_checkpoint auto`` resumes from a complete checkpoint. It starts a run if the folder holds no model yet.
    """
    output = Path(training.output_dir)
    check_writable("--output_dir", output)
    if not output.is_dir():
        return
    resumable = any(damage(folder) is None for folder in checkpoints(output))
    resumes = training.do_train and is_of_run(training.resume_from_checkpoint, output)
    if resumes and (resumable or training.resume_from_checkpoint != "auto"):
        return
    if training.overwrite_output_dir:
        source = Path(model).resolve()
        if training.do_train and any(one.resolve() in (source, *source.parents) for one in checkpoints(output)):
            raise InputError(
                f"--overwrite_output_dir true would delete --model_name_or_path {model}: give another --output_dir"
            )
        return
    has_model = (output / "config.json").exists()
    if has_model and resumes:
        raise InputError(
            f"--output_dir {output} holds a model and no whole checkpoint to resume from: give another --output_dir, or "
            "--overwrite_output_dir true to train anew"
        )
    if has_model or (checkpoints(output) and not resumes):
        remedy = "another --output_dir"
        if training.do_train:
            remedy += " or --overwrite_output_dir true" + ", or --resume_from_checkpoint auto" * resumable
        raise InputError(f"--output_dir {output} already holds a run: give {remedy}")


def read_earlier_texts(model: str, resume_from: str | None) -> TrainedTexts:
    """Read which texts the initial weights were trained on."""
    if resume_from is not None:
        return read_trained_texts(resume_from)
    if not is_checkpoint(model):
        return UNTRAINED
    known = read_trained_texts(model)
    return TrainedTexts(earlier=known.all, complete=known.complete)


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """Find the folder that ``--resume_from_checkpoint`` names. "auto" is the last complete checkpoint of the run.

    Raises:
        InputError: the named folder is missing or incomplete.
    """
    if asked is None:
        return None
    if asked != "auto":
        problem = damage(Path(asked)) if Path(asked).is_dir() else "there is no such folder"
        if problem is not None:
            raise InputError(f"cannot resume from {asked}: {problem}")
        names = [folder.name for folder in checkpoints(Path(asked).parent)]
        later = names[names.index(Path(asked).name) + 1 :] if Path(asked).name in names else []
        if later and is_of_run(asked, Path(output_dir)):  # "auto" would take them for the continuation
            raise InputError(
                f"cannot resume from {asked}: {', '.join(later)} came after it in this run; move them away, or give another --output_dir"
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


def check_resumed_data(checkpoint: str, taxonomy: Taxonomy, report: dict[str, Any]) -> None:
    """Refuse to resume with another taxonomy, or with a split that may hold out rows that the run was trained on.

    Args:
        report: of the data. ``heads_init`` is taken over from the report of the checkpoint's run.
    """
    if is_checkpoint(checkpoint):  # shards of FSDP come without a configuration
        known = read_config(checkpoint).tree
        if (known.names, known.parents) != (
            taxonomy.names,
            taxonomy.parents,
        ):  # of the same shape, it would load silently
            raise InputError(
                f"cannot resume from {checkpoint}: it has another taxonomy, or its classes in another order; give the same "
                f"--taxonomy, {START_ANEW}"
            )
    report["heads_init"] = None
    file = Path(checkpoint).parent / "data_report.json"
    if not file.is_file():
        return
    with refusing(f"{file} cannot be read"):
        before = json.loads(file.read_text(encoding="utf-8"))
        report["heads_init"] = before.get("heads_init")
        now, before = json.loads(json.dumps(report)), {name: before[name] for name in ("split", "columns", "sources")}
    hashes, hashes_before = (
        [sorted(source["sha256"].values()) for source in one["sources"] if source["split"] != "test"]
        for one in (now, before)
    )
    if not (now["split"]["carved"] or before["split"]["carved"]):
        if hashes != hashes_before:
            logger.warning("the data are not those that %s was trained on", checkpoint)
        return
    if hashes != hashes_before or any(now[name] != before[name] for name in ("split", "columns")):
        raise InputError(
            f"cannot resume from {checkpoint}: the data, their columns, --seed or the shares of the splits are others, so "
            f"that rows it was trained on would be held out now; give the same, {START_ANEW}"
        )


def check_model(checkpoint: str, model: HierarchicalForSequenceClassification) -> None:
    """Refuse a checkpoint of another encoder, adapter or pooling. With the same shapes it would load silently."""
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
                f"cannot resume from {checkpoint}: it was trained with another {flag}, {before}, not {now}; give the same, {START_ANEW}"
            )


def start_run(
    trainer: Trainer, model: str, trained_texts: TrainedTexts, texts: Iterable[str], resume_from: str | None
) -> None:
    """Clean up an overwritten run, and record the training texts. All processes wait for it.

    Args:
        model: ``--model_name_or_path``.
        trained_texts: those that the initial weights were trained on.
        texts: of this run's training rows.
    """
    training, output = trainer.args, Path(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()  # all have read the texts of the former run
    if training.should_save:
        resumed = resume_from is not None and is_of_run(training.resume_from_checkpoint, output)
        if training.overwrite_output_dir and not resumed:
            delete_run(output)
            if output.resolve() != Path(model).resolve():
                # if this run is killed, the former weights would be taken for its own
                (output / "config.json").unlink(missing_ok=True)
        write_trained_texts(output, trained_texts, texts)
    trainer.accelerator.wait_for_everyone()


def delete_run(output_dir: Path) -> None:
    """Delete the checkpoints and scores of a run that is overwritten."""
    for folder in checkpoints(output_dir):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    delete_measured(output_dir)


def delete_measured(output_dir: Path) -> None:
    """Delete scores, predictions and plots in a folder."""
    predictions = ("validation_predictions.csv", "test_predictions.csv")
    for pattern in ("metrics.json", *predictions, "plots/*.png"):
        for file in output_dir.glob(pattern):
            file.unlink(missing_ok=True)


def is_of_run(asked: str | None, output_dir: Path) -> bool:
    """Whether ``--resume_from_checkpoint`` continues the run in a folder, rather than starting one there."""
    return asked == "auto" or (asked is not None and Path(asked).parent.resolve() == output_dir.resolve())


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders ``checkpoint-N`` of a run, sorted by N."""
    numbers = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal():
            numbers[int(number)] = folder
    return [numbers[number] for number in sorted(numbers)]


def damage(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint, or None if it can."""
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


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error


def write_json(path: Path, value: dict) -> None:
    new = path.with_name(f"{path.name}.new")  # another process, or a resumed run, never reads half of it
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)

"""Find the checkpoint to resume from, prepare the output folder, and clean up an overwritten run.

trainer_state.json is written last, and older checkpoints are deleted after that. A killed process
leaves at most one checkpoint without trainer_state.json, and never deletes the only complete one.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

from peft import LoraConfig
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import (
    CARD,
    EXPORTED_FILES,
    METRICS,
    SCORE_FILES,
    TRAINED_TEXTS,
    find_damage,
    find_trained_texts,
    is_checkpoint,
    read_config,
    read_json_object,
)
from hierarchical_clinicalbert.data.splits import LabelledSplits
from hierarchical_clinicalbert.data.trained_texts import (
    TrainedTexts,
    read_trained_texts,
    write_trained_texts,
)
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.publishing.card import delete_description
from hierarchical_clinicalbert.training.arguments import HierarchicalTrainingArguments
from hierarchical_clinicalbert.training.model import adapter_settings
from hierarchical_clinicalbert.training.teacher import read_teachers_texts
from modeling_hierarchical import HierarchicalForSequenceClassification

logger = logging.getLogger(__name__)

# besides the model; --save_only_model leaves them out
NEEDED = ("optimizer*", "scheduler.pt", "rng_state*.pth")


def check_output_folder(args: HierarchicalTrainingArguments, model: str) -> None:
    """Raise InputError if ``--output_dir`` already holds a run, the model that this run would
    delete, or a user's own files.

    A resumed run starts anew in a folder with neither model nor complete checkpoint.
    """
    output = Path(args.output_dir)
    checkpoints = list_checkpoints(output)
    has_model = (output / "config.json").exists()
    has_scores = (output / METRICS).exists()

    if has_model and not is_checkpoint(output):
        raise InputError(
            f"--output_dir {output} holds a model that train.py did not write: give another "
            "--output_dir"
        )

    # ── A folder without a run: whose files are these? ────────────────────────────────────────────
    is_started = any((output / name).exists() for name in (TRAINED_TEXTS, "data_report.json"))
    if not (checkpoints or has_model or has_scores or is_started):
        written = [*SCORE_FILES, *([CARD] if args.do_train else [])]
        if own := next(
            (file for pattern in written for file in sorted(output.glob(pattern))), None
        ):
            problem = f"{own}, which a run would overwrite or delete, is not from a run"
            raise InputError(
                f"--output_dir {output}: {problem}: move it, or give another --output_dir"
            )

    # ── A folder with a run: resumed, overwritten, or refused ─────────────────────────────────────
    # scores of a checkpoint replace only scores
    may_overwrite = args.do_train or not (checkpoints or has_model)
    resumable = args.do_train and any(find_resume_problem(folder) is None for folder in checkpoints)
    resumes = args.do_train and continues_run(args.resume_from_checkpoint, output)
    if resumes and resumable:
        return
    if args.overwrite_output_dir and may_overwrite:
        source = Path(model).resolve()
        if any(folder.resolve() in (source, *source.parents) for folder in checkpoints):
            raise InputError(
                f"--overwrite_output_dir true would delete {model}: give another --output_dir"
            )
    elif has_model or has_scores or (checkpoints and not resumes):
        remedies = ["another --output_dir"]
        remedies += ["--overwrite_output_dir true"] if may_overwrite else []
        remedies += ["--resume_from_checkpoint auto"] if resumable else []
        raise InputError(
            f"--output_dir {output} already holds a run: give {', or '.join(remedies)}"
        )


def read_earlier_texts(model: str, resume_from: str | None, teacher: str | None) -> TrainedTexts:
    """Return the texts that the initial weights and the model behind ``--teacher`` were trained
    on.
    """
    if resume_from is not None:
        return read_trained_texts(resume_from)
    is_trained = is_checkpoint(model) or find_trained_texts(
        model
    )  # examples/half_encoder.py writes an encoder with its texts
    trained = [read_trained_texts(model)] if is_trained else []
    if teacher is not None:
        trained.append(read_teachers_texts(teacher))
    validation = frozenset().union(*(one.validation for one in trained))
    return TrainedTexts(
        earlier=frozenset().union(*(one.all for one in trained)),
        validation=validation,
        earlier_validation=validation,
        complete=all(one.complete for one in trained),
    )


def continues_run(requested: str | None, output: Path) -> bool:
    """Return whether ``--resume_from_checkpoint`` continues the run in a folder instead of starting
    a new one there.
    """
    return requested is not None and (
        requested == "auto" or Path(requested).parent.resolve() == output.resolve()
    )


def find_checkpoint(requested: str, output_dir: str) -> str | None:
    """Return the folder of ``--resume_from_checkpoint``. "auto" selects the last complete
    checkpoint of the run, if any.
    """
    if requested != "auto":
        problem = (
            find_resume_problem(Path(requested))
            if Path(requested).is_dir()
            else "there is no such folder"
        )
        if problem is not None:
            raise InputError(f"cannot resume from {requested}: {problem}")
        return requested
    for folder in reversed(list_checkpoints(Path(output_dir))):
        problem = find_resume_problem(folder)
        if problem is None:
            logger.info("resuming from %s", folder)
            return str(folder)
        logger.warning("skipped %s: %s", folder, problem)
    logger.info("starting a new run: %s holds no complete checkpoint", output_dir)
    return None


def read_data_report(checkpoint: str) -> dict[str, Any]:
    """Return the data report of the run to resume, empty if it has none."""
    file = Path(checkpoint).parent / "data_report.json"
    return read_json_object(file) if file.is_file() else {}


def check_resumed_data(checkpoint: str, report: dict[str, Any]) -> None:
    """Raise InputError if the run to resume had other training or validation rows or labels than a
    data report.
    """
    stored = read_data_report(checkpoint)
    with as_input_error(f"the data report of the run of {checkpoint} cannot be used"):
        is_same = not stored or trained_data(stored) == trained_data(report)
    if not is_same:
        remedy = "give the same data, columns, names, --taxonomy, --seed and split sizes"
        refuse_to_resume(checkpoint, f"it was trained on other rows or labels; {remedy}")


def trained_data(report: dict[str, Any]) -> list:
    """Return what a data report says of the training and validation rows: split, columns, and
    hashes of the files.
    """
    split = {name: value for name, value in report["split"].items() if name != "seed"}
    hashes = [
        sorted(source["sha256"].values())
        for source in report["sources"]
        if source["split"] != "test"
    ]
    return [split, report["columns"], hashes]


def check_model(checkpoint: str, model: HierarchicalForSequenceClassification) -> None:
    """Raise InputError if a checkpoint has another taxonomy, encoder, adapter or pooling, whose
    weights might load silently.
    """
    if not is_checkpoint(checkpoint):  # shards of FSDP have no configuration
        return
    config = read_config(checkpoint)
    adapter = None
    if config.adapter_subfolder is not None:
        adapter = LoraConfig.from_pretrained(Path(checkpoint) / config.adapter_subfolder)
    if (config.tree.names, config.tree.parents) != (
        model.config.tree.names,
        model.config.tree.parents,
    ):
        refuse_to_resume(
            checkpoint,
            "it has another taxonomy, or another order of classes; give the same --taxonomy",
        )
    now = model_settings(
        model.config, model.encoder.peft_config["default"] if model.has_adapter else None
    )
    for flag, before in model_settings(config, adapter).items():
        if before != now[flag]:
            problem = (
                f"it was trained with another --{flag}, {before}, not {now[flag]}; give the same"
            )
            refuse_to_resume(checkpoint, problem)


def model_settings(config: HierarchicalConfig, adapter: LoraConfig | None) -> dict[str, Any]:
    """Return the settings that weights depend on, by the flags that give them."""
    settings = {
        "tuning": "full" if adapter is None else "lora",
        "model_name_or_path": Path(config.encoder_name_or_path).name,
        "model_revision": config.encoder_revision,
        "pooling": config.pooling,
        "problem_type": config.problem_type,
    }
    return settings | adapter_settings(adapter) if adapter else settings


def refuse_to_resume(checkpoint: str, problem: str) -> NoReturn:
    remedy = "or --overwrite_output_dir true without --resume_from_checkpoint"
    raise InputError(f"cannot resume from {checkpoint}: {problem}, {remedy}")


def find_best_checkpoint(
    args: TrainingArguments, state: TrainerState, checkpoint: str
) -> str | None:
    """Return the best checkpoint of a resumed run.

    Its folder may have moved since its path was stored.
    """
    if state.best_model_checkpoint is None:
        return None
    best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)
    if args.load_best_model_at_end:
        name = args.metric_for_best_model
        entries = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
        if state.best_metric not in [
            entry.get(f"eval_{name.removeprefix('eval_')}") for entry in entries
        ]:
            problem = (
                f"--metric_for_best_model {name} did not select its best checkpoint; give the same"
            )
            refuse_to_resume(checkpoint, problem)
        if not best.is_dir():
            problem = f"the best checkpoint of its run, {best.name}, is not in the same folder"
            remedy = "move it there, or give --load_best_model_at_end false"
            raise InputError(f"cannot resume from {checkpoint}: {problem}; {remedy}")
    return str(best) if best.is_dir() else None


def start_run(trainer: Trainer, data: LabelledSplits, resume_from: str | None) -> None:
    """Clean up an overwritten run and record the training texts, while all processes wait."""
    args = trainer.args
    output = Path(args.output_dir)
    trainer.accelerator.wait_for_everyone()  # until all have read the texts of the earlier run
    if args.should_save:
        if args.overwrite_output_dir and (
            resume_from is None or not continues_run(resume_from, output)
        ):
            delete_run(output, trainer.model.name_or_path)
        texts, validation = (
            data.splits[name]["text"] if name in data.splits else []
            for name in ("train", "validation")
        )
        write_trained_texts(
            output, data.trained_texts, [*texts, *data.unlabelled.values()], validation
        )
    trainer.accelerator.wait_for_everyone()


def delete_run(output: Path, model: str) -> None:
    """Delete a run's checkpoints, description and configuration.

    ``output`` may be the folder of the initial ``model``, which is empty for an encoder.
    """
    for folder in list_checkpoints(output):
        shutil.rmtree(folder)
    delete_description(output)
    for name in EXPORTED_FILES:  # exports of the earlier weights
        (output / name).unlink(missing_ok=True)
    # else the earlier weights would pass for those of a killed new run
    if not model or output.resolve() != Path(model).resolve():
        (output / "config.json").unlink(missing_ok=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders ``checkpoint-N`` of a run, sorted by N."""
    folders = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(
        filter(Path.is_dir, folders),
        key=lambda folder: int(folder.name.removeprefix("checkpoint-")),
    )


def find_resume_problem(checkpoint: Path) -> str | None:
    """Return why a run cannot resume from a checkpoint, or None if it can."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"it is incomplete: {TRAINER_STATE_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} cannot be read"
    is_sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    damage = None if is_sharded else find_damage(checkpoint)
    missing = [f"{pattern} is missing" for pattern in NEEDED if not any(checkpoint.glob(pattern))]
    return damage or next(iter(missing), None)

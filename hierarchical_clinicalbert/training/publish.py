"""Collect the settings and facts of a run for its model card, and push its files to the Hub."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.publishing import card
from hierarchical_clinicalbert.publishing.hub import (
    Target,
    find_target,
    log_in,
    refuse_local_encoder,
)
from hierarchical_clinicalbert.training.arguments import HierarchicalTrainingArguments
from hierarchical_clinicalbert.training.loop import TrainingLoop
from hierarchical_clinicalbert.training.model import adapter_settings
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy


def run_settings(trainer: TrainingLoop, heads_init: str | None) -> dict[str, Any]:
    """Return the settings of a run for its card.

    A continued adapter keeps its own rank and scale. If ``heads_init`` is None, trained heads were
    kept, and there were no contrastive steps.
    """
    args = trainer.args
    model = trainer.model
    config = model.config
    settings = {
        "model_name_or_path": model.name_or_path or config.encoder_name_or_path,
        "quantization": quantization_of(model),
        "tuning": "lora" if model.has_adapter else "full",
        "lora_r": None,
        "lora_alpha": None,
        "pooling": config.pooling,
        **{name: getattr(args, name) for name in card.TRAINING_SETTINGS},
        "max_length": config.calibration.max_length,
        "heads_init": heads_init,
        "contrastive_steps": None if heads_init is None else args.contrastive_steps,
        "train_precision": args.precision,
    }
    if args.teacher is None:
        settings |= {"teacher_weight": None, "teacher_temperature": None}
    else:
        settings["teacher"] = Path(args.teacher).name
    if model.has_adapter:
        settings |= adapter_settings(model.encoder.peft_config["default"])
    return settings


def quantization_of(model: HierarchicalForSequenceClassification) -> str:
    """Return how the encoder's weights are stored: "4bit", "8bit" or "none"."""
    for bits in ("4bit", "8bit"):
        if getattr(model.encoder, f"is_loaded_in_{bits}", False):
            return bits
    return "none"


def run_facts(trainer: TrainingLoop, data_report: dict[str, Any]) -> dict[str, Any]:
    """Return facts of a run for metrics.json: precision, environment and hashes of the data
    files.
    """
    # no paths: they are published
    hashes = {source["split"]: source["sha256"] for source in data_report["sources"]}
    return {
        "train_precision": trainer.args.precision,
        "train_quantization": quantization_of(trainer.model),
        "environment": {**describe_environment(trainer.args.device), "data": hashes},
    }


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine as ``hardware`` (text) and ``versions`` (by library), without names of
    hosts or users.

    With data parallelism, all processes are assumed to have a ``device`` like that of this one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{torch.cpu.get_capabilities()['cpu_name']}, {cores} cores"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        gpus = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        hardware = f"{gpus} × {gpu.name} ({gpu.total_memory / 2**30:.0f} GiB); {hardware}"
    elif device.type != "cpu":
        hardware = f"{device.type} device; {hardware}"
    versions = {
        library: version(library) for library in ("torch", "transformers", "peft", "bitsandbytes")
    }
    return {"hardware": hardware, "versions": {"python": platform.python_version(), **versions}}


def describe_page(
    args: HierarchicalTrainingArguments, config: HierarchicalConfig
) -> dict[str, Any]:
    """Return what card and page show, see `HierarchicalConfig`: as the flags say, else as in the
    continued checkpoint, else by default.
    """
    default = {
        "title": card.default_title(config.tree),
        "medical": config.tree == Taxonomy(DEFAULT_TAXONOMY),
    }
    given = {"title": args.title, "medical": args.medical}
    return (
        default | config.page | {name: value for name, value in given.items() if value is not None}
    )


def check_hub(
    args: HierarchicalTrainingArguments,
    model: HierarchicalForSequenceClassification,
    repo_id: str | None = None,
) -> Target:
    """Return the repository to push to. Raise InputError if it cannot be written to, or the
    adapter's encoder is a local folder.
    """
    if model.has_adapter:
        refuse_local_encoder(
            model.config, "train without --push_to_hub, then run push_to_hub.py --merge"
        )
    api = HfApi(token=args.hub_token)
    name = repo_id or args.hub_model_id or Path(args.output_dir).resolve().name
    private = bool(args.hub_private_repo)
    return find_target(
        api, log_in(api), "--hub_model_id", name, revision=args.hub_revision, private=private
    )

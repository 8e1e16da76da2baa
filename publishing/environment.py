"""Describe the hardware and software of a run, and read its emissions."""

import csv
import math
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """Describe the machine as ``hardware`` (text) and ``versions`` (by library), without names of hosts or users.

    Args:
        device: of training. With data parallelism, every process is assumed to have an equal device.
    """
    device, info = torch.device(device), Path("/proc/cpuinfo")
    cpu = re.search(r"(?m)^model name\s*:\s*(.+)$", info.read_text(errors="replace")) if info.is_file() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{cpu[1] if cpu else platform.processor() or platform.machine()}, {cores} cores"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        gpus = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        hardware = f"{gpus} × {gpu.name} ({gpu.total_memory / 2**30:.0f} GiB); {hardware}"
    elif device.type != "cpu":
        hardware = f"{device.type} device; {hardware}"
    versions = {"python": platform.python_version()}
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"hardware": hardware, "versions": versions}


def read_emissions(folder: Path, metrics: dict[str, Any], environment: dict[str, Any] | None) -> dict[str, Any] | None:
    """Read the Hub's ``co2_eq_emissions``, in grams, from codecarbon's emissions.csv, in kilograms.

    Every run in a folder appends a row. A last row with another duration belongs to an earlier run.

    Returns:
        None if emissions.csv has no valid row of this run.
    """
    path, runtime = folder / "emissions.csv", metrics.get("train_runtime")
    if runtime is None or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            row = list(csv.DictReader(file))[-1]
        kilograms, same_run = float(row["emissions"]), abs(float(row["duration"]) - runtime) <= 60 + 0.1 * runtime
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    if not same_run or not math.isfinite(kilograms):
        return None
    emissions = {
        "emissions": round(1000 * kilograms, 6),
        "source": f"CodeCarbon {row.get('codecarbon_version') or ''}".strip(),
        "training_type": "fine-tuning",
        "geographical_location": row.get("country_name"),
        "hardware_used": environment and environment["hardware"],
    }
    return {name: value for name, value in emissions.items() if value not in (None, "")}

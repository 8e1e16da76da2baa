"""Describe the hardware and software of a run."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """Describe the machine as ``hardware`` (text) and ``versions`` (by library), without names of hosts or users.

    Args:
        device: the device of training. With data parallelism, all processes are assumed to have equal devices.
    """
    device = torch.device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{torch.cpu.get_capabilities()['cpu_name']}, {cores} cores"
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

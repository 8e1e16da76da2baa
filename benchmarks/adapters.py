"""Measure a process that serves many checkpoints over one encoder: ``python benchmarks/adapters.py
--checkpoint FOLDER``.

Each of ``--count`` checkpoints is a copy of one in adapter form. "merged" loads each as usual, so
each has an encoder of its own. "shared" loads each with ``merge_adapter=False``, and all use the
encoder of the first (`share_encoder`). Memory is the growth of the proportional set size of a
process that loads all checkpoints; mapped files count once. All run with the pipeline's kernels,
which pack the weights once more. "Alternating" classifies one text by each checkpoint in turn, and
"repeated" by the first alone. The difference of both is the cost of switching. Linux only.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from harness import RESULTS, ROOT, flag_parser, run_alone, write_results
from transformers import AutoModel

from checkpoint_hierarchical import SHIPPED_FILES
from pipeline_hierarchical import use_cpu_kernels

TOKENS = 256


def serve(mode: str, folders: list[Path], rounds: int) -> dict[str, float]:
    """Load checkpoints, classify one text by each, and return times in milliseconds and memory in
    MiB.
    """
    # loaded before the measurement, to import PEFT and the code of the checkpoints
    AutoModel.from_pretrained(folders[0], trust_remote_code=True, merge_adapter=False)
    process = psutil.Process()
    models = []
    milliseconds = []
    before = process.memory_full_info().pss  # pages that are mapped several times count once
    inputs = {
        "input_ids": torch.arange(TOKENS)[None] % 99 + 5,
        "attention_mask": torch.ones(1, TOKENS).long(),
    }

    def classify(model: torch.nn.Module) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model(**inputs)
        return 1000 * (time.perf_counter() - started)

    for folder in folders:
        started = time.perf_counter()
        model = AutoModel.from_pretrained(
            folder, trust_remote_code=True, merge_adapter=mode == "merged"
        )
        if mode == "shared" and models:
            model.share_encoder(models[0])
        use_cpu_kernels(model.encoder)
        milliseconds.append(1000 * (time.perf_counter() - started))
        models.append(model)
    for model in models:  # the first forward reads weights that are mapped files
        classify(model)
    return {
        "memory": (process.memory_full_info().pss - before) / 2**20,
        "load": statistics.median(milliseconds[1:]),
        "repeated": statistics.median(classify(models[0]) for _ in range(rounds * len(models))),
        "alternating": statistics.median(
            classify(model) for _ in range(rounds) for model in models
        ),
    }


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the folder of a checkpoint in adapter form"
    )
    parser.add_argument("--count", type=int, default=20, help="checkpoints in the process")
    parser.add_argument("--rounds", type=int, default=5, help="texts for each checkpoint")
    parser.add_argument("--serve", choices=("merged", "shared"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        print(
            json.dumps(
                serve(arguments.serve, sorted(arguments.checkpoint.iterdir()), arguments.rounds)
            )
        )
        return
    result = {"count": arguments.count}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(arguments.count):
            left_out = shutil.ignore_patterns("checkpoint-*", "plots")
            copied = shutil.copytree(
                arguments.checkpoint, Path(scratch) / f"copy_{i:03}", ignore=left_out
            )
            for name in SHIPPED_FILES:  # the current code
                shutil.copy(ROOT / name, copied)
        for mode in ("merged", "shared"):
            words = ("--checkpoint", scratch, "--serve", mode, "--rounds", arguments.rounds)
            result[mode] = measured = run_alone(__file__, *words)
            print(
                f"{mode:8}",
                "  ".join(f"{name} {value:.1f}" for name, value in measured.items()),
                flush=True,
            )
    write_results(RESULTS / "adapters.json", result)


if __name__ == "__main__":
    main()

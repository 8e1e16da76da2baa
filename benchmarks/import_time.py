"""Measure what ``import modeling_hierarchical`` adds to ``import transformers``: ``python benchmarks/import_time.py``.

Fresh processes alternate, so that load on the machine affects both. The parts of transformers that the model needs (torch, its
model classes) are imported lazily by transformers. They are counted separately, because every model needs them.
"""

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7
USED = "from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel"
STAGES = {
    "import transformers": "import transformers",
    "… and what any model needs of it": f"import torch; import safetensors.torch; {USED}",
    "… and import modeling_hierarchical": f"import torch; import safetensors.torch; {USED}; import modeling_hierarchical",
}


def seconds(code: str) -> float:
    """Return the seconds that code takes in a fresh process."""
    timed = f"import time; started = time.perf_counter(); {code}; print(time.perf_counter() - started)"
    done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


def main() -> None:
    for code in STAGES.values():
        seconds(code)  # compile to bytecode, and fill the disk cache
    measured: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(ROUNDS):
        for name, code in STAGES.items():
            measured[name].append(seconds(code))
    print("| in a fresh process | seconds, median (lowest – highest) |")
    print("| --- | ---: |")
    for name, times in measured.items():
        print(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f} – {max(times):.2f}) |")


if __name__ == "__main__":
    main()

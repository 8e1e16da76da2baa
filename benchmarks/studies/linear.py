"""Time one linear layer of an encoder on one core: in float32, bfloat16 and int8, by each library that torch can call.

    pip install torchao
    python benchmarks/studies/linear.py

- float32: torch's own layer, which calls MKL, and the packed weights of ``cpu_hierarchical.py`` (oneDNN);
- bfloat16: the same two, both by oneDNN;
- int8: torchao without a compiler, and `prediction.int8` with inputs and outputs in float32 or bfloat16. Both quantize each
  token of the input.

The freed memory of the outputs is kept, as in predict.py. ``ONEDNN_MAX_CPU_ISA=AVX2_VNNI`` and ``ATEN_CPU_CAPABILITY=avx2``
hold the instruction set down to that of a laptop.

The last column is for "2026-11-28: int8 between bfloat16 operations".
Supports docs/experiments.md, "2026-11-28: int8 and float32 products without torchao and MKL".
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cpu_hierarchical import PackedLinear, packable_dtypes
from prediction.int8 import Int8Linear
from prediction.model import KEPT_MEMORY
from training.memory import keep_memory

TOKENS = 1024
LAYERS = {  # inputs, outputs
    "MiniLM, attention": (384, 384),
    "MiniLM, feed-forward up": (384, 1536),
    "MiniLM, feed-forward down": (1536, 384),
    "BERT base, feed-forward up": (768, 3072),
}
RUNS, WARM_UP = 100, 10


def main() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.set_num_threads(1)
    keep_memory(*KEPT_MEMORY)
    names = ["float32, MKL", "float32, packed", "bfloat16", "bfloat16, packed", "int8, torchao", "int8, this project"]
    names += ["int8 in bfloat16"]
    print("| layer | " + " | ".join(f"{name}, ms" for name in names) + " |\n| --- |" + " ---: |" * len(names))
    for layer, (inputs, outputs) in LAYERS.items():
        torch.manual_seed(0)
        plain = nn.Linear(inputs, outputs)
        packed, by_torchao = copy.deepcopy(plain), nn.Sequential(copy.deepcopy(plain))
        packed.__class__ = PackedLinear
        quantize_(by_torchao, Int8DynamicActivationInt8WeightConfig())
        tokens = torch.randn(TOKENS, inputs)
        timed = {"float32, MKL": (plain, tokens), "float32, packed": (packed, tokens)}
        timed |= {"int8, torchao": (by_torchao, tokens), "int8, this project": (Int8Linear(plain), tokens)}
        if torch.bfloat16 in packable_dtypes():
            half = [copy.deepcopy(one).bfloat16() for one in (plain, packed)]
            timed |= {name: (one, tokens.bfloat16()) for name, one in zip(names[2:4], half, strict=True)}
            timed["int8 in bfloat16"] = Int8Linear(half[0]), tokens.bfloat16()
        cells = [f"{milliseconds(*timed[name]):.2f}" if name in timed else "" for name in names]
        print(f"| {layer} | " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def milliseconds(layer: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(WARM_UP + RUNS):
        begun = time.perf_counter()
        layer(tokens)
        seconds.append(time.perf_counter() - begun)
    return 1000 * statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    main()

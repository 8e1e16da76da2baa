"""Time one linear layer of an encoder on one core: in float32, bfloat16 and int8, by each library that torch can call.

    pip install torchao
    python benchmarks/studies/linear.py

- float32: torch's own layer, which calls MKL, and the packed weights of ``cpu_hierarchical.py`` (oneDNN);
- bfloat16: the same two, both by oneDNN;
- int8: torchao without a compiler, and `prediction.int8` with inputs and outputs in float32 or bfloat16. Both quantize each
  token of the input.

The freed memory of the outputs is kept, as in predict.py. ``ONEDNN_MAX_CPU_ISA=AVX2_VNNI`` and ``ATEN_CPU_CAPABILITY=avx2``
limit the instruction set to that of a laptop.

A second table compares ways to combine packed bfloat16 products. Each way alternates with "as now":

- row hint: the weight is packed for `TOKENS` rows, as torch.compile packs it;
- one product: query, key and value as one product of three times the width, instead of three products;
- sum inside: the residual sum inside the product, instead of an operation after it.

The last column of the first table is for "2026-11-28: int8 between bfloat16 operations", and the second table for "2026-11-29:
Row hints, one product for query, key and value, and residual sums inside products".
Supports docs/experiments.md, "2026-11-28: int8 and float32 products without torchao and MKL".
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cpu_hierarchical import ONEDNN, PackedLinear, packable_dtypes
from machine import keep_memory
from prediction.int8 import Int8Linear
from prediction.model import KEPT_MEMORY

TOKENS = 1024
LAYERS = {  # inputs, outputs
    "MiniLM, attention": (384, 384),
    "MiniLM, feed-forward up": (384, 1536),
    "MiniLM, feed-forward down": (1536, 384),
    "BERT base, feed-forward up": (768, 3072),
}
ENCODERS = {"MiniLM": (384, 1536), "BERT base": (768, 3072)}  # hidden size, intermediate size
RUNS, WARM_UP, ROUNDS = 100, 10, 5


def main() -> None:
    torch.set_num_threads(1)
    keep_memory(*KEPT_MEMORY)
    print_products()
    if torch.bfloat16 in packable_dtypes():
        print_combinations()


def print_products() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

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
        cells = [f"{milliseconds(partial(*timed[name])):.2f}" if name in timed else "" for name in names]
        print(f"| {layer} | " + " | ".join(cells) + " |", flush=True)


def print_combinations() -> None:
    print("\n| products | as now, ms | changed, ms | times as long |\n| --- | ---: | ---: | ---: |")
    for encoder, sizes in ENCODERS.items():
        for name, (now, changed) in combinations(*sizes).items():
            times = [(milliseconds(now), milliseconds(changed)) for _ in range(ROUNDS)]
            before, after = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {encoder}, {name} | {before:.2f} | {after:.2f} | {after / before:.2f} |", flush=True)


def combinations(size: int, inner: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return, for each way to combine products, the current products and the changed ones."""
    tokens, wide, residual = (torch.randn(TOKENS, width).bfloat16() for width in (size, inner, size))
    projections = [packed_linear(size, size) for _ in range(3)]
    together, up, down = packed_linear(size, 3 * size), packed_linear(size, inner), packed_linear(inner, size)
    up_hinted = ONEDNN._reorder_linear_weight(up.weight.detach(), TOKENS)
    down_packed = ONEDNN._reorder_linear_weight(down.weight.detach())
    return {
        "feed-forward up, row hint": (
            lambda: up(tokens),
            lambda: ONEDNN._linear_pointwise(tokens, up_hinted, up.bias, "none", [], "none"),
        ),
        "query, key and value, one product": (
            lambda: [projection(tokens) for projection in projections],
            lambda: together(tokens).view(TOKENS, 3, size).unbind(1),
        ),
        "feed-forward down, sum inside": (
            lambda: down(wide) + residual,
            lambda: ONEDNN._linear_pointwise.binary(wide, residual, down_packed, down.bias, "add"),
        ),
    }


def packed_linear(inputs: int, outputs: int) -> PackedLinear:
    """Return a bfloat16 layer that packs its weight at its first forward pass."""
    return PackedLinear(inputs, outputs, dtype=torch.bfloat16)


@torch.no_grad()
def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(WARM_UP + RUNS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    main()

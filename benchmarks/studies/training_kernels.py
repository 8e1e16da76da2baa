"""Time changes to the operations of a LoRA training step, forward and backward, on one core:

    python benchmarks/studies/training_kernels.py

- attention: SDPA in the forward pass, whose log-sum-exp gives the backward pass its probabilities, instead of this project's
  attention in both;
- weight kept: the merged weight of a layer is kept from the forward to the backward pass, instead of being computed twice.

Each change alternates with "as now". The last column is the norm of the difference of all gradients, divided by their norm.

Supports docs/experiments.md, "2026-11-30: SDPA in the forward pass, and merged weights that are kept".
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cpu_hierarchical import PerDocumentAttention, padded
from machine import keep_memory
from prediction.model import KEPT_MEMORY
from training.cpu import MergedLinear, merged_weight

ENCODERS = {"MiniLM": (384, 1536, 12), "BERT base": (768, 3072, 12)}  # hidden size, intermediate size, heads
DOCUMENTS, RANK, ROUNDS, RUNS = 8, 64, 7, 3
LENGTHS = (128, 256, 384, 512)


class SdpaForward(torch.autograd.Function):
    """Compute the attention of `PerDocumentAttention` by SDPA, and its gradients from the log-sum-exp that SDPA returns."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: list[slice], scaling: float) -> Tensor:
        output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        logsumexps = []
        for i, span in enumerate(spans):
            q, k, v = (tensor[i : i + 1, :, span] for tensor in (query, key, value))
            rows, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scaling)
            output[i, span] = rows[0].transpose(0, 1)
            logsumexps.append(logsumexp[0].unsqueeze(-1))
        ctx.save_for_backward(query, key, value, *logsumexps)
        ctx.spans, ctx.scaling = spans, scaling
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *logsumexps = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(d_output, memory_format=torch.contiguous_format) for _ in range(3))
        for i, (span, logsumexp) in enumerate(zip(ctx.spans, logsumexps, strict=True)):
            n = span.stop - span.start
            q, k, v = (padded(tensor[i, :, span]) for tensor in (query, key, value))
            q.mul_(ctx.scaling)
            do = padded(d_output[i, span].transpose(0, 1))
            p = (q @ k.transpose(1, 2)).sub_(padded(logsumexp).to(q.dtype)).exp_()
            p[:, :, n:] = 0
            dv[i, span] = (p.transpose(1, 2) @ do)[:, :n].transpose(0, 1)
            ds = torch._softmax_backward_data(do @ v.transpose(1, 2), p, -1, p.dtype)
            dq[i, span] = (ds @ k)[:, :n].mul_(ctx.scaling).transpose(0, 1)
            dk[i, span] = (ds.transpose(1, 2) @ q)[:, :n].transpose(0, 1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


class KeptWeight(MergedLinear):
    """Keep the merged weight from the forward to the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        weight = merged_weight(base, a, b, scaling)
        ctx.save_for_backward(x, a, b, weight)
        ctx.scaling = scaling
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, a, b, weight = ctx.saved_tensors
        da, db = ((dy @ b).T @ x).float() * ctx.scaling, (dy.T @ (x @ a.T)).float() * ctx.scaling
        return dy @ weight, da, db, None, None, None


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory(*KEPT_MEMORY)
    print("| operation | as now, ms | changed, ms | times as long | difference of gradients |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for encoder, (size, inner, heads) in ENCODERS.items():
        for length in LENGTHS:
            shape = DOCUMENTS, heads, length, size // heads
            inputs = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
            rest = [[slice(0, length)] * DOCUMENTS, shape[-1] ** -0.5]
            compare(f"{encoder}, attention, {length} tokens", PerDocumentAttention, SdpaForward, inputs, rest)
        for name, base in {
            "LoRA": nn.Linear(size, inner, bias=False).bfloat16(),
            "QLoRA": four_bits(size, inner),
        }.items():
            inputs = [
                torch.randn(shape).requires_grad_() for shape in ((DOCUMENTS * 300, size), (RANK, size), (inner, RANK))
            ]
            inputs[0] = inputs[0].detach().bfloat16().requires_grad_()
            rest = [base, 0.01, torch.bfloat16]
            compare(f"{encoder}, feed-forward up, {name}, weight kept", MergedLinear, KeptWeight, inputs, rest)


def four_bits(size: int, inner: int) -> nn.Linear:
    return Linear4bit(size, inner, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")


def compare(name: str, now: type, changed: type, inputs: list[Tensor], rest: list) -> None:
    """Time the current and the changed function, and print a line of the table."""
    gradients = [torch.cat([one.flatten() for one in step(way, inputs, rest)]) for way in (now, changed)]
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    times = [[milliseconds(lambda way=way: step(way, inputs, rest)) for way in (now, changed)] for _ in range(ROUNDS)]
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(one[1] / one[0] for one in times)
    print(f"| {name} | {before:.1f} | {after:.1f} | {ratio:.2f} | {difference:.4f} |", flush=True)


def step(way: Any, inputs: list[Tensor], rest: list) -> list[Tensor]:
    """Return the gradients of all inputs, in float32."""
    output = way.apply(*inputs, *rest)
    return [one.float() for one in torch.autograd.grad(output, inputs, torch.ones_like(output))]


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(RUNS):
        call()
    return 1000 * (time.perf_counter() - started) / RUNS


if __name__ == "__main__":
    main()

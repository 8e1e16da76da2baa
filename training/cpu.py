"""Make LoRA steps fast on a CPU with bfloat16 products, with the values of PEFT and SDPA.

Worth knowing:

1. A layer multiplies by W + s·B·A, computed for each product, instead of running the adapter beside the layer. Computing it
   takes about 4 % of a step. Beside the layer, casts and sums over all tokens took a fifth.
2. Merged weights are not stored: the backward pass computes them again, so a 4-bit encoder stays small.
3. Attention runs document by document, without padding (`cpu_hierarchical`).
4. Frozen tables are held in bfloat16, and so are the activations between layers. Autocast would cast them at every product.

What was tried without gain is in docs/experiments.md.
"""

import types

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from cpu_hierarchical import attend_by_document


def speed_up(encoder: PreTrainedModel) -> None:
    """Prepare an encoder with an injected LoRA adapter for bfloat16 training on a CPU, in place.

    8-bit layers and adapters with dropout stay as they are.
    """
    adapted = [module for module in encoder.modules() if isinstance(module, LoraLayer)]
    for layer in adapted:
        if can_merge(layer):
            layer.forward = types.MethodType(merged_forward, layer)
    for parameter in encoder.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        if not packed and not parameter.requires_grad and parameter.dim() > 1 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    attend_by_document(encoder)


def can_merge(layer: LoraLayer) -> bool:
    """Whether a layer is a plain LoRA over a 4-bit or a floating-point `nn.Linear`."""
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    plain = isinstance(layer.lora_dropout[name], nn.Identity) and not layer.lora_variant and not layer.lora_bias[name]
    return plain and (isinstance(base, Linear4bit) or type(base) is nn.Linear)


def merged_forward(self: LoraLayer, x: Tensor) -> Tensor:
    """Forward of an adapted layer, (…, in) to (…, out). PEFT's own forward runs if the adapter is disabled or merged."""
    if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
        return type(self).forward(self, x)
    name = self.active_adapters[0]
    factors = (self.lora_A[name].weight, self.lora_B[name].weight)
    y = MergedLinear.apply(x.reshape(-1, x.shape[-1]), *factors, self.get_base_layer(), self.scaling[name])
    # a view made out here: Longformer changes it in place, which torch forbids for one that a Function returns
    return y.view(*x.shape[:-1], -1)


def merged_weight(base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + s·B·A, (out, in), in the type of ``a``."""
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight if state is None else dequantize_4bit(base.weight.data, state)
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scaling)


class MergedLinear(torch.autograd.Function):
    """y = x · (W + s·B·A)ᵀ + bias, (N, in) to (N, out), with gradients of x, A and B (Hu et al., 2021, equation 3), in bfloat16."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scaling: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, a, b = x.bfloat16(), a.bfloat16(), b.bfloat16()
            ctx.save_for_backward(x, a, b)
            ctx.base, ctx.scaling = base, scaling
            bias = None if base.bias is None else base.bias.bfloat16()
            return nn.functional.linear(x, merged_weight(base, a, b, scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, a, b = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ merged_weight(ctx.base, a, b, ctx.scaling)
        da = ((dy @ b).T @ x).float() * ctx.scaling  # (r, in)
        db = (dy.T @ (x @ a.T)).float() * ctx.scaling  # (out, r)
        return dx, da, db, None, None

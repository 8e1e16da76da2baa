"""Speed up LoRA training steps on a CPU. Outputs and gradients match PEFT and SDPA.

An adapted layer multiplies by the merged weight W + s·B·A, which takes about 4 % of a step to
compute; PEFT's separate branch took a fifth. Merged weights are not stored: the backward pass
recomputes them, so a 4-bit encoder stays small. Processors with bfloat16 products keep frozen
tables and the activations between layers in bfloat16. Autocast would cast them at every product.
Other processors would emulate bfloat16, which is slow, and stay in float32.
"""

import logging
import types
from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# arguments of `keep_memory`: each step allocates and frees the same blocks
KEPT_MEMORY = (2**30, 2**31 - 1)


def use_training_kernels(encoder: PreTrainedModel, dtype: torch.dtype) -> None:
    """Prepare an encoder with an injected LoRA adapter for training on a CPU, in place, with
    products in ``dtype``.
    """
    for module in encoder.modules():
        if isinstance(module, LoraLayer):
            has_dropout = not isinstance(module.lora_dropout["default"], nn.Identity)
            if type(module.get_base_layer()) in (Linear4bit, nn.Linear) and not has_dropout:
                module.forward = types.MethodType(partial(merged_forward, dtype=dtype), module)
    for parameter in encoder.parameters():  # packed 4-bit weights are uint8
        if not parameter.requires_grad and parameter.dim() > 1 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    if dtype == torch.float32:
        return  # where SDPA is as fast
    try:
        from cpu_hierarchical import attend_by_document

        attend_by_document(encoder)
    # `cpu_hierarchical` uses private names of torch and transformers, which may change
    except Exception as error:
        problem = f"which does not fit this torch or transformers ({type(error).__name__}: {error})"
        logger.warning(
            "training without the faster CPU attention, %s; results are the same", problem
        )


def merged_forward(self: LoraLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply by the merged weight, (…, in) to (…, out).

    With a disabled or merged adapter, call PEFT's own forward.
    """
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x)
    a = self.lora_A["default"].weight
    b = self.lora_B["default"].weight
    y = MergedLinear.apply(
        x.reshape(-1, x.shape[-1]), a, b, self.get_base_layer(), self.scaling["default"], dtype
    )
    # the view is made here: Longformer changes it in place, and torch forbids that for a view that
    # a Function returns
    return y.view(*x.shape[:-1], y.shape[-1])  # not -1: some inputs of X-MOD have no rows


def merged_weight(base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return W + s·B·A, (out, in), in the dtype of ``a``."""
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight if state is None else dequantize_4bit(base.weight.data, state)
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scaling)


class MergedLinear(torch.autograd.Function):
    """Compute x · (W + s·B·A)ᵀ + bias (Hu et al., 2021, equation 3) in ``dtype``, (N, in) to
    (N, out).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        base: nn.Linear,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            a = a.to(dtype)
            b = b.to(dtype)
            ctx.save_for_backward(x, a, b)
            ctx.base = base
            ctx.scaling = scaling
            bias = None if base.bias is None else base.bias.to(dtype)
            return nn.functional.linear(x, merged_weight(base, a, b, scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, dy: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        x, a, b = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = dy @ merged_weight(ctx.base, a, b, ctx.scaling) if ctx.needs_input_grad[0] else None
        da = ((dy @ b).T @ x).float() * ctx.scaling  # (r, in)
        db = (dy.T @ (x @ a.T)).float() * ctx.scaling  # (out, r)
        return dx, da, db, None, None, None

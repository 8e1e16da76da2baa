"""What makes a LoRA step fast on a CPU with bfloat16 products. `speed_up` applies it; the values stay those of PEFT and SDPA.

Worth knowing:

1. A layer multiplies by W + s·B·A, made anew for each product, instead of running the adapter beside the layer. Making it
   takes about 4 % of a step; beside the layer, casts and sums over all tokens took a fifth. It is also what is served.
2. The merged weights are never kept: the backward makes them again, so a 4-bit encoder stays as small as it is.
3. Attention runs document by document, over the tokens that are no padding, with matrix products over all heads. torch's
   SDPA, whose CPU kernel works in small blocks, takes 1.3 to 1.8 times as long at 130 to 510 tokens.
4. Frozen tables are held in bfloat16, so the stream between layers is too: autocast would cast it at every product.

Tried and left out, since they gained nothing above the noise: head groups that fit the cache, keeping the attention
probabilities for the backward, smaller batches, huge pages and other thresholds of malloc, an unquantized encoder. Eager
attention is faster to 300 tokens and slower beyond. Packing has little to win: in batches grouped by length 2 % of the tokens
are padding.
"""

import types
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

ATTENTION = "per_document"


def speed_up(encoder: PreTrainedModel) -> None:
    """Prepares an encoder with an injected LoRA adapter for bfloat16 training on a CPU, in place.

    The layers that this cannot serve, such as 8-bit ones or adapters with dropout, stay as they are.
    """
    adapted = [module for module in encoder.modules() if isinstance(module, LoraLayer)]
    for layer in adapted:
        if can_merge(layer):
            layer.forward = types.MethodType(merged_forward, layer)
    for parameter in encoder.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        if not packed and not parameter.requires_grad and parameter.dim() > 1 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    if encoder.config._attn_implementation == "sdpa" and encoder._supports_attention_backend:
        encoder.set_attn_implementation(ATTENTION)


def can_merge(layer: LoraLayer) -> bool:
    """Whether a layer is a plain LoRA over a 4-bit or a floating-point `nn.Linear`."""
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    plain = isinstance(layer.lora_dropout[name], nn.Identity) and not layer.lora_variant and not layer.lora_bias[name]
    return plain and (isinstance(base, Linear4bit) or type(base) is nn.Linear)


def merged_forward(self: LoraLayer, x: Tensor) -> Tensor:
    """The forward of an adapted layer, (…, in) to (…, out), with the adapter's own where it is switched off or merged."""
    if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
        return type(self).forward(self, x)
    name = self.active_adapters[0]
    factors = (self.lora_A[name].weight, self.lora_B[name].weight)
    return MergedLinear.apply(x, *factors, self.get_base_layer(), self.scaling[name])


def merged_weight(base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + s·B·A, (out, in), in the type of ``a``."""
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight if state is None else dequantize_4bit(base.weight.data, state)
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scaling)


class MergedLinear(torch.autograd.Function):
    """y = x · (W + s·B·A)ᵀ + bias, with gradients of x, A and B (Hu et al., 2021, equation 3), in bfloat16."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scaling: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat, a, b = x.reshape(-1, x.shape[-1]).bfloat16(), a.bfloat16(), b.bfloat16()
            ctx.save_for_backward(flat, a, b)
            ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
            bias = None if base.bias is None else base.bias.bfloat16()
            y = nn.functional.linear(flat, merged_weight(base, a, b, scaling), bias)
            return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ merged_weight(ctx.base, a, b, ctx.scaling)).view(ctx.shape)
        da = ((dy @ b).T @ x).float() * ctx.scaling  # (r, in)
        db = (dy.T @ (x @ a.T)).float() * ctx.scaling  # (out, r)
        return dx, da, db, None, None


def attention_mask(*, attention_mask: Tensor | None = None, mask_function: Any, **kwargs: Any) -> Tensor | None:
    """The (B, T) padding mask as it is where nothing else is masked; otherwise SDPA's own (B, 1, T, T)."""
    if mask_function is not bidirectional_mask_function:
        return sdpa_mask(attention_mask=attention_mask, mask_function=mask_function, **kwargs)
    return attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, over (B, heads, T, D); to (B, T, heads, D).

    What is not plain attention over texts padded at their ends goes to SDPA.
    """
    spans = None
    if attention_mask is None or attention_mask.dim() == 2:
        spans = text_spans(query.shape[0], query.shape[2], attention_mask)
    plain = (
        dropout == 0
        and query.shape == key.shape == value.shape
        and kwargs.get("position_bias") is None
        and not (kwargs.get("is_causal") or getattr(module, "is_causal", False))
    )
    if spans is None or not plain:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :].bool()
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return PerDocumentAttention.apply(query, key, value, spans, scaling), None


def text_spans(rows: int, length: int, mask: Tensor | None) -> list[slice] | None:
    """Where each row's text stands; None where a mask has a hole or a row is empty."""
    if mask is None:
        return [slice(0, length)] * rows
    mask = mask.bool()
    counts, starts = mask.sum(1), mask.long().argmax(1)
    ends = length - mask.flip(1).long().argmax(1)
    if not (counts == ends - starts).all():
        return None
    return [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


class PerDocumentAttention(torch.autograd.Function):
    """softmax(s·Q·Kᵀ)·V (Vaswani et al., 2017) within each row's span; zero outside. (B, heads, T, D) to (B, T, heads, D)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, spans: list[slice], scaling: float
    ) -> Tensor:
        output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        for i, span in enumerate(spans):
            probabilities = attention_probabilities(query[i, :, span] * scaling, key[i, :, span])
            output[i, span] = (probabilities @ value[i, :, span]).transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.spans, ctx.scaling = spans, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(d_output, memory_format=torch.contiguous_format) for _ in range(3))
        for i, span in enumerate(ctx.spans):
            q, k, v = query[i, :, span] * ctx.scaling, key[i, :, span], value[i, :, span]  # (heads, n, D)
            do = d_output[i, span].transpose(0, 1)
            p = attention_probabilities(q, k)  # (heads, n, n)
            dv[i, span] = (p.transpose(1, 2) @ do).transpose(0, 1)
            ds = torch._softmax_backward_data(do @ v.transpose(1, 2), p, -1, p.dtype)
            dq[i, span] = (ds @ k).mul_(ctx.scaling).transpose(0, 1)
            dk[i, span] = (ds.transpose(1, 2) @ q).transpose(0, 1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """(heads, n, D) twice to (heads, n, n)."""
    scores = query @ key.transpose(1, 2)
    return torch.softmax(scores, -1, out=scores)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, attention_mask)

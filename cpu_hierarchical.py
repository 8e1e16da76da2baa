"""Speed up encoders on CPUs: `attend_by_document` in bfloat16, and `pack_linear_layers` in bfloat16
and float32.

Worth knowing:

1. Attention runs text by text, over the text's own tokens, with matrix products over all heads.
   torch's SDPA takes 1.3 to 1.8 times as long at 130 to 510 tokens, because its CPU kernel works in
   small blocks. In float32 both are equally fast. Outputs and gradients match those of SDPA.
2. SDPA handles all other attention: causal, biased, with dropout, or with a mask that has holes. On
   AMX processors it is faster without gradients, so it takes over there too.
3. This file uses private names of torch and transformers. Its callers import it lazily and work
   without it.
4. For inference, linear layers also keep their weights in oneDNN's order, and apply GELU while the
   product is in the cache. torch.compile does the same. With gradients, layers with frozen weights
   use oneDNN too, and others run as before. In float32 torch's own layers use MKL, which takes 1.05
   to 2.3 times as long on AMD EPYCs with AVX-512.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

ATTENTION = "per_document"
LANES = 32  # bfloat16 numbers in 512 bits
HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
ONEDNN = torch.ops.mkldnn


def attend_by_document(encoder: PreTrainedModel) -> None:
    """Switch an encoder to `attention`, in place, unless the user chose another implementation than
    the default, SDPA.
    """
    if encoder.config._attn_implementation == "sdpa" and encoder._supports_attention_backend:
        encoder.set_attn_implementation(ATTENTION)


def attention_mask(
    *, attention_mask: Tensor | None = None, mask_function: Any, **kwargs: Any
) -> Tensor | None:
    """Return the padding mask (B, T) if only padding is masked, else SDPA's own (B, 1, T, T)."""
    if mask_function is not bidirectional_mask_function:
        return sdpa_mask(attention_mask=attention_mask, mask_function=mask_function, **kwargs)
    return attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention through the interface of transformers, (B, heads, T, D) to
    (B, T, heads, D).
    """
    plain = (
        (torch.is_grad_enabled() or not HAS_AMX)
        and (attention_mask is None or attention_mask.dim() == 2)
        and not kwargs.get("dropout")
        and query.shape == key.shape == value.shape
        and kwargs.get("position_bias") is None
        and not (kwargs.get("is_causal") or getattr(module, "is_causal", False))
    )
    spans = text_spans(query.shape[0], query.shape[2], attention_mask) if plain else None
    if spans is None:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :].bool()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return PerDocumentAttention.apply(query, key, value, spans, scaling), None


def text_spans(rows: int, length: int, mask: Tensor | None) -> list[slice] | None:
    """Return the span of each row's text, or None if a mask (rows, length) has a hole or an empty
    row.
    """
    if mask is None:
        return [slice(0, length)] * rows
    mask = mask.bool()
    counts = mask.sum(1)
    starts = mask.long().argmax(1)
    ends = length - mask.flip(1).long().argmax(1)
    if not (counts == ends - starts).all():
        return None
    return [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


class PerDocumentAttention(torch.autograd.Function):
    """Compute softmax(s·Q·Kᵀ)·V within each row's span, (B, heads, T, D) to (B, T, heads, D). Other
    outputs are 0.

    A text of n tokens is padded to m, a multiple of `LANES`: products fill whole vectors of the
    processor and have few shapes. The formula is from Vaswani et al., 2017.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: list[slice], scaling: float
    ) -> Tensor:
        output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        for i, span in enumerate(spans):
            n = span.stop - span.start
            q, k, v = (padded(tensor[i, :, span]) for tensor in (query, key, value))
            probabilities = attention_probabilities(q.mul_(scaling), k, n)  # (heads, m, m)
            output[i, span] = (probabilities @ v)[:, :n].transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.spans = spans
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        dq, dk, dv = (
            torch.zeros_like(d_output, memory_format=torch.contiguous_format) for _ in range(3)
        )
        for i, span in enumerate(ctx.spans):
            n = span.stop - span.start
            q, k, v = (padded(tensor[i, :, span]) for tensor in (query, key, value))
            q.mul_(ctx.scaling)
            do = padded(d_output[i, span].transpose(0, 1))  # (heads, m, D)
            p = attention_probabilities(q, k, n)  # (heads, m, m)
            dv[i, span] = (p.transpose(1, 2) @ do)[:, :n].transpose(0, 1)
            ds = torch._softmax_backward_data(do @ v.transpose(1, 2), p, -1, p.dtype)
            dq[i, span] = (ds @ k)[:, :n].mul_(ctx.scaling).transpose(0, 1)
            dk[i, span] = (ds.transpose(1, 2) @ q)[:, :n].transpose(0, 1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


def padded(tensor: Tensor) -> Tensor:
    """Copy (heads, n, D) to (heads, m, D), with zeros up to a multiple of `LANES`."""
    return nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[1] % LANES))


def attention_probabilities(query: Tensor, key: Tensor, n: int) -> Tensor:
    """Return probabilities (heads, m, m) of padded queries and keys (heads, m, D).

    The first n rows are tokens.
    """
    scores = query @ key.transpose(1, 2)
    scores[:, :, n:] = -torch.inf
    return torch.softmax(scores, -1, out=scores)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, attention_mask)


def pack_linear_layers(encoder: PreTrainedModel) -> None:
    """Turn the linear layers of an encoder into `PackedLinear`, in place, if oneDNN has products of
    its type here.

    Parameters, their names and gradients stay as they are. The packed weights double the memory of
    these layers. If this version of torch lacks these oneDNN operations, their error is raised, and
    the encoder is unchanged.
    """
    if not torch.backends.mkldnn.is_available() or encoder.dtype not in packable_dtypes():
        return
    # fails here, before the encoder is changed
    trial = PackedLinear(LANES, LANES, dtype=encoder.dtype)
    with torch.no_grad():
        trial.multiply(torch.zeros(1, LANES, dtype=encoder.dtype), "gelu")
    for module in encoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
        elif {name: type(part) for name, part in module.named_children()} == FUSIBLE:
            module.__class__ = FusedIntermediate


@cache
def packable_dtypes() -> tuple[torch.dtype, ...]:
    """Return the types that oneDNN multiplies on this processor."""
    return (
        (torch.float32, torch.bfloat16) if ONEDNN._is_mkldnn_bf16_supported() else (torch.float32,)
    )


class PackedLinear(nn.Linear):
    """A linear layer that also keeps its weight in oneDNN's order, from its first inference on.

    A changed weight is packed again. torch does not count changes in place through ``weight.data``,
    as when PEFT merges an adapter, so every eighth value of the diagonal is also compared.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.can_pack(input):
            return super().forward(input)
        if not torch.is_grad_enabled():
            return self.multiply(input)
        # the function gets rows, because its output must be no view: Longformer changes it in place
        return FrozenProduct.apply(input.reshape(-1, input.shape[-1]), self).reshape(
            *input.shape[:-1], -1
        )

    def can_pack(self, input: Tensor) -> bool:
        """Return whether an input (…, in) can be multiplied by the packed weight: on a CPU, where
        no parameter needs a gradient.
        """
        weight = self.weight
        return (
            weight.dtype == input.dtype
            and weight.dtype in packable_dtypes()
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and not (
                torch.is_grad_enabled()
                and any(values.requires_grad for values in self.parameters())
            )
            and not (weight.is_inference() or torch.compiler.is_compiling())
            and input.numel() > 0
        )

    def multiply(self, input: Tensor, activation: str = "none") -> Tensor:
        """Multiply (…, in) to (…, out), then apply ``activation``: the exact "gelu", or "none"."""
        packed, source, version, sample, values = self.__dict__.get("packed", (None,) * 5)
        if (
            source is None
            or source.data_ptr() != self.weight.data_ptr()
            or version != self.weight._version
            or not torch.equal(sample, values)
        ):
            source = self.weight.detach()
            packed = ONEDNN._reorder_linear_weight(source)
            sample = source.diagonal()[::8]
            # the source is kept too: while it is alive, no other weight can have its address
            self.packed = packed, source, self.weight._version, sample, sample.clone()
        return ONEDNN._linear_pointwise(input, packed, self.bias, activation, [], "none")

    def __getstate__(self) -> dict[str, Any]:  # a copy packs its own weight
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


class FrozenProduct(torch.autograd.Function):
    """The product of an input (N, in) and a layer with frozen weights, with a gradient for the
    input alone.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedLinear) -> Tensor:
        ctx.save_for_backward(layer.weight)
        return layer.multiply(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None]:
        return ONEDNN._linear_pointwise(
            d_output, ctx.saved_tensors[0].t(), None, "none", [], "none"
        ), None


class FusedIntermediate(nn.Module):
    """The first half of a feed-forward block, with GELU fused into the product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if (
            type(self.dense) is PackedLinear
            and self.dense.can_pack(hidden_states)
            and not torch.is_grad_enabled()
        ):
            return self.dense.multiply(hidden_states, "gelu")
        return self.intermediate_act_fn(self.dense(hidden_states))


# the children of a layer that can be fused
FUSIBLE = {"dense": nn.Linear, "intermediate_act_fn": GELUActivation}

"""Faster encoders on CPUs with bfloat16 products: `attend_by_document` and `pack_linear_layers` switch it on.

Worth knowing:

1. Each text is attended to over its own tokens, with matrix products over all heads. torch's SDPA, whose CPU kernel works in
   small blocks, takes 1.3 to 1.8 times as long at 130 to 510 tokens; in float32 it is as fast as this. Where the processor
   multiplies tiles (AMX), SDPA is the faster one without gradients, and takes over.
2. The values are those of SDPA, and the gradients too: training uses it as well as the pipeline.
3. What is not plain attention over texts that are padded at their ends goes to SDPA.
4. Private names of torch and transformers are used, so this file is imported where it helps, by code that can do without.
5. Linear layers keep their weights in oneDNN's own order too, and apply GELU while a product is in the cache: what
   torch.compile makes of them, without its compiler. That is for inference alone; with gradients they are as they were.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

ATTENTION = "per_document"
LANES = 32  # bfloat16 numbers in 512 bits
TILES = bool(torch.cpu.get_capabilities().get("amx_bf16"))
ONEDNN = torch.ops.mkldnn


def attend_by_document(encoder: PreTrainedModel) -> None:
    """Give an encoder this attention, in place, unless the user chose another than transformers' default."""
    if encoder.config._attn_implementation == "sdpa" and encoder._supports_attention_backend:
        encoder.set_attn_implementation(ATTENTION)


def attention_mask(*, attention_mask: Tensor | None = None, mask_function: Any, **kwargs: Any) -> Tensor | None:
    """Return the (B, T) padding mask where nothing else is masked, else SDPA's own (B, 1, T, T)."""
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
    """Compute attention by transformers' interface, (B, heads, T, D) to (B, T, heads, D).

    What is not plain attention over texts padded at their ends goes to SDPA, and with AMX all that needs no gradient.
    """
    spans = None
    if (torch.is_grad_enabled() or not TILES) and (attention_mask is None or attention_mask.dim() == 2):
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
    """Return the span of each row's text, or None where a mask has a hole or a row is empty."""
    if mask is None:
        return [slice(0, length)] * rows
    mask = mask.bool()
    counts, starts = mask.sum(1), mask.long().argmax(1)
    ends = length - mask.flip(1).long().argmax(1)
    if not (counts == ends - starts).all():
        return None
    return [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


class PerDocumentAttention(torch.autograd.Function):
    """softmax(s·Q·Kᵀ)·V (Vaswani et al., 2017) within each row's span; zero outside. (B, heads, T, D) to (B, T, heads, D).

    Texts are padded to whole vectors of the processor, n to m tokens, of which they need few shapes; the probabilities of
    padding are zeros.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, spans: list[slice], scaling: float
    ) -> Tensor:
        output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        for i, span in enumerate(spans):
            n, q = span.stop - span.start, padded(query[i, :, span]).mul_(scaling)
            probabilities = attention_probabilities(q, padded(key[i, :, span]), n)  # (heads, m, m)
            output[i, span] = (probabilities @ padded(value[i, :, span]))[:, :n].transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.spans, ctx.scaling = spans, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(d_output, memory_format=torch.contiguous_format) for _ in range(3))
        for i, span in enumerate(ctx.spans):
            n = span.stop - span.start
            q, k, v = (padded(rows[i, :, span]) for rows in (query, key, value))
            q.mul_(ctx.scaling)
            do = padded(d_output[i, span].transpose(0, 1))  # (heads, m, D)
            p = attention_probabilities(q, k, n)  # (heads, m, m)
            dv[i, span] = (p.transpose(1, 2) @ do)[:, :n].transpose(0, 1)
            ds = torch._softmax_backward_data(do @ v.transpose(1, 2), p, -1, p.dtype)
            dq[i, span] = (ds @ k)[:, :n].mul_(ctx.scaling).transpose(0, 1)
            dk[i, span] = (ds.transpose(1, 2) @ q)[:, :n].transpose(0, 1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


def padded(rows: Tensor) -> Tensor:
    """Copy (heads, n, D) to (heads, m, D), with zeros up to a multiple of `LANES`."""
    return nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % LANES))


def attention_probabilities(query: Tensor, key: Tensor, n: int) -> Tensor:
    """Multiply padded queries and keys (heads, m, D) to probabilities (heads, m, m). The first n rows and columns are tokens."""
    scores = query @ key.transpose(1, 2)
    scores[:, :, n:] = -torch.inf
    return torch.softmax(scores, -1, out=scores)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, attention_mask)


def pack_linear_layers(encoder: PreTrainedModel) -> None:
    """Make the bfloat16 linear layers of an encoder `PackedLinear` ones, in place, where torch has oneDNN for them.

    Parameters, their names and gradients stay as they are. The packed weights take as much memory again.

    Raises:
        Exception: this version of torch has other oneDNN operations. The encoder is as it was.
    """
    if not (torch.backends.mkldnn.is_available() and ONEDNN._is_mkldnn_bf16_supported()):
        return
    trial = PackedLinear(LANES, LANES, dtype=torch.bfloat16)  # fails here, before the encoder is changed
    with torch.no_grad():
        trial.multiply(torch.zeros(1, LANES, dtype=torch.bfloat16), "gelu")
    for module in encoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
        elif {name: type(part) for name, part in module.named_children()} == FUSIBLE:
            module.__class__ = fused(type(module))


class PackedLinear(nn.Linear):
    """A linear layer that also keeps its weight in oneDNN's order, from its first inference in bfloat16 on.

    A weight that was changed since is packed anew, unless it was changed in place through ``weight.data``, which torch does
    not count.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input) if self.can_pack(input) else super().forward(input)

    def can_pack(self, input: Tensor) -> bool:
        weight = self.weight
        return (
            weight.dtype == input.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and not (weight.is_inference() or torch.is_grad_enabled() or torch.compiler.is_compiling())
            and input.numel() > 0
        )

    def multiply(self, input: Tensor, activation: str = "none") -> Tensor:
        """Multiply (…, in) to (…, out), then apply the exact "gelu", or "none"."""
        packed, source, version = self.__dict__.get("packed", (None, None, None))
        if source is None or source.data_ptr() != self.weight.data_ptr() or version != self.weight._version:
            packed = ONEDNN._reorder_linear_weight(self.weight.detach())
            # with the source itself: while it is held, no other weight can have its address
            self.packed = packed, self.weight.detach(), self.weight._version
        return ONEDNN._linear_pointwise(input, packed, self.bias, activation, [], "none")

    def __getstate__(self) -> dict[str, Any]:  # copies pack their own
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


class FusedIntermediate(nn.Module):
    """The first half of a feed-forward block, with its GELU inside the product."""

    dense: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        if type(self.dense) is PackedLinear and self.dense.can_pack(hidden_states):
            return self.dense.multiply(hidden_states, "gelu")
        return super().forward(hidden_states)

    def __reduce_ex__(self, protocol: Any) -> Any:  # no module has its class by name
        return restored, (type(self).__mro__[2], self.__getstate__())


FUSIBLE = {"dense": nn.Linear, "intermediate_act_fn": GELUActivation}  # the parts of such a layer


def fused(kind: type[nn.Module]) -> type[nn.Module]:
    """Derive a class from an encoder's own intermediate layer, ``dense`` and then ``intermediate_act_fn``."""
    return type(f"Fused{kind.__name__}", (FusedIntermediate, kind), {})


def restored(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """Restore a layer of `fused` for pickle."""
    layer = nn.Module.__new__(fused(kind))
    layer.__setstate__(state)
    return layer

"""Speed up the linear layers of encoders on CPUs, in bfloat16 and float32.

Worth knowing:

1. For inference, linear layers also keep their weights in oneDNN's order, and apply GELU while the product is in the
   cache. torch.compile does the same. With gradients the layers run as before. In float32 torch's own layers use MKL,
   which takes 1.05 to 2.3 times as long on AMD EPYCs with AVX-512.
2. This file uses private names of torch and transformers. Its callers import it lazily and work without it.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

ONEDNN = torch.ops.mkldnn


def pack_linear_layers(encoder: PreTrainedModel) -> None:
    """Turn the linear layers of an encoder into `PackedLinear`, in place, if oneDNN has products of its type here.

    Parameters, their names and gradients stay as they are. The packed weights double the memory of these layers. If this
    version of torch lacks these oneDNN operations, their error is raised, and the encoder is unchanged.
    """
    if not torch.backends.mkldnn.is_available() or encoder.dtype not in packable_dtypes():
        return
    trial = PackedLinear(32, 32, dtype=encoder.dtype)  # fails here, before the encoder is changed
    with torch.no_grad():
        trial.multiply(torch.zeros(1, 32, dtype=encoder.dtype), "gelu")
    for module in encoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
        elif {name: type(part) for name, part in module.named_children()} == FUSIBLE:
            module.__class__ = FusedIntermediate


@cache
def packable_dtypes() -> tuple[torch.dtype, ...]:
    """Return the types that oneDNN multiplies on this processor."""
    return (torch.float32, torch.bfloat16) if ONEDNN._is_mkldnn_bf16_supported() else (torch.float32,)


class PackedLinear(nn.Linear):
    """A linear layer that also keeps its weight in oneDNN's order, from its first inference on.

    A changed weight is packed again. torch does not count changes in place through ``weight.data``, as when PEFT merges an
    adapter, so every eighth value of the diagonal is also compared.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input) if self.can_pack(input) else super().forward(input)

    def can_pack(self, input: Tensor) -> bool:
        """Return whether an input (…, in) can be multiplied by the packed weight: on a CPU, without gradients."""
        weight = self.weight
        return (
            weight.dtype == input.dtype
            and weight.dtype in packable_dtypes()
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and not (weight.is_inference() or torch.is_grad_enabled() or torch.compiler.is_compiling())
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
            packed, sample = ONEDNN._reorder_linear_weight(source), source.diagonal()[::8]
            # the source is kept too: while it is alive, no other weight can have its address
            self.packed = packed, source, self.weight._version, sample, sample.clone()
        return ONEDNN._linear_pointwise(input, packed, self.bias, activation, [], "none")

    def __getstate__(self) -> dict[str, Any]:  # a copy packs its own weight
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


class FusedIntermediate(nn.Module):
    """The first half of a feed-forward block, with GELU fused into the product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if type(self.dense) is PackedLinear and self.dense.can_pack(hidden_states):
            return self.dense.multiply(hidden_states, "gelu")
        return self.intermediate_act_fn(self.dense(hidden_states))


FUSIBLE = {"dense": nn.Linear, "intermediate_act_fn": GELUActivation}  # the children of a layer that can be fused

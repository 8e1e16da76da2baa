"""Run linear layers in 8 bits on CPUs, with the oneDNN operators that torch.compile generates for quantized layers.

Weights have one scale for each output, and inputs have one for each token. So the rounding of a text does not depend on its
batch, and no calibration texts are needed.
"""

import logging

import torch
from torch import Tensor, nn

from hierarchical_clinicalbert.errors import one_line

logger = logging.getLogger(__name__)

ONEDNN = torch.ops.onednn
LARGEST_INT8 = 127  # symmetric: -128 is not used
ZERO_POINT = 128  # inputs are unsigned: for signed inputs, oneDNN falls back to its slow reference code


def has_int8_products() -> bool:
    """Return whether this processor and this version of torch multiply in 8 bits without overflow."""
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return False
    try:
        Int8Linear(nn.Linear(64, 64))(torch.zeros(1, 64))
    except (AttributeError, TypeError, RuntimeError) as error:  # the private operators have changed
        logger.warning("no 8-bit products: they do not fit torch %s (%s)", torch.__version__, one_line(error))
        return False
    return True


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, for inference: (…, in) to (…, out). Both are float32 or bfloat16."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = scales_of(weight)[:, 0]
        self.zero_points = torch.zeros(linear.out_features, dtype=torch.int32)
        rounded = (weight / self.scales[:, None]).round().to(torch.int8)
        self.packed = ONEDNN.qlinear_prepack(rounded, None)  # in oneDNN's memory layout for this processor
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self.bias = bias.to(linear.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.flatten(0, -2).float()  # torch rounds float32 faster than bfloat16
        scales = scales_of(tokens)
        # by way of int8, because torch converts to uint8 without vector instructions; adding the zero point wraps around
        rounded = (tokens / scales).round_().to(torch.int8).view(torch.uint8).add_(ZERO_POINT)
        weight = (self.packed, self.scales, self.zero_points)
        products = ONEDNN.qlinear_pointwise(
            rounded, 1.0, ZERO_POINT, *weight, None, 1.0, 0, input.dtype, "none", [], ""
        )
        scales = scales.to(input.dtype)
        return torch.addcmul(self.bias, products, scales, out=products).view(*input.shape[:-1], -1)


def quantize(encoder: nn.Module, kind: type[nn.Module] = Int8Linear) -> None:
    """Replace each linear layer of a float32 or bfloat16 encoder by ``kind(layer)``, in place."""
    for module in encoder.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, kind(layer))


def scales_of(rows: Tensor) -> Tensor:
    """Return the quantization step of each row, (num_rows, 1): its largest absolute value over 127, and more than 0."""
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))  # without a copy of all rows
    return largest.div_(LARGEST_INT8).clamp_min_(torch.finfo(rows.dtype).tiny)

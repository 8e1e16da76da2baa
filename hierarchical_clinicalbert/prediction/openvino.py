"""Run an encoder with OpenVINO (``predict.py --backend openvino``), also in 8 bits (``--dtype
int8``).
"""

import contextlib
import io
import threading
from collections.abc import Sequence

import openvino
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hierarchical_clinicalbert.errors import InputError

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # OpenVINO's names
GROUP = 64  # numbers of a token that share a scale
LARGEST_INT8 = 127  # symmetric: -128 is not used


class OpenVinoEncoder(nn.Module):
    """An encoder that OpenVINO runs on a CPU. Each thread has its own request.

    Args:
        converted: the result of `convert`.
        dtype: the dtype of the operations, a key of `PRECISIONS`. With either, 8-bit weights are
            multiplied in 8 bits.
        hint: "THROUGHPUT" for many batches at a time, or "LATENCY".
    """

    def __init__(self, converted: openvino.Model, dtype: torch.dtype, hint: str = "THROUGHPUT"):
        super().__init__()
        settings: dict[str, str | int] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "PERFORMANCE_HINT": hint,
        }
        settings |= {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        }
        self._compiled = openvino.Core().compile_model(converted, "CPU", settings)
        self._of_thread = threading.local()

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._compiled.create_infer_request()
        request = self._of_thread.request
        request.infer({name: tensor.numpy() for name, tensor in inputs.items()})
        return BaseModelOutput(torch.tensor(request.get_output_tensor(0).data))


class Int8Weights(nn.Module):
    """A linear layer with 8-bit weights. OpenVINO rounds its inputs to 8 bits, too."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scales = scales_of(weight)
        self.weight = (weight / self.scales).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.scales, self.bias)


def scales_of(rows: Tensor) -> Tensor:
    """Return the quantization step of each row, (num_rows, 1): its largest absolute value over
    127, and more than 0.
    """
    largest = rows.abs().amax(1, keepdim=True)
    return (largest / LARGEST_INT8).clamp_min(torch.finfo(rows.dtype).tiny)


def quantize(encoder: nn.Module) -> None:
    """Replace each linear layer of a float32 encoder by `Int8Weights`, in place."""
    for module in encoder.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Weights(layer))


def convert(encoder: PreTrainedModel, names: Sequence[str], int8: bool = False) -> openvino.Model:
    """Convert a float32 encoder, with inputs of these names and any shape. For int8, linear layers
    are replaced in place.

    Raises:
        InputError: the encoder cannot be converted.
    """
    if int8:
        quantize(encoder)
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in names}
    sizes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in names}
    try:
        # torch prints warnings, and graphs that fail
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            return openvino.convert_model(
                torch.export.export(encoder, (), example, dynamic_shapes=sizes)
            )
    except Exception as error:  # the exporter raises anything on an encoder that it cannot trace
        problem = f"OpenVINO cannot run {type(encoder).__name__} ({type(error).__name__})"
        advice = "--dtype bf16 or fp32" if int8 else "--backend torch"
        raise InputError(f"{problem}: give {advice}") from error

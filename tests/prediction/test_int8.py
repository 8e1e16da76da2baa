"""Test linear layers in 8 bits. test_predict.py compares their predictions with those in float32."""

import pytest
import torch
from torch import nn

from hierarchical_clinicalbert.prediction.int8 import Int8Linear, has_int8_products, quantize

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="this processor has no 8-bit products")


def test_a_token_is_rounded_alone_and_every_linear_layer_is_replaced():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Sequential(nn.Linear(64, 32)))
    small, large = torch.randn(5, 64), 1e4 * torch.randn(5, 64)
    quantize(model)
    assert [type(module) for module in model.modules() if not list(module.children())] == [
        Int8Linear,
        nn.GELU,
        Int8Linear,
    ]
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.cat([small, large]))[:5], model(small), atol=1e-5, rtol=1e-5)

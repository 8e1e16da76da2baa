"""Test what the pretend device refuses and what it computes. A GPU, if there is one, must agree."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import complete
from forked import LIBRARIES

HERE = Path(__file__).resolve().parent
PRESENT = {
    "pretend": True,
    "cuda": torch.cuda.is_available(),
    "mps": torch.backends.mps.is_available(),
}
DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param(one, marks=pytest.mark.skipif(not present, reason=f"there is no {one} device"))
        for one, present in PRESENT.items()
    ],
)
# evaluates an expression with three numbers on a device, x, and on the CPU, y
PROGRAM = """
import json, sys
import torch
_, device, expression = sys.argv
if device == "pretend":
    import pretend
x, y = (torch.tensor([1.0, 4.0, 9.0], device=place) for place in (device, "cpu"))
try:
    value = eval(expression)
    print(json.dumps({"device": value.device.type, "value": value.tolist()}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__}))
"""


def run_on(device: str, *words: object, **options: Any) -> Any:
    """Run Python for a device, in a process of its own. Return the JSON value that it prints last.

    Arguments are those of `conftest.complete`.
    """
    if torch.accelerator.is_available():  # forked processes cannot use it
        options["modules"] = None
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    done = complete(*words, environment=os.environ | hidden, **options)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def evaluate(device: str, expression: str) -> dict[str, Any]:
    return run_on(device, "-c", PROGRAM, device, expression, cwd=HERE, modules=LIBRARIES)


@DEVICES
@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("x + y", "RuntimeError"),
        ("y.add_(x)", "RuntimeError"),
        ("y.sum().add_(x.sum())", "RuntimeError"),
        ("torch.cat([x, y])", "RuntimeError"),
        ("torch.nn.functional.linear(x, y[None])", "RuntimeError"),
        ("x.gather(0, y.long() * 0)", "RuntimeError"),
        ("x.masked_fill(y > 1, 0)", "RuntimeError"),
        ("x.index_put((torch.tensor([0]),), y[:1])", "RuntimeError"),
        ("y[x.long() * 0]", "RuntimeError"),
        ("setattr(x, 'data', y)", "RuntimeError"),
        ("x.numpy()", "TypeError"),
        ("__import__('numpy').asarray(x)", "TypeError"),
    ],
)
def test_what_a_gpu_refuses_is_refused(expression, error, device):
    assert evaluate(device, expression) == {"error": error}


@DEVICES
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("x.sqrt()", [1, 2, 3]),
        ("x * torch.tensor(2.0)", [2, 8, 18]),
        ("x[torch.tensor([2, 0])]", [9, 1]),
        ("y.to(x) + x", [2, 8, 18]),
        ("torch.arange(3, device=x.device)", [0, 1, 2]),
        ("torch.inference_mode()(lambda: x[1:].view(2, 1)[:, 0])()", [4, 9]),
        ("x.view(3, 1).t_()", [[1, 4, 9]]),
        ("x[:2].fill_(0).sum() + x", [0, 0, 9]),
        ("setattr(x, 'data', y.sqrt().to(x.device)) or x", [1, 2, 3]),
        ("torch.autograd.grad(x.requires_grad_().square().sum(), x)[0]", [2, 8, 18]),
    ],
)
def test_results_are_on_the_device(expression, value, device):
    assert evaluate(device, expression) == {"device": device, "value": value}


@DEVICES
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("x.cpu() + y", [2, 8, 18]),
        ("y.copy_(x.sqrt())", [1, 2, 3]),
        ("y * x[2].item()", [9, 36, 81]),
    ],
)
def test_copies_are_on_the_cpu(expression, value, device):
    assert evaluate(device, expression) == {"device": "cpu", "value": value}


@pytest.mark.parametrize("expression", ["x.double()", "x.to(torch.float64)"])
def test_there_is_no_float64(expression):
    """Apple's GPUs have none, CUDA has."""
    assert evaluate("pretend", expression) == {"error": "TypeError"}

"""A pretend accelerator, for machines without a GPU. Importing this file adds it to torch.

Worth knowing:

1. A tensor on the device is a `PretendTensor`, which holds a CPU tensor. Operations run on those.
2. Operations refuse what a GPU refuses: tensors of two devices, and NumPy without ``.cpu()``. As
   on CUDA, single numbers and indices may be on the CPU. As on Apple's GPUs, there is no float64.
3. Random numbers come from the CPU's generator, so a run draws those that it draws on a CPU.
4. A process cannot remove a device, so each test of it runs in a process of its own.
5. torch has backends in Python as an experiment: a release may change the private names used here.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
DEVICE = f"{NAME}:0"
CPU = torch.device("cpu")
COPIES = ("_to_copy", "copy_", "_copy_from")  # operations whose tensors may be on two devices
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index")  # whose indices may be on the CPU


class PretendTensor(Tensor):
    """A tensor on the device. torch knows its shape, dtype and device; its data are ``held``.

    Args:
        held: a CPU tensor.

    Raises:
        TypeError: it is float64.
    """

    # without this line, the result of `.cpu()` would be a PretendTensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendTensor":
        if held.dtype == torch.float64:
            raise TypeError(f"{DEVICE} has no float64")
        settings = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        settings |= {"dtype": held.dtype, "device": DEVICE}
        # torch refuses views in inference mode: it counts changes of memory, and here is none
        with torch.inference_mode(False):
            tensor = Tensor._make_wrapper_subclass(cls, held.shape, **settings)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        options = kwargs or {}
        # in inference mode, operations arrive here before torch divides them into simpler ones
        result = operation.decompose(*args, **options)
        return compute(operation, *args, **options) if result is NotImplemented else result

    # ── What torch would read from the tensor's memory ────────────────────────────────────────────

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # shape and dtype. A tensor of another device is refused
        self.held = new.held

    def numpy(self, **options: Any) -> None:
        raise TypeError(f"a tensor on {DEVICE} cannot become a NumPy array: first use Tensor.cpu()")

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: int) -> Any:  # a file has the data. It is loaded to the CPU
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:
        return f"{self.held!r} on {DEVICE}"


def compute(operation: Any, *args: Any, **options: Any) -> Any:
    """Run an operation of torch on the CPU. Its result is on the device that a GPU would choose.

    Raises:
        RuntimeError: its tensors are on two devices.
        TypeError: its result would be float64.
    """
    # ── Arguments by name, and those that the operation changes ───────────────────────────────────
    arguments = operation._schema.arguments
    given = dict(zip((one.name for one in arguments), args, strict=False)) | options
    written = [one.name for one in arguments if one.alias_info and one.alias_info.is_write]
    changed = tensors_in([given.get(name) for name in written])
    on_device = any(is_pretend(tensor) for tensor in tensors_in(given))

    # ── Refusals ──────────────────────────────────────────────────────────────────────────────────
    name = operation._schema.name.removeprefix("aten::")
    if on_device and name not in COPIES:
        if name in INDEXED and is_pretend(given["self"]):
            del given["indices"]
        for tensor in tensors_in(given):
            is_number = tensor.dim() == 0 and not any(tensor is one for one in changed)
            if tensor.device == CPU and not is_number:
                raise RuntimeError(f"{name} has tensors on {DEVICE} and on cpu: move them to one")

    # ── Result ────────────────────────────────────────────────────────────────────────────────────
    if name == "_copy_from":  # there is none for CPU tensors
        source, target = (getattr(tensor, "held", tensor) for tensor in args[:2])
        target.copy_(source)
        return args[1]
    if options.get("device") is not None:
        on_device = torch.device(options["device"]).type == NAME
        options["device"] = CPU if on_device else options["device"]
    args, options = tree_map_only(PretendTensor, lambda tensor: tensor.held, (args, options))
    result = operation(*args, **options)
    if changed:
        return tree_map_only(Tensor, partial(find_changed, changed), result)
    return tree_map_only(Tensor, PretendTensor, result) if on_device else result


def find_changed(changed: list[Tensor], result: Tensor) -> Tensor:
    """Return the changed argument whose data are the result, after updating its shape."""
    tensor = next(one for one in changed if getattr(one, "held", one) is result)
    shape, new_shape = ((one.shape, one.stride()) for one in (tensor, result))
    if shape != new_shape:
        tensor.data = PretendTensor(result)
    return tensor


def is_pretend(value: Any) -> bool:
    return isinstance(value, PretendTensor)


def tensors_in(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


class Backend(backend_registration._DummyBackendModule):
    """The module ``torch.pretend``."""

    device = nullcontext  # as in `with torch.pretend.device(0): …`

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = DEVICE) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = DEVICE) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
aten = torch.ops.aten
library = torch.library.Library("aten", "IMPL")
# torch calls these from C++, for tensors that do not exist yet, or where it skips Python's
for called in (aten.empty.memory_format, aten.empty_strided.default, aten._copy_from.default):
    library.impl(called, partial(compute, called), "PrivateUse1")
torch.accelerator.empty_cache = lambda: None  # there is no cache of memory

"""Detect native bfloat16 products, and let glibc's malloc keep freed memory.

Memory that malloc has returned to the system costs a page fault per page when it is used again.
Without Linux and glibc, the functions for memory do nothing.
"""

import ctypes
import sys

import torch

# of malloc.h, in bytes
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3


def keep_memory(largest_block: int, most_kept: int, extra: int = 2**17) -> None:
    """Keep up to ``most_kept`` freed bytes for later allocations, in blocks of at most
    ``largest_block`` bytes.

    Each time memory is fetched, ``extra`` bytes more are fetched, by default as many as malloc
    does.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in (
            (M_MMAP_THRESHOLD, largest_block),
            (M_TRIM_THRESHOLD, most_kept),
            (M_TOP_PAD, extra),
        ):
            libc.mallopt(parameter, value)


def give_back_memory() -> None:
    """Return freed memory to the system: in a long run, the gaps between blocks in use add up."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def has_bf16(cpu: bool) -> bool:
    """Return whether bfloat16 matrix products are native, and so faster than float32, on the device
    that will train.
    """
    if cpu:
        capabilities = torch.cpu.get_capabilities()
        return bool(
            capabilities.get("avx512_bf16")
            or capabilities.get("amx_bf16")
            or capabilities.get("bf16")
        )
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.xpu.is_available()

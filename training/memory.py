"""Let glibc's malloc keep freed memory, since fetching it again, page by page, takes time. Does nothing elsewhere."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h, in bytes


def keep_memory(threshold: int, kept: int, more: int = 2**17) -> None:
    """Keep at most ``kept`` bytes that an operation frees for the next one, in blocks of at most ``threshold`` bytes.

    ``more`` bytes are fetched beyond what is needed, by default as many as malloc does.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, threshold), (M_TRIM_THRESHOLD, kept), (M_TOP_PAD, more)):
            libc.mallopt(parameter, value)


def give_back_memory() -> None:
    """Return freed memory to the system: in a long run, the gaps between blocks in use add up."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)

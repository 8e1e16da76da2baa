"""Let glibc's malloc keep freed memory, because fetching it again costs one page fault per page. No effect elsewhere."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h, in bytes


def keep_memory(largest_block: int, most_kept: int, extra: int = 2**17) -> None:
    """Keep up to ``most_kept`` freed bytes for later allocations, in blocks of at most ``largest_block`` bytes.

    Each time memory is fetched, ``extra`` bytes more are fetched, by default as many as malloc does.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, largest_block), (M_TRIM_THRESHOLD, most_kept), (M_TOP_PAD, extra)):
            libc.mallopt(parameter, value)


def give_back_memory() -> None:
    """Return freed memory to the system: in a long run, the gaps between blocks in use add up."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)

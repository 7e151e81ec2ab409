"""The memory of this process, where it is the device's.

Decides how it is read, and what becomes of what is freed: it goes back to the kernel at once where
a run has promised to stay within a limit, and stays with the process where it has not. Does not
decide what the limit is.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

__all__ = ["give_back_freed_memory", "keep_freed_memory", "process_bytes"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
"""Of glibc's mallopt (malloc.h)."""

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = 65536, 128 << 10, 128 << 10
"""What glibc begins with."""

_KEPT_AT_A_TIME = 64 << 20
"""Bytes by which the heap grows at least."""

_MAPPED_FROM_BYTES = 1 << 20
"""Blocks from this size on are mappings of their own, which go when they are freed. glibc would
raise its own threshold to 32 MiB as it sees such blocks, and keep what fits between others."""


def process_bytes() -> int:
    """Private writable memory of this process, as the kernel counts it against RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def give_back_freed_memory() -> None:
    """From now on, and what is free now. Costs the kernel's zeroing of fresh pages; elsewhere than
    with glibc it does nothing."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.mallopt(_M_TOP_PAD, _TOP_PAD)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        library.mallopt(_M_ARENA_MAX, 2)
        gc.collect()
        library.malloc_trim(0)


def keep_freed_memory() -> None:
    """From now on, for the next step, which asks for the same again.

    A step frees and asks for gigabytes. By default every large block is a mapping of its own, whose
    pages the kernel zeroes one by one when they are touched: a seventh of a step's time, measured
    on two cores. Elsewhere than with glibc it does nothing.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_TOP_PAD, _KEPT_AT_A_TIME)

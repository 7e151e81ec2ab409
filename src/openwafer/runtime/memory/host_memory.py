"""The memory of this process, where it is the device's.

Decides how it is read, and what becomes of what is freed: where a run has promised to stay within a
limit, it goes back to the kernel at once, but for a share that layers use again and again; where it
has not, it stays with the process. Does not decide what the limit is, when a layer runs, or what
becomes of large blocks where layers are compiled (block_pool.py).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "KEPT_SHARE",
    "give_back_freed_memory",
    "keep_freed_memory",
    "process_bytes",
    "reusing_freed_memory",
]

KEPT_SHARE = 1 / 8
"""Of a process's memory limit: freed memory that stays. Without a pool of blocks half of it is at
the end of the heap and half for holes in it: in 4 GiB the end holds what a layer of GPT-2 XL makes
of 1,024 tokens."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
"""Of glibc's mallopt (malloc.h)."""

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = 65536, 128 << 10, 128 << 10
"""What glibc begins with. The heap grows by a request and the pad, and shrinks to the pad when more
than the threshold is free at its end."""

_KEPT_AT_A_TIME = 64 << 20
"""Bytes by which the heap grows at least."""

_MAPPED_FROM_BYTES = 1 << 20
"""Blocks from this size on are mappings of their own, which go when they are freed. glibc would
raise its own threshold to 32 MiB as it sees such blocks, and keep what fits between others."""

_REUSED_TO_BYTES = 32 << 20
"""Smaller blocks come from the heap where freed memory is used again: the most that glibc takes."""


def process_bytes() -> int:
    """Private writable memory of this process, as the kernel counts it against RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def give_back_freed_memory(*, kept_bytes: int) -> None:
    """From now on, and what is free now, but for about `kept_bytes` in the heap, which is used
    within `reusing_freed_memory`. Elsewhere than with glibc it does nothing."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        library.mallopt(_M_ARENA_MAX, 2)
        gc.collect()
        library.malloc_trim(0)
        library.mallopt(_M_TRIM_THRESHOLD, max(_TRIM_THRESHOLD, kept_bytes // 2))
        library.mallopt(_M_TOP_PAD, max(_TOP_PAD, kept_bytes // 4))


@contextmanager
def reusing_freed_memory() -> Generator[None]:
    """Within it, blocks come from the heap, where those before them have left room.

    For what is gone again soon: a block that stays would keep what lies before it in the heap. The
    kernel zeroes pages of fresh mappings one by one when they are touched, for all of a layer's
    values and gradients at each microbatch: a fifth of a layer's time in GPT-2 XL on two cores.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _REUSED_TO_BYTES)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


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

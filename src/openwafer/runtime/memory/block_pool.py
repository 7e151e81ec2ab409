"""torch's host memory from a pool of blocks that stay mapped, within a limit.

Decides where a run that has promised to keep to a limit of memory gets its large blocks from.
Without the pool each is a mapping of its own, which goes back to the kernel when it is freed, and
whose pages the kernel zeroes one by one when the next one is touched: a fifth of a step of GPT-2 XL
on two cores of a virtual machine, whose host takes free pages back too. With the pool a layer finds
the blocks that the last one freed, and all of them together keep within the limit. Does not decide
the limit, or what is allocated.

The pool is C++ (block_pool.cpp), compiled as TorchInductor compiles layers and kept where it keeps
them; so it is for runs that compile layers.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache
from importlib import resources
from typing import Any

__all__ = ["BlockPool", "install_block_pool"]

_log = logging.getLogger("openwafer")


class BlockPool:
    """The process's pool; see `install_block_pool`."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def limit(self, limit_bytes: int) -> None:
        """All blocks together, in use or free, keep to this as long as those in use do; free ones
        that do not fit go back now."""
        self._library.openwafer_block_pool_limit(max(0, limit_bytes))

    @property
    def mapped_bytes(self) -> int:
        """All blocks, in use or free."""
        return self._library.openwafer_block_pool_mapped()

    @property
    def num_mappings(self) -> int:
        """Blocks that were asked of the kernel so far."""
        return self._library.openwafer_block_pool_mappings()

    def close(self) -> None:
        """Keep no free block any more."""
        self.limit(0)


def install_block_pool() -> BlockPool | None:
    """From now on, for the whole process, torch's blocks of at least 1 MiB come from the pool. It
    keeps no free block before a limit is set, or after `close`.

    None where there is no such pool: elsewhere than on Linux, or (the log says so) where it does
    not compile.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        pool = BlockPool(_library())
    except (OSError, RuntimeError) as error:  # Inductor's compile errors are RuntimeErrors
        _log.warning(
            "freed memory goes back to the kernel at once, which takes time in each layer: "
            "the pool for it does not compile (%s)",
            str(error).strip().partition("\n")[0],
        )
        return None
    pool.close()
    return pool


@cache
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache  # slow to import

    source = (
        resources.files("openwafer.runtime.memory")
        .joinpath("block_pool.cpp")
        .read_text(encoding="utf-8")
    )
    library: Any = CppCodeCache.load(source, extra_flags=("-lc10",))
    library.openwafer_block_pool_limit.argtypes = [ctypes.c_uint64]
    library.openwafer_block_pool_limit.restype = None
    for function in (library.openwafer_block_pool_mapped, library.openwafer_block_pool_mappings):
        function.argtypes = []
        function.restype = ctypes.c_uint64
    return library

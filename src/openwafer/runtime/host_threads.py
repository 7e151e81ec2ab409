"""Threads beside the one that computes.

Decides how many of torch's own threads such a thread may use, so that the optimizer and copies do
not take the cores from the layers. Does not decide what runs on them.

torch keeps that number per thread, but threads that have not computed yet begin with the number set
last anywhere; so it is put back for the thread that asks.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["STACK_BYTES", "background_threads"]

STACK_BYTES = 1 << 20
"""Of each thread; the usual 8 MiB count as memory of the process."""


def background_threads(count: int, name: str, *, torch_threads: int = 1) -> ThreadPoolExecutor:
    """A pool whose threads are started already, each with `torch_threads` for torch's loops."""
    everybody_is_here = threading.Barrier(count)

    def start() -> None:
        torch.set_num_threads(torch_threads)
        everybody_is_here.wait()

    own = torch.get_num_threads()
    stack = threading.stack_size(STACK_BYTES)
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
    for started in [pool.submit(start) for _ in range(count)]:
        started.result()
    threading.stack_size(stack)
    torch.set_num_threads(own)
    return pool

"""Threads beside the one that computes, or none.

Decides how many of torch's own threads such a thread may use, so that the optimizer and copies do
not take the cores from the layers. Does not decide what runs on them, or when none is of use.

torch keeps that number per thread, but threads that have not computed yet begin with the number set
last anywhere; so it is put back for the thread that asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar, final

import torch

__all__ = ["STACK_BYTES", "OnCallersThread", "background_threads"]

_T = TypeVar("_T")

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


@final
class OnCallersThread(Executor):
    """Does what it is given at once, with all threads that the caller has; a failure is in the
    future, as it is with a pool."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

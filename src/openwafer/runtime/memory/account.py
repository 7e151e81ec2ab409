"""The account of device memory.

Decides what counts and that a budget is kept: whatever is put on the device is taken from the
account first, and more than the budget is an error. On a CPU the "device" is a part of host memory,
so the account is the only thing that can hold the promise. On a GPU torch's allocator holds it too:
it counts what the account cannot see, what operations take inside and what lies between blocks.
Does not allocate anything itself.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

from openwafer.errors import PlanError

__all__ = ["DeviceMemory", "cuda_number", "limit_gpu"]


class DeviceMemory:
    """Bytes in use by purpose, and their peak. Safe to use from several threads.

    Args:
        budget_bytes: the most that may be in use at a time; None counts without a limit.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._in_use: dict[str, int] = {}
        self.peak_bytes = 0

    @property
    def in_use_bytes(self) -> int:
        with self._lock:
            return sum(self._in_use.values())

    def take(self, purpose: str, num_bytes: int) -> None:
        """Count bytes as used.

        Raises:
            PlanError: that would be more than the budget.
        """
        with self._lock:
            total = sum(self._in_use.values()) + num_bytes
            if self._budget_bytes is not None and total > self._budget_bytes:
                held = ", ".join(f"{name} {size:,}" for name, size in self._in_use.items())
                raise PlanError(
                    f"device memory: {num_bytes:,} bytes for {purpose} are too much "
                    f"on top of what is in use ({held or 'nothing'})",
                    allowed=f"{self._budget_bytes:,} bytes",
                    hint="smaller batches, more gradient accumulation, or a larger budget",
                )
            self._in_use[purpose] = self._in_use.get(purpose, 0) + num_bytes
            self.peak_bytes = max(self.peak_bytes, total)

    def give(self, purpose: str, num_bytes: int) -> None:
        """Count bytes as free again."""
        with self._lock:
            self._in_use[purpose] = self._in_use.get(purpose, 0) - num_bytes
            assert self._in_use[purpose] >= 0, f"more {purpose} given back than taken"

    def give_all(self, purpose: str) -> None:
        with self._lock:
            self._in_use[purpose] = 0

    @contextmanager
    def explaining_exhaustion(self, device: torch.device) -> Generator[None]:
        """Say what the device's own out-of-memory error means here.

        Raises:
            PlanError: instead of torch's OutOfMemoryError.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            limit = self._budget_bytes
            # Within a promise, what ran over is what operations take inside, which no plan knows.
            way = "--device_memory, to plan for" if limit is None else "more --device_memory"
            pieces = ""
            if device.type == "cuda":
                pieces = (
                    "; against memory that is free in too small pieces, set "
                    "PYTORCH_ALLOC_CONF=expandable_segments:True"
                )
            raise PlanError(
                f"the device's memory ran out; counted in use were {self._held()}, at most "
                f"{self.peak_bytes:,} bytes so far. {_first_sentence(error)}",
                where="--device_memory",
                allowed="what the device has" if limit is None else f"{limit:,} bytes",
                hint=f"{way}, smaller microbatches (--num_microbatches), or --activations "
                f"recompute{pieces}",
            ) from error

    def _held(self) -> str:
        with self._lock:
            held = [f"{name} {size:,}" for name, size in self._in_use.items() if size]
        return ", ".join(held) or "nothing"


def limit_gpu(device: torch.device, budget_bytes: int) -> None:
    """Hold what torch's allocator takes of a GPU to a budget: more is an OutOfMemoryError, after
    what it keeps for later is given back. What the driver takes for the process itself, some
    hundred MiB, comes on top.

    Raises:
        PlanError: the GPU has less.
    """
    number = cuda_number(device)
    total = torch.cuda.get_device_properties(number).total_memory
    if budget_bytes > total:
        raise PlanError(
            f"{budget_bytes:,} bytes of device memory were promised, the GPU has {total:,}",
            where="--device_memory",
            allowed=f"at most {total:,} bytes",
            hint="a smaller --device_memory",
        )
    torch.cuda.set_per_process_memory_fraction(budget_bytes / total, number)


def cuda_number(device: torch.device) -> int:
    """The GPU's number; "cuda" alone is the current one of the calling thread."""
    return torch.cuda.current_device() if device == torch.device(device.type) else device.index


def _first_sentence(error: BaseException) -> str:
    return f"{str(error).partition('. ')[0].rstrip('.')}."

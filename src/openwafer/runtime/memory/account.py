"""The account of device memory.

Decides what counts and that a budget is kept: whatever is put on the device is taken from the
account first, and more than the budget is an error. On a CPU the "device" is a part of host memory,
so the account is the only thing that can hold the promise. Does not allocate anything itself.
"""

from __future__ import annotations

import threading

from openwafer.errors import PlanError

__all__ = ["DeviceMemory"]


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

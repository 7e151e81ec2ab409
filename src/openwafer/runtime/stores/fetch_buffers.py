"""Reading parts of the weight store's file into one buffer.

Decides which parts are read in one go, and which buffers are kept for the next layer. Does not
decide what is where in the file (disk_record.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from statistics import median

import torch

from openwafer.runtime.stores.direct_file import DirectFile, aligned, aligned_buffer, wait_for
from openwafer.runtime.stores.disk_record import WEIGHT, Entry, Record

__all__ = ["FetchBuffers", "idle_bytes"]

_GAP_BYTES = 64 << 10
"""Parts that are nearer to each other than this are read in one go."""

_MAX_IDLE = 1
"""Buffers that are kept for the next layer: one is always in use."""

_USUAL = 1.5
"""A buffer is kept, and used again, for layers whose size is within this factor."""


class FetchBuffers:
    """Buffers of the sizes that layers of a file have."""

    def __init__(self, file: DirectFile) -> None:
        self._file = file
        self._idle: list[torch.Tensor] = []
        self._sizes: list[int] = []

    def read(self, entries: Sequence[Entry]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The tensors at some places, and the buffer that they are in."""
        runs = _runs([(e.offset, e.offset + e.spec.num_bytes) for e in entries])
        buffer = self._take(sum(stop - start for start, stop in runs))
        at: dict[int, int] = {}
        reads: list[Future[None]] = []
        used = 0
        for start, stop in runs:
            at[start] = used
            reads += self._file.read(buffer[used : used + stop - start], start)
            used += stop - start
        wait_for(reads)
        tensors: list[torch.Tensor] = []
        for entry in entries:
            start = max((s for s in at if s <= entry.offset), default=0)
            first = at.get(start, 0) + entry.offset - start
            held = buffer[first : first + entry.spec.num_bytes]
            tensors.append(held.view(entry.spec.torch_dtype).view(entry.spec.shape))
        return tensors, buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Its tensors are not read any more."""
        if self._sizes and buffer.numel() <= _USUAL * median(self._sizes):
            self._idle = [*self._idle, buffer][-_MAX_IDLE:]

    def _take(self, num_bytes: int) -> torch.Tensor:
        """An idle buffer that is not much larger, or a new one."""
        self._sizes = [*self._sizes, num_bytes][-16:]
        for index, buffer in enumerate(self._idle):
            if num_bytes <= buffer.numel() <= _USUAL * num_bytes:
                return self._idle.pop(index)
        return aligned_buffer(num_bytes)


def idle_bytes(records: Sequence[Record]) -> int:
    """The most that idle buffers take: those of layers of the usual size."""
    sizes = [
        sum(entry.spec.num_bytes for entry in record.regions[WEIGHT].values()) for record in records
    ]
    return int(_MAX_IDLE * _USUAL * median(sizes)) if sizes else 0


def _runs(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of the file that hold some places, as direct I/O takes them."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted((s, aligned(e)) for s, e in places if e > s):
        if runs and start - runs[-1][1] <= _GAP_BYTES:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs

"""Reading parts of the weight store's file into one buffer.

Decides which parts are read in one go, what comes from an update's buffers instead of the disk, and
which buffers are kept for the next layer: where memory is promised, one of the usual size; where it
is not, those of all sizes, so that no step asks the kernel for pages. Does not decide what is where
in the file (disk_record.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median

import torch

from openwafer.runtime.stores.direct_file import (
    DirectFile,
    aligned,
    aligned_buffer,
    lasting_buffer,
    wait_for,
)
from openwafer.runtime.stores.disk_record import WEIGHT, Entry, Record
from openwafer.runtime.stores.disk_staging import Stagings
from openwafer.runtime.stores.pinned_memory import pinned_buffer, unpin

__all__ = ["NUM_FETCH_THREADS", "FetchBuffers", "idle_bytes"]

NUM_FETCH_THREADS = 2
"""Reads of layers' weights under way at a time, beside those of updates: a layer waits for them."""

_GAP_BYTES = 64 << 10
"""Parts that are nearer to each other than this are read in one go."""

_MAX_IDLE = 1
"""Buffers that are kept for the next layer where memory is promised: one is always in use."""

_MAX_IDLE_LARGEST = 3
"""Where it is not, all idle buffers together may take as much as so many of the largest: one that
computes, one fetched ahead, one of the pass before."""

_USUAL = 1.5
"""A buffer is kept, and used again, for layers whose size is within this factor."""


class FetchBuffers:
    """Buffers of the sizes that layers of a file have. One thread reads while another gives back.

    Args:
        stagings: hold what is newer than the file.
        threads: that read.
        promised: whether memory is.
        pin: buffers are pinned, for a GPU to read; what is given back has been read.
    """

    def __init__(
        self,
        file: DirectFile,
        stagings: Stagings,
        threads: ThreadPoolExecutor,
        *,
        promised: bool,
        pin: bool = False,
    ) -> None:
        self._file, self._stagings, self._threads = file, stagings, threads
        self._promised, self._pin = promised, pin
        self._changing = threading.Lock()
        self._idle: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._largest = 0

    def read(self, entries: Sequence[Entry]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The tensors at some places, and the buffer that they are in."""
        runs = _runs([(e.offset, e.offset + e.spec.num_bytes) for e in entries])
        buffer = self._take(sum(stop - start for start, stop in runs))
        at: dict[int, int] = {}
        reads: list[Future[None]] = []
        used = 0
        for start, stop in runs:
            at[start] = used
            target = buffer[used : used + stop - start]
            for first, last in self._stagings.fill(target, start):
                part = target[first - start : last - start]
                reads += self._file.read(part, first, by=self._threads)
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
        with self._changing:
            if self._promised and buffer.numel() > _USUAL * median(self._sizes):
                self._let_go(buffer)
                return
            self._idle.append(buffer)
            while self._keeps_too_much():
                self._let_go(self._idle.pop(0))

    def close(self) -> None:
        """Let go of idle buffers."""
        while self._idle:
            self._let_go(self._idle.pop())

    def _keeps_too_much(self) -> bool:
        if self._promised:
            return len(self._idle) > _MAX_IDLE
        most = _MAX_IDLE_LARGEST * self._largest
        return sum(buffer.numel() for buffer in self._idle) > most

    def _let_go(self, buffer: torch.Tensor) -> None:
        if self._pin:
            unpin(buffer)

    def _take(self, num_bytes: int) -> torch.Tensor:
        """An idle buffer that is not much larger, or a new one."""
        with self._changing:
            self._sizes = [*self._sizes, num_bytes][-16:]
            self._largest = max(self._largest, num_bytes)
            for index, buffer in enumerate(self._idle):
                if num_bytes <= buffer.numel() <= _USUAL * num_bytes:
                    return self._idle.pop(index)
        if self._pin:
            return pinned_buffer(num_bytes)
        return aligned_buffer(num_bytes) if self._promised else lasting_buffer(num_bytes)


def idle_bytes(records: Sequence[Record]) -> int:
    """The most that idle buffers take where memory is promised: of layers of the usual size."""
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

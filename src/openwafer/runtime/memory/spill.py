"""Saved tensors outside of device memory, between a layer's forward and backward pass.

Decides how tensors become bytes in a file and come back with the same values, shapes and strides:
written while later layers compute, read while the layer after them runs backward. Does not decide
which layers spill (step_memory.py) or when their turn is (activations.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.stores.direct_file import (
    DirectFile,
    aligned,
    aligned_buffer,
    io_threads,
    wait_for,
)

__all__ = ["SPILL_BUFFERS", "DiskSpill", "HostSpill", "Spill", "Tensors"]

SPILL_BUFFERS = 3
"""Staging buffers of a spill file: one is filled or used, two are on their way."""

Tensors = Sequence[torch.Tensor]


class Spill(ABC):
    """Saved tensors outside of device memory, by (layer, microbatch)."""

    @abstractmethod
    def put(self, unit: tuple[int, int], tensors: Tensors) -> None:
        """Begin to take tensors over; they may be dropped when this returns."""

    @abstractmethod
    def ask(self, unit: tuple[int, int]) -> None:
        """These tensors are wanted soon. Asked in the order in which they are wanted."""

    @abstractmethod
    def get(self, unit: tuple[int, int]) -> Tensors:
        """The tensors as they were given: values, shapes and strides. Valid until `done`."""

    @abstractmethod
    def done(self, unit: tuple[int, int]) -> None:
        """They are not needed any more."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything; a new step begins."""

    def close(self) -> None:
        return


class HostSpill(Spill):
    """In host memory. On a CPU device that is where they are already."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensors, torch.device]] = {}

    def put(self, unit: tuple[int, int], tensors: Tensors) -> None:
        device = tensors[0].device if tensors else torch.device("cpu")
        self._kept[unit] = ([tensor.cpu() for tensor in tensors], device)

    def ask(self, unit: tuple[int, int]) -> None:
        return

    def get(self, unit: tuple[int, int]) -> Tensors:
        tensors, device = self._kept[unit]
        return [tensor.to(device) for tensor in tensors]

    def done(self, unit: tuple[int, int]) -> None:
        del self._kept[unit]

    def clear(self) -> None:
        self._kept.clear()


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of memory in the file, and the tensors (by number) that show it."""

    start: int
    num_bytes: int
    shown_by: tuple[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], int], ...]


@dataclass(slots=True, eq=False)
class _Unit:
    """Where a unit is: at `offset` in the file, or (`buffer`) on its way or here."""

    offset: int
    num_bytes: int
    num_tensors: int
    blocks: tuple[_Block, ...]
    buffer: torch.Tensor | None = None
    moving: Sequence[Future[None]] = ()


class DiskSpill(Spill):
    """In a file below `directory`, through a few staging buffers; on a CPU device.

    Whole blocks of memory are written, each once, so that tensors that share one share it again.

    Args:
        unit_bytes: the most that one (layer, microbatch) saves, as far as is known before.
    """

    def __init__(
        self, directory: Path, unit_bytes: int, num_units: int, memory: DeviceMemory
    ) -> None:
        self._memory = memory
        self._threads = io_threads()
        try:
            self._file = DirectFile(directory, aligned(unit_bytes) * num_units, self._threads)
        except BaseException:
            self._threads.shutdown()
            raise
        self._units: dict[tuple[int, int], _Unit] = {}
        self._end = 0
        self._free = [aligned_buffer(unit_bytes) for _ in range(SPILL_BUFFERS)]
        memory.take("spill buffers", sum(buffer.numel() for buffer in self._free))
        self._leaving: deque[_Unit] = deque()
        self._asked: deque[tuple[int, int]] = deque()

    def put(self, unit: tuple[int, int], tensors: Tensors) -> None:
        blocks, num_bytes = _blocks_of(tensors)
        buffer = self._take(num_bytes)
        held = _Unit(self._end, num_bytes, len(tensors), blocks, buffer)
        self._end += aligned(num_bytes)
        self._file.grow(self._end)
        for block in blocks:
            source = _bytes_of(tensors[block.shown_by[0][0]].untyped_storage())
            buffer[block.start : block.start + block.num_bytes].copy_(source)
        held.moving = self._file.write(buffer[: aligned(num_bytes)], held.offset)
        self._units[unit] = held
        self._leaving.append(held)

    def ask(self, unit: tuple[int, int]) -> None:
        if unit in self._units:
            self._asked.append(unit)
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Begin to read what is asked for next, as far as there are buffers."""
        while self._asked:
            unit = self._units[self._asked[0]]
            if unit.buffer is None:
                if self._leaving and not self._free:
                    self._written(self._leaving.popleft())
                if not self._free:
                    return
                unit.buffer = self._take(unit.num_bytes)
                unit.moving = self._file.read(unit.buffer[: aligned(unit.num_bytes)], unit.offset)
            elif unit in self._leaving:
                self._leaving.remove(unit)  # it is still here: no need to read it
            self._asked.popleft()

    def get(self, unit: tuple[int, int]) -> Tensors:
        held = self._units[unit]
        if held.buffer is None or held in self._leaving:
            self._asked.appendleft(unit)
            self._read_ahead()
        assert held.buffer is not None, "a unit is used while all buffers are in use"
        wait_for(held.moving)
        tensors: dict[int, torch.Tensor] = {}
        for block in held.blocks:
            part = held.buffer[block.start : block.start + block.num_bytes]
            for number, dtype, shape, strides, offset in block.shown_by:
                first = int(part.storage_offset()) // dtype.itemsize
                tensors[number] = part.view(dtype).as_strided(shape, strides, first + offset)
        return [tensors[number] for number in range(held.num_tensors)]

    def done(self, unit: tuple[int, int]) -> None:
        held = self._units.pop(unit)
        if held.buffer is not None:
            self._free.append(held.buffer)
            held.buffer = None
        self._read_ahead()

    def clear(self) -> None:
        for unit in self._units.values():
            wait_for(unit.moving)
            if unit.buffer is not None:
                self._free.append(unit.buffer)
                unit.buffer = None
        self._units.clear()
        self._leaving.clear()
        self._asked.clear()
        self._end = 0

    def close(self) -> None:
        self._threads.shutdown()
        self._file.close()
        self._free.clear()
        self._memory.give_all("spill buffers")

    def _written(self, unit: _Unit) -> None:
        """Wait until a unit is in the file, and free its buffer."""
        wait_for(unit.moving)
        assert unit.buffer is not None
        self._free.append(unit.buffer)
        unit.buffer = None

    def _take(self, num_bytes: int) -> torch.Tensor:
        """A free buffer; the longest wait is for the oldest write."""
        if not self._free:
            self._written(self._leaving.popleft())
        buffer = self._free.pop()
        if buffer.numel() < aligned(num_bytes):  # larger than was known before
            self._memory.take("spill buffers", aligned(num_bytes) - buffer.numel())
            buffer = aligned_buffer(num_bytes)
        return buffer


def _blocks_of(tensors: Tensors) -> tuple[tuple[_Block, ...], int]:
    """The blocks of memory that tensors show, one after another, and their size together."""
    shown: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        shown.setdefault(tensor.untyped_storage().data_ptr(), []).append(number)
    blocks: list[_Block] = []
    end = 0
    for numbers in shown.values():
        size = tensors[numbers[0]].untyped_storage().nbytes()
        views = tuple(
            (n, t.dtype, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()))
            for n, t in ((number, tensors[number]) for number in numbers)
        )
        blocks.append(_Block(end, size, views))
        end += -(-size // 64) * 64
    return tuple(blocks), end


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)

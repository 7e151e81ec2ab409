"""Memory that a worker and the coordinator of one machine both see.

Decides how a worker offers such memory, how the coordinator makes sure that what it opens is that,
and when a slot of it may be written again: when nothing of the batch in it is in use any more.
A batch then crosses by one copy, made by the worker; without a slot that is free and large enough
it travels over the connection like any other. Does not decide what is written (`tree.py`).

The memory is an anonymous file (memfd: Linux), sealed so that nobody can shorten it under a reader;
its pages exist once they are written. It ends with the last process that has it, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openwafer.errors import StreamingError

__all__ = ["ALIGNMENT_BYTES", "SlotReader", "SlotWriter", "aligned"]

ALIGNMENT_BYTES = 64
"""Of each tensor in a slot: a cache line, and more than any number needs."""

_MAX_MAPPED_BYTES = 1 << 40
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def aligned(num_bytes: int) -> int:
    """The next place at which a tensor may begin."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SlotWriter:
    """The worker's side: `num_slots` slots of `slot_bytes` each.

    Raises:
        OSError: the system has no such memory, or does not give it.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("memory that processes share by descriptor is Linux's")
        self._slot_bytes = slot_bytes
        # The last one given back first: its pages are there already.
        self._free = list(reversed(range(num_slots)))
        size = num_slots * slot_bytes
        self._descriptor = os.memfd_create("openwafer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, size)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _seals())
            self._memory = np.frombuffer(mmap.mmap(self._descriptor, size), np.uint8)
            status = os.fstat(self._descriptor)
            self.offer: Mapping[str, Any] = {
                "machine": _BOOT_ID.read_text(encoding="ascii").strip(),
                "pid": os.getpid(),
                "descriptor": self._descriptor,
                "device": status.st_dev,
                "inode": status.st_ino,
                "num_slots": num_slots,
                "slot_bytes": slot_bytes,
            }
            """What the coordinator needs to open it (`SlotReader`), for JSON."""
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, buffers: Sequence[memoryview]) -> int | None:
        """Copy `buffers` into a free slot, each at the next aligned place; the slot's number. None
        where no slot is free or they do not fit."""
        size = sum(aligned(buffer.nbytes) for buffer in buffers)
        if not self._free or not 0 < size <= self._slot_bytes:
            return None
        slot = self._free.pop()
        place = slot * self._slot_bytes
        for buffer in buffers:
            # NumPy's copy, unlike memoryview's, lets other threads run.
            np.copyto(self._memory[place : place + buffer.nbytes], np.frombuffer(buffer, np.uint8))
            place += aligned(buffer.nbytes)
        return slot

    def give_back(self, slots: Sequence[int]) -> None:
        """The coordinator uses these no more."""
        self._free.extend(slots)

    def close(self) -> None:
        """Give up the memory, which the coordinator may still have. Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._free.clear()
            self._memory = np.empty(0, np.uint8)


class SlotReader:
    """The coordinator's side of what a worker offers.

    Args:
        offer: of a worker that has proved itself (`SlotWriter.offer`).

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be opened here (another machine, another
            container), or is not what was offered.
    """

    def __init__(self, offer: Mapping[str, Any]) -> None:
        num_slots, self._slot_bytes = int(offer["num_slots"]), int(offer["slot_bytes"])
        size = num_slots * self._slot_bytes
        if not 0 < size <= _MAX_MAPPED_BYTES or self._slot_bytes % mmap.PAGESIZE:
            raise ValueError("slots of an impossible size")
        if offer["machine"] != _BOOT_ID.read_text(encoding="ascii").strip():
            raise OSError("it is on another machine")
        self._memory = memoryview(_open(offer, size))
        self._num_slots = num_slots
        self._leased: set[int] = set()
        self._returned: deque[int] = deque()

    def lease(self, slot: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` of a slot, which stays leased as long as the result exists, or
        anything that keeps it. (Slices of a memoryview do not; `torch.frombuffer` does.)

        Raises:
            StreamingError: there is no such slot, it is in use, or shorter than that.
        """
        if not 0 <= slot < self._num_slots or slot in self._leased:
            raise StreamingError(f"received a batch in slot {slot}, which is in use or is none")
        if not 0 < num_bytes <= self._slot_bytes:
            raise StreamingError(f"received a batch of {num_bytes} bytes in a slot")
        start = slot * self._slot_bytes
        found = self._memory[start : start + num_bytes]
        self._leased.add(slot)
        # A deque may be added to by whatever thread drops the last tensor.
        weakref.finalize(found, self._returned.append, slot).atexit = False
        return found

    def take_returned(self) -> list[int]:
        """The slots that have come out of use since the last call."""
        found: list[int] = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._returned.popleft())
        self._leased.difference_update(found)
        return found


def _open(offer: Mapping[str, Any], size: int) -> mmap.mmap:
    """Map a worker's memory, once it is known to be that."""
    path = f"/proc/{int(offer['pid'])}/fd/{int(offer['descriptor'])}"
    # Looked at first: opening whatever else might be there could have effects.
    _check(os.stat(path), offer, size)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor), offer, size)
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() != _seals():
            raise ValueError("memory that could be shortened")
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _check(status: os.stat_result, offer: Mapping[str, Any], size: int) -> None:
    found = (status.st_dev, status.st_ino, status.st_size)
    if not stat.S_ISREG(status.st_mode) or found != (offer["device"], offer["inode"], size):
        raise ValueError("what is there is not what was offered")

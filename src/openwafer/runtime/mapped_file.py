"""A file whose tensors are views of it, here and in other processes.

Decides how a file is mapped, and how a view says where in which file it is, so that another process
can look at the same bytes without being sent them. Does not decide what is in the file.

A private mapping that cannot be written to: it counts as no memory of the process (RLIMIT_DATA),
and what was read of it the kernel may drop.
"""

from __future__ import annotations

import mmap
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

__all__ = ["FileStamp", "MappedFile", "place_of", "read_only_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """Which file it is, as all processes that see it find it. changed_ns: its modification time."""

    path: str
    num_bytes: int
    changed_ns: int

    def is_seen(self) -> bool:
        """Whether this process can read the same file there."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        same = (found.st_size, found.st_mtime_ns) == (self.num_bytes, self.changed_ns)
        return same and os.access(self.path, os.R_OK)


_addresses: WeakKeyDictionary[mmap.mmap, tuple[int, FileStamp]] = WeakKeyDictionary()
"""First byte in memory of the mappings that views are still held of."""


class MappedFile:
    """Mapped as long as a view of it is held.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            self._map = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        self.stamp = FileStamp(
            path=str(path.resolve()), num_bytes=found.st_size, changed_ns=found.st_mtime_ns
        )
        _addresses[self._map] = (self.view(0, 1).data_ptr(), self.stamp)

    def view(self, start: int, num_bytes: int) -> torch.Tensor:
        """Some bytes [num_bytes], at least one, uint8: not to be written to."""
        return read_only_bytes(self._map, start, num_bytes)


def read_only_bytes(memory: mmap.mmap, start: int, num_bytes: int) -> torch.Tensor:
    """Some bytes of a mapping that cannot be written to [num_bytes], at least one, uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to is what is wanted
        return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=num_bytes)


def place_of(tensor: torch.Tensor) -> tuple[FileStamp, int] | None:
    """The file that a tensor is a view of, and its first byte there; None where it is of none."""
    if tensor.device.type != "cpu":
        return None
    here = tensor.data_ptr()
    for address, stamp in list(_addresses.values()):
        if address <= here < address + stamp.num_bytes:
            return stamp, here - address
    return None

"""A file without a name that is read and written past the page cache.

Decides how bytes move between buffers and the disk: direct I/O where the file system takes it,
otherwise through the page cache and out of it again; in blocks, by a few threads at once. Does not
decide what is where in the file (disk_store.py, activations.py).

The file has no name once it is open, so it goes with the process, also with one that is killed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from openwafer.errors import PlanError
from openwafer.runtime.host_threads import background_threads
from openwafer.runtime.mapped_file import read_only_bytes

__all__ = [
    "ALIGNMENT_BYTES",
    "NUM_THREADS",
    "DirectFile",
    "aligned",
    "aligned_buffer",
    "io_threads",
    "lasting_buffer",
    "lasting_bytes",
    "wait_for",
]

_log = logging.getLogger("openwafer")

ALIGNMENT_BYTES = 4096
"""What direct I/O asks of offsets, sizes and addresses on every file system in use."""

BLOCK_BYTES = 4 << 20
"""The most that one call moves: large enough for a disk's full rate, small enough that several
threads share one record."""

NUM_THREADS = 4
"""Calls under way at a time: with four a virtual disk reached its full rate (1.8 GB/s written where
one thread got 1.1). They wait in the kernel, so they cost the computing threads next to nothing."""

HUGE_PAGE_BYTES = 2 << 20
"""What x86-64 and 64-bit ARM with pages of 4 KiB have. Direct I/O looks up and holds each page of a
buffer by itself; with huge pages there are 512 times fewer."""


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to what direct I/O takes."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def aligned_buffer(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor whose address and size direct I/O takes; at least `num_bytes` long."""
    size = aligned(num_bytes)
    memory = torch.empty(size + ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT_BYTES
    return memory[start : start + size]


def lasting_bytes(num_bytes: int) -> int:
    """What a `lasting_buffer` takes of host memory."""
    size = aligned(num_bytes)
    return size + (HUGE_PAGE_BYTES if size >= HUGE_PAGE_BYTES else ALIGNMENT_BYTES)


def lasting_buffer(num_bytes: int) -> torch.Tensor:
    """An `aligned_buffer` that is used again and again: on huge pages, where the kernel has some
    and it is that large."""
    size = aligned(num_bytes)
    if size < HUGE_PAGE_BYTES:
        return aligned_buffer(num_bytes)
    memory = mmap.mmap(-1, lasting_bytes(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[start : start + size]


def io_threads(count: int = NUM_THREADS) -> ThreadPoolExecutor:
    """Threads for the files of one run."""
    return background_threads(count, "weight-store-io")


def wait_for(futures: Iterable[Future[None]]) -> None:
    """Wait for all of them; then raise the first failure."""
    failures = [error for future in list(futures) if (error := future.exception()) is not None]
    if failures:
        raise failures[0]


class DirectFile:
    """A preallocated file below `directory`.

    Offsets and sizes must be multiples of ALIGNMENT_BYTES, buffers from `aligned_buffer`.

    Raises:
        PlanError: the folder cannot be used or has too little room; later, a read or write that
            failed.
    """

    def __init__(self, directory: Path, num_bytes: int, threads: ThreadPoolExecutor) -> None:
        self._directory, self._threads = directory, threads
        self._file = self._direct = -1
        self.num_bytes = 0
        try:
            self._file, name = tempfile.mkstemp(prefix="openwafer-store-", dir=directory)
            try:
                self._direct = _open_direct(name, directory)
            finally:
                os.unlink(name)
            self.grow(aligned(num_bytes))
        except OSError as error:
            self.close()
            raise _failed(error, directory) from error
        except BaseException:
            self.close()
            raise

    def grow(self, num_bytes: int) -> None:
        """Take the space now, so that a full disk is an error before training and not during it."""
        more = num_bytes - self.num_bytes
        if more <= 0:
            return
        try:
            os.posix_fallocate(self._file, self.num_bytes, more)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _failed(error, self._directory) from error
            raise PlanError(
                f"no room for the weight store: {more:,} bytes more are needed",
                where=str(self._directory),
                allowed=f"{shutil.disk_usage(self._directory).free:,} bytes are free there",
                hint="give --weight_store disk:DIR on a larger disk, or ram",
            ) from error
        self.num_bytes = num_bytes

    def read(
        self, target: torch.Tensor, offset: int, *, by: ThreadPoolExecutor | None = None
    ) -> list[Future[None]]:
        """Begin to fill `target`; `wait_for` the result. `by`: threads other than the file's, for
        what must not queue behind the rest."""
        return self._start(self._read_block, target, offset, by)

    def write(self, source: torch.Tensor, offset: int) -> list[Future[None]]:
        """Begin to write `source`, which must not change before `wait_for` the result."""
        return self._start(self._write_block, source, offset)

    def mapped(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Bytes of the file as a flat uint8 tensor that is read from the disk when it is looked at;
        not to be written to. No memory of the process but pages that the kernel may drop."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(
            self._file, offset - start + num_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=start
        )
        return read_only_bytes(view, offset - start, num_bytes)

    def forget_cached(self) -> None:
        """Drop what reading `mapped` bytes left in the page cache."""
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for file in {self._file, self._direct} - {-1}:
            os.close(file)
        self._file = self._direct = -1

    def _start(
        self, move: Any, buffer: torch.Tensor, offset: int, by: ThreadPoolExecutor | None = None
    ) -> list[Future[None]]:
        assert offset % ALIGNMENT_BYTES == 0
        assert buffer.numel() % ALIGNMENT_BYTES == 0
        array: Any = buffer.numpy()
        view = memoryview(array) if buffer.numel() else memoryview(b"")
        return [
            (by or self._threads).submit(move, view[start : start + BLOCK_BYTES], offset + start)
            for start in range(0, len(view), BLOCK_BYTES)
        ]

    def _read_block(self, view: memoryview, offset: int) -> None:
        try:
            self._move(os.preadv, view, offset)
            self._leave_no_pages(offset, len(view), written=False)
        except OSError as error:
            raise _failed(error, self._directory) from error

    def _write_block(self, view: memoryview, offset: int) -> None:
        try:
            self._move(os.pwritev, view, offset)
            self._leave_no_pages(offset, len(view), written=True)
        except OSError as error:
            raise _failed(error, self._directory) from error

    def _move(self, call: Any, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            # A short count may end where direct I/O cannot go on.
            direct = self._direct >= 0 and done % ALIGNMENT_BYTES == 0
            count = call(self._direct if direct else self._file, [view[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the weight store's file is shorter than its record")
            done += count

    def _leave_no_pages(self, offset: int, num_bytes: int, *, written: bool) -> None:
        if self._direct >= 0:
            return
        if written:  # pages that wait to be written cannot be dropped
            os.fdatasync(self._file)
        os.posix_fadvise(self._file, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _open_direct(name: str, directory: Path) -> int:
    """The file again for direct I/O; -1 where the file system refuses it."""
    try:
        return os.open(name, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _log.warning(
            "%s has no direct I/O: the weight store goes through the page cache there", directory
        )
        return -1


def _failed(error: OSError, directory: Path) -> PlanError:
    return PlanError(
        f"the weight store cannot be used: {error.strerror or error}",
        where=str(directory),
        hint="give --weight_store disk:DIR on another disk, or ram; go on from the last checkpoint",
    )

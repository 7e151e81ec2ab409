"""torch's archive of tensors and plain values, some of them in other processes.

Decides how such an archive is written without ever holding more than one tensor of another process,
and which tensors share memory. Does not decide when the file it goes to is whole, or how it is read
(checkpoint_file.py).
"""

from __future__ import annotations

import mmap
import pickle
from typing import IO, Any, cast

import torch
from torch.utils import _pytree as pytree

from openwafer.nested import tensors_in
from openwafer.runtime.elsewhere import bytes_of, is_elsewhere
from openwafer.runtime.mapped_file import read_only_bytes

__all__ = ["num_bytes_of", "save_archive", "storage_key"]


def num_bytes_of(contents: object) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples; a shared storage counts once."""
    storages = {storage_key(t): t.untyped_storage().nbytes() for t in tensors_in(contents)}
    return sum(storages.values())


def storage_key(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory, also where that is elsewhere: what torch.save too
    tells storages apart by."""
    storage: Any = tensor.untyped_storage()
    return int(storage._cdata)


def save_archive(contents: dict[str, Any], file: IO[bytes]) -> None:
    """What torch.save writes, with the tensors that are elsewhere in it.

    Raises:
        OSError: the file cannot be written.
        LaunchError: a process that has a tensor is gone.
    """
    guarded = _Guarded(file)
    try:
        if any(map(is_elsewhere, tensors_in(contents))):
            _save_gathered(contents, cast("IO[bytes]", guarded))
        else:
            torch.save(contents, cast("IO[bytes]", guarded))
    except RuntimeError as error:
        if guarded.failure is not None:
            raise guarded.failure from error
        raise


class _Guarded:
    """A file that remembers why a write failed: torch's writer turns the first OSError into a
    RuntimeError about stream positions."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_gathered(contents: dict[str, Any], file: IO[bytes]) -> None:
    """torch.save where some tensors are elsewhere: the same file as with all of them here.

    Torch pickles tensors whose memory is never looked at, and hands each storage on to be written,
    in the order in which it first came to it: there the bytes are brought. No public function of
    torch stops at that point.
    """
    serialization: Any = torch.serialization
    unread: dict[int, torch.Tensor] = {}

    def unread_form(value: object) -> object:
        if not isinstance(value, torch.Tensor) or not is_elsewhere(value):
            return value
        key = storage_key(value)
        if key not in unread:
            unread[key] = _unread(value.untyped_storage().nbytes())
        typed = unread[key].view(value.dtype)
        return typed.as_strided(value.shape, value.stride(), value.storage_offset())

    outline = pytree.tree_map(unread_form, contents)
    sources = {
        storage_key(a): b for a, b in zip(tensors_in(outline), tensors_in(contents), strict=True)
    }
    with serialization._open_zipfile_writer_buffer(file) as archive:
        gathered = _Gathered(archive, list(sources.values()))
        serialization._save(outline, gathered, pickle, serialization.DEFAULT_PROTOCOL, False)


class _Gathered:
    """torch's archive, with the bytes of tensors that are elsewhere.

    Args:
        sources: a tensor of each storage, in torch's order.
    """

    def __init__(self, archive: Any, sources: list[torch.Tensor]) -> None:
        self._archive, self._sources = archive, sources

    def write_record(self, name: str, data: Any, num_bytes: int) -> None:
        folder, _, number = name.partition("/")
        if folder == "data":
            source = self._sources[int(number)]
            assert num_bytes == source.untyped_storage().nbytes(), "torch's order is another"
            if is_elsewhere(source):
                data = bytes_of(source).untyped_storage()
        self._archive.write_record(name, data, num_bytes)


def _unread(num_bytes: int) -> torch.Tensor:
    """So many bytes of addresses, without memory."""
    view = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    return read_only_bytes(view, 0, num_bytes)

"""One checkpoint file on disk: written whole or not at all, and never read unless it is whole.

Decides how a dictionary of tensors and plain values becomes a file that survives a crash, a full
disk and a bad sector, and how damage is found before anything is loaded. Does not decide what a
checkpoint holds (checkpoint.py), how its archive is made (checkpoint_archive.py) or which one is
used (checkpoint_dir.py).

The format is torch's own zip archive, so that `torch.load(path, weights_only=True)` reads it
anywhere. Each record of the archive carries a CRC-32, which `torch.load` itself does not check:
`verify_file` does, over every byte that is loaded.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from openwafer.errors import CheckpointError
from openwafer.nested import tensors_in
from openwafer.runtime.elsewhere import is_elsewhere
from openwafer.runtime.mapped_file import MappedFile
from openwafer.train.checkpoint_archive import num_bytes_of, save_archive, storage_key

__all__ = ["DamagedCheckpointError", "read_file", "verify_file", "write_file"]

SLACK_BYTES = 64 * 1024
"""Room asked for beyond the tensors: the archive's own records and the folder's entry."""

BLOCK_BYTES = 1 << 20
"""Read size while checking: large enough that the CRC and not the call is what takes the time."""

SMALL_BYTES = 64 * 1024
"""Tensors below this are read at once: a page each would not pay."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpointError(CheckpointError):
    """The file is not a whole checkpoint: cut short, changed, or something else entirely."""


def write_file(path: Path, contents: Mapping[str, Any]) -> int:
    """Write `contents` to `path` atomically and durably; the size of the file in bytes.

    The bytes go to a temporary file beside `path`, are flushed to the disk, and take the name
    last: at every moment `path` is either the old whole file or the new whole file. Tensors that
    are elsewhere are brought one at a time, each when it is written, into the same file.

    Raises:
        CheckpointError: too little room, or the file system refused; the temporary file is gone.
        LaunchError: the process that has a tensor is gone; the temporary file too.
    """
    plain = cast("dict[str, Any]", _plain(contents, "checkpoint", _compacted_storages(contents)))
    needed = num_bytes_of(plain) + SLACK_BYTES
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_room(path, needed)
        with temporary.open("wb") as file:
            save_archive(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
        return path.stat().st_size
    except OSError as error:
        raise _refused(path, needed, error) from error
    finally:
        with suppress(OSError):  # nothing to remove after success
            temporary.unlink()


def temporary_path(path: Path) -> Path:
    """Where `write_file(path, …)` builds the file. One name per path, so that the leftover of a
    killed process is found and overwritten rather than piled up."""
    return path.with_name(f".{path.name}.tmp")


def verify_file(path: Path) -> None:
    """Check every record of the archive against its checksum, in one pass, loading nothing.

    Files in torch's older format (before 1.6) carry no checksum: only their first bytes are
    looked at here, and damage shows when they are read.

    Raises:
        DamagedCheckpointError: the file is cut short, altered or no checkpoint.
    """
    try:
        if not zipfile.is_zipfile(path):
            _require_legacy(path)
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.filename.endswith("data.pkl") for entry in entries):
                raise zipfile.BadZipFile("it holds no `data.pkl`")
            for entry in entries:
                _verify_entry(archive, entry)
    except FileNotFoundError as error:
        raise CheckpointError("there is no such checkpoint", where=str(path)) from error
    except IsADirectoryError as error:
        raise CheckpointError("this is a folder, not a checkpoint file", where=str(path)) from error
    except Exception as error:
        # zipfile answers a damaged archive with half a dozen unrelated exception types.
        raise _damaged(path, str(error) or type(error).__name__) from error


def read_file(path: Path) -> dict[str, Any]:
    """The contents of a file that `verify_file` passes, tensors on the CPU.

    Large tensors are views of the file: copy what is to be kept, and do not write to them. They
    take no memory of the process, so that a model larger than it can be loaded piece by piece.

    Raises:
        DamagedCheckpointError: damaged, or of types that cannot be read without running code.
    """
    verify_file(path)
    try:
        loaded: object = (
            _load_mapped(path)
            if zipfile.is_zipfile(path)
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the checkpoint holds Python objects that could run code when read",
            where=str(path),
            allowed="tensors, numbers, strings, and dicts and lists of them",
            hint="save it again from its own program with such values only "
            f"(torch: {str(error).splitlines()[0]})",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else "unreadable") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            "the file holds no dictionary", where=str(path), allowed="a checkpoint or a state_dict"
        )
    return cast("dict[str, Any]", loaded)


def _load_mapped(path: Path) -> object:
    """What torch.load gives, with the tensors as read-only views of the file.

    torch's own memory mapping is a private writable one, which counts as memory of the process as
    soon as it is made (RLIMIT_DATA). Without data, torch.load says where in the file they are.
    """
    with FakeTensorMode():
        outline: object = torch.load(path, map_location="cpu", weights_only=True)
    file = MappedFile(path)
    blocks: dict[int, torch.Tensor] = {}

    def real(value: object) -> object:
        if not isinstance(value, FakeTensor):
            return value
        storage: Any = value.untyped_storage()
        start = int(storage._checkpoint_offset)
        if start not in blocks:
            blocks[start] = _view_of(file, start, storage.nbytes())
        typed = blocks[start].view(value.dtype)
        return typed.as_strided(value.shape, value.stride(), value.storage_offset())

    return pytree.tree_map(real, outline)


def _view_of(file: MappedFile, start: int, num_bytes: int) -> torch.Tensor:
    """Bytes of a mapped file; a copy where they are few, or lie where no number may begin."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    found = file.view(start, num_bytes)
    return found.clone() if num_bytes < SMALL_BYTES or start % 16 else found


def _require_room(path: Path, needed: int) -> None:
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refused(path: Path, needed: int, error: OSError) -> CheckpointError:
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
        except OSError:
            free = "the free space is not known"
        return CheckpointError(
            f"no room for the checkpoint: it needs {needed:,} bytes, {free} ({reason})",
            where=str(path),
            hint="free some space, or lower `runconfig.keep_checkpoint_max`; earlier checkpoints "
            "are untouched, and the same command goes on from the newest",
        )
    return CheckpointError(
        f"the checkpoint cannot be written: {reason}",
        where=str(path),
        hint="check that the folder can be written to; earlier checkpoints are untouched",
    )


def _damaged(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"the checkpoint is damaged: {why}",
        where=str(path),
        hint="use an earlier one (`--checkpoint_path`), or delete this file",
    )


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable; file systems without folder handles refuse harmlessly."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        raise zipfile.BadZipFile(f"`{entry.filename}` states two sizes")
    with archive.open(entry) as record:
        while record.read(BLOCK_BYTES):  # raises at the end if the CRC is another
            pass


def _require_legacy(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(1)
    if start != pickle.PROTO:
        raise zipfile.BadZipFile("it is cut short, or no checkpoint" if start else "it is empty")


def _compacted_storages(contents: Mapping[str, Any]) -> set[int]:
    """Storages of which the tensors use little: torch would save all of a storage for a small
    view into it. Views that together cover their storage stay views, at no cost in memory."""
    used: dict[int, dict[tuple[int, int], int]] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors_in(contents):
        storage = tensor.untyped_storage()
        num_bytes = tensor.numel() * tensor.element_size()
        place = (int(tensor.storage_offset()), num_bytes)
        used.setdefault(storage_key(tensor), {})[place] = num_bytes
        sizes[storage_key(tensor)] = storage.nbytes()
    return {key for key, views in used.items() if sum(views.values()) < 0.9 * sizes[key]}


def _plain(value: object, name: str, compact: set[int]) -> object:
    """`value` in the types that `torch.load(weights_only=True)` takes."""
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, compact)
    if value is None or isinstance(value, (bool, int, float, str)):
        return _plain_number(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {_plain_key(key): _plain(item, f"{name}.{key}", compact) for key, item in items}
    if isinstance(value, (list, tuple)):
        items = [_plain(v, f"{name}[{i}]", compact) for i, v in enumerate(cast("Any", value))]
        return tuple(items) if isinstance(value, tuple) else items
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return item()
    raise CheckpointError(
        f"a value of type `{type(value).__name__}` cannot be put into a checkpoint",
        where=name,
        allowed="tensors, numbers, strings, and dicts, lists and tuples of them",
    )


def _plain_number(value: object) -> object:
    """Subclasses (an enum, a NumPy float64) would need their class to be read again. A text is one
    object wherever it stands: pickle writes it once, and the file depends on what it says alone."""
    if isinstance(value, str):
        return sys.intern(str(value))
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def _plain_key(key: object) -> object:
    return sys.intern(key) if type(key) is str else key


def _plain_tensor(tensor: torch.Tensor, compact: set[int]) -> torch.Tensor:
    if is_elsewhere(tensor):
        return tensor
    tensor = tensor.detach().cpu()
    if type(tensor) is not torch.Tensor:
        tensor = tensor.as_subclass(torch.Tensor)
    if storage_key(tensor) in compact and math.prod(tensor.shape):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor

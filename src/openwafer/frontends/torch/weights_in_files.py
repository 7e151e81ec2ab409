"""Building a model whose weights do not fit into memory.

Decides that, while the user's code builds its model, every large tensor that it makes lies in a
file instead of in memory: same code, same random draws in the same order, same numbers, and no more
memory than for one tensor. Does not decide where the weights go from there (the weight store copies
them, one after another), or when nobody needs them in memory any more.

The files have no names once they are open, so they go with the tensors or the process. Their pages
are the kernel's to keep or to write out; a limit on the process's own memory does not count them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from openwafer.errors import PlanError

__all__ = ["WeightsInFiles", "drop_pages"]

SMALLEST_BYTES = 1 << 20
"""Smaller tensors stay in memory: a file each would cost more than it saves."""

_PREFIX = "openwafer-weights-"


class WeightsInFiles(TorchFunctionMode):
    """While active, new CPU tensors of a mebibyte or more lie in files below `folder`.

    Raises:
        PlanError: a file cannot be made there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        # Kept, so that no other memory takes the address of one while this is active.
        self._in_files: dict[int, torch.UntypedStorage] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        outline = _outline(func, args, given)
        if outline is not None and _num_bytes(outline) >= SMALLEST_BYTES:
            made = self._file_like(outline)
            if func is not torch.empty:
                with torch.no_grad():
                    made.copy_(args[0])
            return made.requires_grad_(outline.requires_grad)
        result = func(*args, **given)
        if not isinstance(result, torch.Tensor) or not self._is_new(result, args, given):
            return result
        moved = self._file_like(result)
        with torch.no_grad():
            moved.copy_(result)
        return moved.requires_grad_(result.requires_grad)

    def _is_new(self, result: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a result is a large tensor of its own, neither a view nor part of a graph."""
        if (
            result.device.type != "cpu"
            or result.layout is not torch.strided
            or _num_bytes(result) < SMALLEST_BYTES
            or result.grad_fn is not None
        ):
            return False
        place = result.untyped_storage().data_ptr()
        if place in self._in_files:
            return False
        before = [*args, *kwargs.values()]
        return not any(
            isinstance(a, torch.Tensor)
            and a.device.type == "cpu"
            and a.untyped_storage().data_ptr() == place
            for a in before
        )

    def _file_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape, dtype and order of dimensions in a file of its own."""
        try:
            file, name = tempfile.mkstemp(prefix=_PREFIX, dir=self._folder)
            try:
                num_bytes = _num_bytes(tensor)
                os.posix_fallocate(file, 0, num_bytes)
                made: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=num_bytes)
                storage: torch.UntypedStorage = made
            finally:
                os.close(file)
                os.unlink(name)
        except OSError as error:
            raise PlanError(
                f"no room to build the model's weights: {error.strerror or error}",
                where=str(self._folder),
                hint="give --weight_store disk:DIR on a larger disk",
            ) from error
        self._in_files[storage.data_ptr()] = storage
        strides = torch.empty_like(tensor, device="meta").stride()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(storage, 0, tensor.shape, strides)


def drop_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Take what was read of such files out of this process's memory; the tensors stay as they are,
    and whoever looks at one reads it again. `top` counts these pages as the process's own."""
    library = ctypes.CDLL(None)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # Only of our own files: what is not shared with a file would be lost.
        if storage.filename and Path(storage.filename).name.startswith(_PREFIX):
            place, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
            library.madvise(place, size, mmap.MADV_DONTNEED)


def _outline(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What `torch.empty` and `clone`, by which nearly all weights come about, would give, on
    "meta"; None for other functions and devices.

    They never make it in memory: blocks that come and go between small ones leave holes there.
    """
    if func is torch.empty and "out" not in kwargs:
        device = kwargs.get("device") or torch.get_default_device()
        if torch.device(device).type == "cpu":
            return func(*args, **{**kwargs, "device": "meta", "pin_memory": False})
    if func is torch.Tensor.clone and args[0].device.type == "cpu":
        source: torch.Tensor = args[0]
        if torch.is_grad_enabled() and source.requires_grad:
            return None  # the result is part of a graph
        if source.layout is torch.strided and not kwargs.keys() - {"memory_format"}:
            return torch.empty_like(source, device="meta", **kwargs)
    return None


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

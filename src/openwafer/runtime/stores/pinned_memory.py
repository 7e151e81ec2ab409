"""Host memory that a GPU reads by itself.

Decides how memory is pinned: whole pages of our own are registered with CUDA, exactly as many as
are needed. torch's allocator of pinned memory rounds every block up to a power of two bytes, which
for weights that stay for the whole run would cost up to as much again. Does not decide what is
pinned (store.py, fetch_buffers.py).

torch's allocator does not know this memory: who writes to it, or gives it back, must have waited
for the copies from it (device_link.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openwafer.errors import PlanError
from openwafer.runtime.stores.direct_file import aligned_buffer
from openwafer.runtime.stores.one_block import in_one_block

__all__ = ["PinnedTensors", "pinned_buffer", "unpin"]

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process."""

_ALIGNMENT_BYTES = 64


def pinned_buffer(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor in pinned pages of its own; as `aligned_buffer` otherwise. `unpin` it
    before its memory goes.

    Raises:
        PlanError: the system does not pin that much.
    """
    buffer = aligned_buffer(num_bytes)
    if not buffer.numel():
        return buffer
    try:
        _checked("cudaHostRegister", buffer.data_ptr(), buffer.numel(), _PORTABLE)
    except RuntimeError as error:
        raise PlanError(
            f"{buffer.numel():,} bytes of host memory cannot be pinned for the GPU: {error}",
            allowed="what the system lets this process lock in memory",
            hint="free host memory, raise `ulimit -l`, or --weight_store disk:DIR, which pins the "
            "layers on their way only",
        ) from error
    return buffer


def unpin(buffer: torch.Tensor) -> None:
    """Its pages are ordinary ones again; no copy from it is on its way."""
    if buffer.numel():
        _checked("cudaHostUnregister", buffer.data_ptr())


def _checked(function: str, *arguments: int) -> None:
    """Call CUDA's runtime; RuntimeError with its message where that fails."""
    torch.cuda.check_error(getattr(torch.cuda.cudart(), function)(*arguments))


class PinnedTensors:
    """Tensors in pinned memory, until `close`; after it they are ordinary ones."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def copies_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same values, side by side in pages of their own."""
        buffer, copies = in_one_block(tensors, pinned_buffer, alignment_bytes=_ALIGNMENT_BYTES)
        self._buffers.append(buffer)
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        return copies

    def close(self) -> None:
        while self._buffers:
            unpin(self._buffers.pop())

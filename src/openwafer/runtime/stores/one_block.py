"""Tensors side by side in one block of memory.

Decides where in the block each of them lies. Does not decide what memory that is (device_link.py,
pinned_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["in_one_block"]


def in_one_block(
    tensors: Sequence[torch.Tensor],
    make_block: Callable[[int], torch.Tensor],
    *,
    alignment_bytes: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A block, and tensors like these in it, without their values.

    Args:
        make_block: gives at least so many bytes, flat, uint8.
        alignment_bytes: of each tensor's first byte in the block.
    """
    layouts = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    starts: list[int] = []
    end = 0
    for layout in layouts:
        starts.append(end)
        end += -(-layout.nbytes // alignment_bytes) * alignment_bytes
    block = make_block(end)
    return block, [
        block[start : start + layout.nbytes]
        .view(layout.dtype)
        .as_strided(layout.shape, layout.stride())
        for start, layout in zip(starts, layouts, strict=True)
    ]

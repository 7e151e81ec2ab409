"""Sums of gradients over microbatches and layers.

Decides the order of additions, which both executors share so that they give the same bits. Does
not decide when a sum is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["add_gradients", "sum_over_layers"]


def add_gradients(
    sums: dict[str, torch.Tensor],
    names: Sequence[str],
    gradients: Sequence[torch.Tensor | None],
) -> None:
    """Add one layer's gradients to its running sums, in place after the first.

    Layer functions give each weight's gradient memory of its own (lower.py), so this is safe.
    Sums are fp32, as master weights are, where a weight was taken in 16 bits.
    """
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            continue
        if name in sums:
            sums[name].add_(gradient)
        else:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sums[name] = gradient.to(wide).contiguous()


def sum_over_layers(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients by weight from the sums of each layer, the last layer's first.

    Summing layer by layer, not microbatch by microbatch, gives the same bits in both modes.
    """
    total: dict[str, torch.Tensor] = {}
    for part in reversed(parts):
        for name, gradient in part.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
    return total

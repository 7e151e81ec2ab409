"""Gradient clipping, in the parts that a streaming run needs apart.

Decides norm, factor and clamp; the numbers are those of torch.nn.utils.clip_grad_norm_ and
clip_grad_value_. Does not decide when gradients are complete (runtime/).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["clip_by_value_", "clip_factor", "global_norm", "gradient_norms", "scale_gradients_"]

# torch.nn.utils.clip_grad_norm_ adds this to the norm, so that a norm of 0 divides.
_NORM_EPS = 1e-6


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each gradient, `[len(gradients)]`, in their dtype, on the first one's device.

    Norms of several calls may be concatenated for `global_norm`. Its last bit depends on their
    order: take the model's parameter order to get the same bits in every mode.
    """
    if not gradients:
        return torch.zeros(0)
    # One launch for all on a GPU; torch's own clipping uses it in the same way.
    norms = torch._foreach_norm(list(gradients), 2.0)  # pyright: ignore[reportPrivateUsage]
    return torch.stack([norm.to(gradients[0].device) for norm in norms])


def global_norm(norms: Tensor) -> Tensor:
    """The 2-norm, 0-d, of all gradients together from the norms of each, `[n]`."""
    return torch.linalg.vector_norm(norms, 2.0)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply every gradient with, 0-d: max_norm / (norm + 1e-6), at most 1.

    Raises:
        ValueError: `max_norm` is not positive (0 means off, and is the caller's to see).
    """
    if max_norm <= 0:
        raise ValueError(f"max_norm must be > 0, is {max_norm}")
    return torch.clamp(max_norm / (norm + _NORM_EPS), max=1.0)


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient, in place, with a `clip_factor`."""
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device, non_blocking=True))


def clip_by_value_(gradients: Sequence[Tensor], max_value: float) -> None:
    """Clamp every entry of every gradient, in place, to [-max_value, max_value].

    Raises:
        ValueError: `max_value` is not positive.
    """
    if max_value <= 0:
        raise ValueError(f"max_value must be > 0, is {max_value}")
    for gradient in gradients:
        gradient.clamp_(min=-max_value, max=max_value)

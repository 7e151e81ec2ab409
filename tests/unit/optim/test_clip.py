"""Clipping in parts against torch's in one piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwafer.optim.clip import (
    clip_by_value_,
    clip_factor,
    global_norm,
    gradient_norms,
    scale_gradients_,
)


def parameters(seed: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []
    for shape in ((3, 4), (7,), (), (2, 3, 5)):
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = torch.randn(shape, generator=generator) * scale
        found.append(weight)
    return found


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1e-8, 1e-2, 1.0, 1e4]),
    max_norm=st.floats(min_value=1e-3, max_value=100),
    cut=st.integers(0, 4),
)
def test_by_norm_gives_torchs_bits(seed: int, scale: float, max_norm: float, cut: int) -> None:
    theirs = parameters(seed, scale)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    gradients = [weight.grad for weight in parameters(seed, scale) if weight.grad is not None]
    norms = torch.cat([gradient_norms(gradients[:cut]), gradient_norms(gradients[cut:])])
    assert torch.equal(global_norm(norms), norm)
    scale_gradients_(gradients, clip_factor(global_norm(norms), max_norm))
    assert all(
        torch.equal(mine, weight.grad) for mine, weight in zip(gradients, theirs, strict=True)
    )


def test_by_value_gives_torchs_bits() -> None:
    theirs = parameters(0, 1.0)
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    gradients = [weight.grad for weight in parameters(0, 1.0) if weight.grad is not None]
    clip_by_value_(gradients, 0.3)
    assert all(
        torch.equal(mine, weight.grad) for mine, weight in zip(gradients, theirs, strict=True)
    )
    assert max(float(gradient.abs().max()) for gradient in gradients) == pytest.approx(0.3)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_limits_are_positive(limit: float) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        clip_factor(torch.tensor(1.0), limit)
    with pytest.raises(ValueError, match="must be > 0"):
        clip_by_value_([], limit)


def test_an_overflow_shows_in_the_norm() -> None:
    norms = gradient_norms([torch.ones(2), torch.tensor([1.0, float("inf")])])
    assert not torch.isfinite(global_norm(norms))

"""The loss head in blocks of classes against torch's linear and cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import openwafer.runtime.forms.loss_head as loss_head
from openwafer.runtime.forms.loss_head import linear_cross_entropy

REDUCTIONS = ("none", "mean", "sum")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "_BLOCK_LOGITS", 1)
    monkeypatch.setattr(loss_head, "_LEAST_CLASSES", 5)


def outcome(run, hidden, weight, bias, reduction: int) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    losses = run(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    gradient = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype).reshape(losses.shape)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, gradient)]


def plain(labels, reduction, ignore_index):
    return lambda h, w, b: F.cross_entropy(
        F.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32)),
        labels,
        reduction=REDUCTIONS[reduction],
        ignore_index=ignore_index,
    )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 17),
    reduction=st.sampled_from([0, 1, 2]),
    has_bias=st.booleans(),
    ignore_index=st.sampled_from([-100, 0]),
    seed=st.integers(0, 100),
)
def test_equals_torch_in_double_precision(
    rows, classes, reduction, has_bias, ignore_index, seed
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_head, "_BLOCK_LOGITS", 1)
        patch.setattr(loss_head, "_LEAST_CLASSES", 5)
        generator = torch.Generator().manual_seed(seed)
        hidden, weight, bias = (
            torch.randn(*size, dtype=torch.float64, generator=generator)
            for size in ((rows, 4), (classes, 4), (classes,))
        )
        labels = torch.randint(0, classes, (rows,), generator=generator)
        labels[1:2] = ignore_index
        given_bias = bias if has_bias else None
        expected = outcome(
            plain(labels, reduction, ignore_index), hidden, weight, given_bias, reduction
        )
        found = outcome(
            lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction, ignore_index),
            *(hidden, weight, given_bias, reduction),
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.usefixtures("small_blocks")
def test_in_16_bits_losses_are_those_of_the_16_bit_logits() -> None:
    """The logits are the same ones; their fp32 arithmetic is rounded alike but for the order of
    the sum over classes."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(23, 8).bfloat16()
    labels = torch.randint(0, 23, (6,))
    found = outcome(
        lambda h, w, b: linear_cross_entropy(h, w, b, labels, 1, -100), hidden, weight, None, 1
    )
    expected = outcome(plain(labels, 1, -100), hidden, weight, None, 1)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0.0)
    for one, other in zip(found[1:], expected[1:], strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_blocks_hold_no_more_logits_than_they_may() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.elements = max(self.elements, tensor.numel())
            return result

    rows, classes = 64, 4096
    hidden = torch.randn(rows, 8).bfloat16()
    weight = torch.randn(classes, 8).bfloat16()
    labels = torch.randint(0, classes, (rows,))
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr(loss_head, "_BLOCK_LOGITS", 1)
        outcome(
            lambda h, w, b: linear_cross_entropy(h, w, b, labels, 1, -100), hidden, weight, None, 1
        )
    assert largest.elements <= rows * loss_head._LEAST_CLASSES

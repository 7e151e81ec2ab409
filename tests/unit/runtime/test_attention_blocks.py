"""Attention in blocks against torch's own, forward and backward, over drawn shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.runtime.forms.attention import AttentionShape, attend_in_blocks

SCALE = 0.3


def tensors(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value as projections give them, and a gradient."""
    batch, heads, queries, keys, features = sizes
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, length, heads, features, dtype=torch.float64, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        for length in (queries, keys, keys, queries)
    ]


def with_gradients(attend, query, key, value, gradient) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    block=st.integers(1, 21),
    causal=st.booleans(),
    bias=st.sampled_from([None, (1, 1), (2, 1), (1, 0), (2, 0)]),
)
def test_equals_torch_in_double_precision(heads, queries, keys, block, causal, bias) -> None:
    keys = queries if causal else keys
    given_tensors = tensors((2, heads, queries, keys, 4), torch.float64)
    mask = None
    if bias is not None and not causal:
        batch, full = bias
        mask = torch.randn(batch, heads if full else 1, queries if full else 1, keys).double()
    shape = AttentionShape(SCALE, block, causal)
    found = with_gradients(
        lambda q, k, v: attend_in_blocks(q, k, v, mask, None, shape), *given_tensors
    )
    expected = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=SCALE),
        *given_tensors,
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_query_that_may_see_nothing_gets_zeros_and_gives_no_gradient() -> None:
    given_tensors = tensors((1, 2, 5, 5, 4), torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.float64)
    mask[2] = float("-inf")
    shape = AttentionShape(SCALE, 2, causal=False)
    found = with_gradients(
        lambda q, k, v: attend_in_blocks(q, k, v, mask, None, shape), *given_tensors
    )
    assert torch.equal(found[0][:, :, 2], torch.zeros(1, 2, 4, dtype=torch.float64))
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert torch.equal(found[1][:, :, 2], torch.zeros(1, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_keeps_what_it_is_told_to(causal: bool) -> None:
    given_tensors = tensors((2, 3, 12, 12, 4), torch.float64)
    kept = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.7
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1) if causal else torch.zeros(12, 12).bool()

    def plain(q, k, v):
        logits = (q @ k.transpose(-1, -2) * SCALE).masked_fill(hidden, float("-inf"))
        return (torch.softmax(logits, -1) * kept / 0.7) @ v

    shape = AttentionShape(SCALE, 5, causal, keep=0.7)
    found = with_gradients(
        lambda q, k, v: attend_in_blocks(q, k, v, None, kept, shape), *given_tensors
    )
    for one, other in zip(found, with_gradients(plain, *given_tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_the_exact_result_as_autocast(dtype: torch.dtype) -> None:
    """Logits are rounded to 16 bits, as a product under autocast is; torch's kernel keeps them in
    fp32. Both must stay within a few roundings of the result in fp64."""
    given_tensors = tensors((1, 2, 64, 64, 16), dtype)
    exact = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE),
        *(tensor.double() for tensor in given_tensors),
    )
    shape = AttentionShape(SCALE, 16, causal=True)
    found = with_gradients(
        lambda q, k, v: attend_in_blocks(q, k, v, None, None, shape), *given_tensors
    )
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 4 * torch.finfo(dtype).eps

"""Rotary and relative positions, and masks, against slow versions."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_references import assert_same
from torch import nn

from openwafer.errors import ConfigError
from openwafer.layers import (
    RelativePositionEmbeddingLayer,
    RotaryPositionEmbeddingHelper,
    create_autoregressive_mask,
)


def t5_bucket(key_minus_query: int, bidirectional: bool, num_buckets: int) -> int:
    """The rule of arXiv:1910.10683, section 2.1, for one distance."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if key_minus_query > 0 else 0
        distance = abs(key_minus_query)
    else:
        distance = max(0, -key_minus_query)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    growth = math.log(distance / exact) / math.log(128 / exact)
    # float32 may fall to the other side of a whole number: allow what double precision calls equal.
    far = exact + int(growth * (num_buckets - exact) + 1e-9)
    return bucket + min(far, num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets", [8, 32, 64])
def test_buckets_of_all_distances(bidirectional: bool, num_buckets: int) -> None:
    layer = RelativePositionEmbeddingLayer(
        1, num_relative_attention_buckets=num_buckets,
        bidirectional_relative_attention=bidirectional,
    )  # fmt: skip
    with torch.no_grad():
        layer.relative_attention_bias.weight.copy_(torch.arange(num_buckets)[:, None])
    bias = layer(200, 200)
    assert bias.shape == (1, 1, 200, 200)
    for query in (0, 3, 199):
        expected = [t5_bucket(key - query, bidirectional, num_buckets) for key in range(200)]
        assert bias[0, 0, query].int().tolist() == expected


@settings(max_examples=10, deadline=None)
@given(heads=st.integers(1, 3), queries=st.integers(1, 6), keys=st.integers(1, 6))
def test_relative_bias_and_its_gradient(heads: int, queries: int, keys: int) -> None:
    layer = RelativePositionEmbeddingLayer(heads, num_relative_attention_buckets=4)
    table = layer.relative_attention_bias.weight.detach().clone().requires_grad_()
    rows = [[t5_bucket(k - q, False, 4) for k in range(keys)] for q in range(queries)]
    expected = torch.stack([torch.stack([table[r] for r in row]) for row in rows])
    expected = expected.permute(2, 0, 1)[None]
    bias = layer(queries, keys)
    torch.testing.assert_close(bias, expected)
    direction = torch.randn(bias.shape)
    (bias * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(layer.relative_attention_bias.weight.grad, table.grad)


def test_with_a_cache_the_queries_are_the_last_positions() -> None:
    layer = RelativePositionEmbeddingLayer(2, bidirectional_relative_attention=True)
    whole = layer(7, 7)
    for new in (1, 3, 7):
        assert torch.equal(layer(new, 7, past_kv=object()), whole[:, :, 7 - new :])


def test_a_given_table_is_shared_and_kept() -> None:
    table = nn.Embedding(8, 2)
    values = table.weight.detach().clone()
    layer = RelativePositionEmbeddingLayer(2, table, num_relative_attention_buckets=8)
    assert layer.relative_attention_bias is table
    assert torch.equal(table.weight, values)
    shared = RelativePositionEmbeddingLayer(2, table.weight, num_relative_attention_buckets=8)
    assert shared.relative_attention_bias.weight is table.weight
    copied = RelativePositionEmbeddingLayer(2, values, num_relative_attention_buckets=8)
    assert torch.equal(copied(3, 3), layer(3, 3))
    assert list(copied.state_dict()) == ["relative_attention_bias.weight"]


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 4),
    head_dim=st.integers(2, 6),
    pairs=st.integers(1, 3),
    offset=st.integers(0, 5),
)
def test_rotation_is_a_product_with_a_complex_number(
    length: int, head_dim: int, pairs: int, offset: int
) -> None:
    rotary_dim = 2 * min(pairs, head_dim // 2)
    helper = RotaryPositionEmbeddingHelper(9, rotary_dim)

    def reference(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for position in range(length):
            for pair in range(rotary_dim // 2):
                turn = cmath.exp(1j * (offset + position) * 10000 ** (-2 * pair / rotary_dim))
                a, b = x[:, :, position, 2 * pair], x[:, :, position, 2 * pair + 1]
                out[:, :, position, 2 * pair] = a * turn.real - b * turn.imag
                out[:, :, position, 2 * pair + 1] = a * turn.imag + b * turn.real
        return out

    assert_same(
        lambda x: helper.rotate_tensor(x, offset + length, offset=offset),
        reference,
        [torch.randn(2, 3, length, head_dim)],
    )


def test_rotated_products_depend_on_the_distance_alone() -> None:
    helper = RotaryPositionEmbeddingHelper(64, 8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(query: int, key: int) -> float:
        rotated = (helper.rotate_tensor(x, 64, at) for x, at in ((q, query), (k, key)))
        return torch.mul(*rotated).sum().item()

    assert product(5, 2) == pytest.approx(product(60, 57), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 4), abs=1e-3)


def test_table_of_sines_and_cosines() -> None:
    sin, cos = RotaryPositionEmbeddingHelper(5, 4).create_fixed_pos_emb(torch.device("cpu"))
    assert sin.shape == cos.shape == (5, 2)
    torch.testing.assert_close(sin[:, 1], torch.arange(5).div(100).sin())
    torch.testing.assert_close(sin**2 + cos**2, torch.ones(5, 2))


def test_half_precision_is_rotated_in_32_bits() -> None:
    helper = RotaryPositionEmbeddingHelper(2048, 4)
    x = torch.randn(1, 1, 2048, 4)
    exact = helper.rotate_tensor(x.bfloat16().float(), 2048)
    rotated = helper.rotate_tensor(x.bfloat16(), 2048)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bool, torch.int32])
def test_autoregressive_mask(dtype: torch.dtype) -> None:
    mask = create_autoregressive_mask(4, dtype)
    assert mask.dtype == dtype
    assert mask.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert create_autoregressive_mask(2).dtype == torch.float16
    assert create_autoregressive_mask(2, device="meta").is_meta


X = torch.zeros(1, 1, 3, 4)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: RotaryPositionEmbeddingHelper(8, 3), "rotary_dim is 3"),
        (lambda: RotaryPositionEmbeddingHelper(0, 4), "max_position_embeddings is 0"),
        (lambda: RotaryPositionEmbeddingHelper(8, 6).rotate_tensor(X, 3), "cannot rotate 6"),
        (lambda: RotaryPositionEmbeddingHelper(8, 2).rotate_tensor(X[0], 3), "cannot rotate 2"),
        (lambda: RotaryPositionEmbeddingHelper(2, 4).rotate_tensor(X, 3), "positions 0 to 2"),
        (lambda: RotaryPositionEmbeddingHelper(8, 4).rotate_tensor(X, 3, 1), "positions 1 to 3"),
        (lambda: RelativePositionEmbeddingLayer(2, None, 1), "buckets is 1"),
        (lambda: RelativePositionEmbeddingLayer(2, None, 256), "buckets is 256"),
        (lambda: RelativePositionEmbeddingLayer(2, None, 33, True), "buckets is 33"),
        (lambda: RelativePositionEmbeddingLayer(2, nn.Embedding(32, 3)), "has shape [32, 3]"),
        (lambda: create_autoregressive_mask(0), "max_sequence_length is 0"),
    ],
)
def test_refusals(call: object, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)

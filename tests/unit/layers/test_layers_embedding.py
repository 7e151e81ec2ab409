"""EmbeddingLayer against sums of table rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwafer.errors import ConfigError
from openwafer.layers import EmbeddingLayer


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 4),
    past=st.integers(0, 2),
    segments=st.booleans(),
    position_type=st.sampled_from(["learned", "fixed", "rotary", None]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_sums_of_rows(
    batch: int,
    length: int,
    past: int,
    segments: bool,
    position_type: str | None,
    dtype: torch.dtype,
) -> None:
    layer = EmbeddingLayer(
        11,
        6,
        max_position_embeddings=6,
        position_embedding_type=position_type,
        num_segments=2 if segments else None,
    )
    ids = torch.randint(0, 11, (batch, length), dtype=dtype)
    kinds = torch.randint(0, 2, (batch, length), dtype=torch.int16)
    output = layer(ids, kinds, past_length=past)
    assert output.shape == (batch, length, 6)
    for b in range(batch):
        for i in range(length):
            expected = layer.word_embeddings.weight[ids[b, i].item()].clone()
            if position_type == "learned":
                expected += layer.position_embeddings.weight[past + i]
            elif position_type == "fixed":
                expected += layer.position_embeddings[past + i]
            if segments:
                expected += layer.segment_embeddings.weight[kinds[b, i].item()]
            torch.testing.assert_close(output[b, i], expected)


def test_gradients_count_every_use_of_a_row() -> None:
    layer = EmbeddingLayer(5, 2, pad_token_id=0, max_position_embeddings=4, num_segments=2)
    ids = torch.tensor([[1, 1, 0], [3, 1, 0]])
    layer(ids, torch.tensor([[0, 0, 1], [0, 0, 1]])).sum().backward()
    assert layer.word_embeddings.weight.grad[:, 0].tolist() == [0, 3, 0, 1, 0]
    assert layer.position_embeddings.weight.grad[:, 0].tolist() == [2, 2, 2, 0]
    assert layer.segment_embeddings.weight.grad[:, 0].tolist() == [4, 2]


@pytest.mark.parametrize("pad", [0, 3])
def test_only_the_padding_row_begins_at_zero(pad: int) -> None:
    layer = EmbeddingLayer(7, 4, pad_token_id=pad, max_position_embeddings=3, num_segments=2)
    rows = (layer.word_embeddings.weight == 0).all(dim=1)
    assert rows.tolist() == [row == pad for row in range(7)]
    assert (layer.position_embeddings.weight != 0).all()
    assert (layer.segment_embeddings.weight != 0).all()


@settings(max_examples=12, deadline=None)
@given(
    size=st.integers(1, 9),
    length=st.integers(1, 12),
    scales=st.sampled_from([(1.0, 1e4), (0.5, 10.0), (2.0, 2.0)]),
)
def test_fixed_positions_are_sinusoids(size: int, length: int, scales: tuple[float, float]) -> None:
    layer = EmbeddingLayer(
        3,
        size,
        max_position_embeddings=length,
        position_embedding_type="fixed",
        min_timescale=scales[0],
        max_timescale=scales[1],
    )
    table = layer.position_embeddings
    assert table.shape == (length, size)
    num_timescales = size // 2
    for position in range(length):
        for column in range(size):
            pair, is_cosine = divmod(column, 2)
            expected = 0.0
            if pair < num_timescales:
                share = pair / (num_timescales - 1) if num_timescales > 1 else 0.0
                timescale = scales[0] * (scales[1] / scales[0]) ** share
                expected = (math.cos if is_cosine else math.sin)(position / timescale)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-5)


def test_fixed_positions_are_not_in_the_checkpoint() -> None:
    layer = EmbeddingLayer(
        5, 4, max_position_embeddings=3, position_embedding_type="fixed", num_segments=2
    )
    assert list(layer.state_dict()) == ["word_embeddings.weight", "segment_embeddings.weight"]
    learned = EmbeddingLayer(5, 4, max_position_embeddings=3)
    assert list(learned.state_dict()) == ["word_embeddings.weight", "position_embeddings.weight"]


def test_a_model_built_on_meta_can_be_filled_later() -> None:
    arguments = {"max_position_embeddings": 3, "position_embedding_type": "fixed"}
    layer = EmbeddingLayer(5, 4, **arguments, device="meta")
    assert layer.position_embeddings.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    table = EmbeddingLayer(5, 4, **arguments).position_embeddings
    assert torch.equal(layer.position_embeddings, table)
    assert layer.word_embeddings.weight.abs().max() <= 0.05


def test_initializers_and_exchange_of_the_token_table() -> None:
    layer = EmbeddingLayer(
        5,
        4,
        embeddings_initializer="ones",
        max_position_embeddings=3,
        position_embeddings_initializer={"name": "constant", "val": 2},
        num_segments=2,
        segment_embeddings_initializer=lambda tensor: tensor.fill_(4),
    )
    assert (layer(torch.tensor([[1, 2]]), torch.tensor([[0, 1]])) == 7).all()
    assert layer.get_input_embeddings() is layer.word_embeddings
    table = nn.Embedding(5, 4)
    layer.set_input_embeddings(table)
    assert layer.get_input_embeddings() is table


def test_segments_have_no_effect_without_a_table() -> None:
    layer = EmbeddingLayer(5, 4, position_embedding_type=None)
    ids = torch.tensor([[1, 2]])
    assert torch.equal(layer(ids, torch.tensor([[0, 1]])), layer(ids))


IDS = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: EmbeddingLayer(5, 4), "without max_position_embeddings"),
        (lambda: EmbeddingLayer(5, 4, position_embedding_type="fix"), "is 'fix'"),
        (lambda: EmbeddingLayer(0, 4, position_embedding_type=None), "vocab_size is 0"),
        (lambda: EmbeddingLayer(5, 4, pad_token_id=5), "pad_token_id is 5"),
        (lambda: EmbeddingLayer(5, 4, max_position_embeddings=0), "max_position_embeddings is 0"),
        (lambda: EmbeddingLayer(5, 4, max_position_embeddings=2)(IDS), "reaches position 2"),
        (
            lambda: EmbeddingLayer(5, 4, max_position_embeddings=4)(IDS, past_length=2),
            "reaches position 4",
        ),
        (
            lambda: EmbeddingLayer(5, 4, None, 3, max_position_embeddings=4, num_segments=2)(
                IDS, IDS
            ),
            "segment embeddings of size 3",
        ),
        (
            lambda: EmbeddingLayer(
                5,
                4,
                max_position_embeddings=2,
                position_embedding_type="fixed",
                min_timescale=0.0,
            ),
            "min_timescale is 0.0",
        ),
    ],
)
def test_refusals(call: object, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)

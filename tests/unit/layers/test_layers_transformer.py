"""Encoder, decoder and the whole transformer against torch's, with copied weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_references import assert_same, copy_layer, copy_transformer, randomize
from torch import nn

from openwafer.errors import ConfigError
from openwafer.layers import (
    RotaryPositionEmbeddingHelper,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    create_autoregressive_mask,
)

BIASES = {
    "use_projection_bias_in_attention": True,
    "use_ffn_bias_in_attention": True,
    "use_ffn_bias": True,
}


def causal(length: int) -> torch.Tensor:
    return create_autoregressive_mask(length, torch.bool)


def padding(batch: int, length: int) -> torch.Tensor:
    """The last key of the last sample is padding."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[-1, -1] = length > 1
    return mask


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    heads=st.sampled_from([1, 2]),
    norm_first=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_encoder_layer_equals_torch(
    batch: int, length: int, heads: int, norm_first: bool, activation: str, eps: float
) -> None:
    arguments = {
        "d_model": 4 * heads,
        "nhead": heads,
        "dim_feedforward": 12,
        "dropout": 0.0,
        "activation": activation,
        "layer_norm_eps": eps,
        "norm_first": norm_first,
        "batch_first": True,
    }
    ours, twin = (
        TransformerEncoderLayer(**arguments, **BIASES),
        nn.TransformerEncoderLayer(**arguments),
    )
    randomize(ours)
    copy_layer(ours, twin)
    masks = {"src_mask": causal(length), "src_key_padding_mask": padding(batch, length)}
    assert_same(
        lambda x: ours(x, **masks),
        lambda x: twin(x, **masks),
        [torch.randn(batch, length, 4 * heads)],
        [(ours.norm1.weight, twin.norm1.weight), (ours.norm2.bias, twin.norm2.bias)],
    )


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    memory_length=st.integers(1, 5),
    norm_first=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
)
def test_decoder_layer_equals_torch(
    batch: int, length: int, memory_length: int, norm_first: bool, activation: str
) -> None:
    arguments = {
        "d_model": 8,
        "nhead": 2,
        "dim_feedforward": 12,
        "dropout": 0.0,
        "activation": activation,
        "norm_first": norm_first,
        "batch_first": True,
    }
    ours, twin = (
        TransformerDecoderLayer(**arguments, **BIASES),
        nn.TransformerDecoderLayer(**arguments),
    )
    randomize(ours)
    copy_layer(ours, twin)
    masks = {
        "tgt_mask": causal(length),
        "tgt_key_padding_mask": padding(batch, length),
        "memory_mask": torch.ones(length, memory_length, dtype=torch.bool).triu(1),
        "memory_key_padding_mask": padding(batch, memory_length),
    }
    assert_same(
        lambda x, memory: ours(x, memory, **masks),
        lambda x, memory: twin(x, memory, **masks),
        [torch.randn(batch, length, 8), torch.randn(batch, memory_length, 8)],
        [
            (getattr(ours, name).weight, getattr(twin, name).weight)
            for name in ("norm1", "norm2", "norm3")
        ],
    )


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_equals_torch(norm_first: bool) -> None:
    sizes = {"d_model": 8, "nhead": 2}
    layer = {
        "dim_feedforward": 12,
        "dropout": 0.0,
        "activation": "gelu",
        "norm_first": norm_first,
        "batch_first": True,
    }
    ours = Transformer(**sizes, num_encoder_layers=2, num_decoder_layers=3, **layer, **BIASES)
    # torch's own encoder tries nested tensors unless it is built apart.
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**sizes, **layer), 2, nn.LayerNorm(8), enable_nested_tensor=False
    )
    twin = nn.Transformer(**sizes, num_decoder_layers=3, custom_encoder=encoder, **layer)
    randomize(ours)
    copy_transformer(ours, twin)
    masks = {
        "src_mask": torch.eye(4, dtype=torch.bool),
        "tgt_mask": causal(3),
        "memory_mask": torch.tensor([[False, True, False, False]] * 3),
        "src_key_padding_mask": padding(2, 4),
        "tgt_key_padding_mask": padding(2, 3),
        "memory_key_padding_mask": padding(2, 4),
    }
    assert_same(
        lambda src, tgt: ours(src, tgt, **masks),
        lambda src, tgt: twin(src, tgt, **masks),
        [torch.randn(2, 4, 8), torch.randn(2, 3, 8)],
        [(ours.encoder.norm.weight, twin.encoder.norm.weight)],
    )


def test_without_biases_there_are_none() -> None:
    names = [name for name, _ in Transformer(8, 2, 1, 1, 12).named_parameters()]
    biases = [name for name in names if name.endswith("bias")]
    assert biases
    assert all("norm" in name for name in biases)


def test_decoder_alone_equals_a_causal_encoder() -> None:
    """Without cross-attention the two differ only in the names of their second norm."""
    decoder = TransformerDecoder(
        TransformerDecoderLayer(8, 2, 12, dropout=0.0, add_cross_attention=False, **BIASES), 2
    )
    encoder = TransformerEncoder(TransformerEncoderLayer(8, 2, 12, dropout=0.0, **BIASES), 2)
    randomize(decoder)
    state = {n.replace("norm3", "norm2"): t for n, t in decoder.state_dict().items()}
    encoder.load_state_dict(state)
    assert_same(
        lambda x: decoder(x, tgt_mask=causal(4)),
        lambda x: encoder(x, mask=causal(4)),
        [torch.randn(2, 4, 8)],
    )


def test_rotary_helper_reaches_the_self_attention_of_every_layer() -> None:
    decoder = TransformerDecoder(TransformerDecoderLayer(8, 2, 12, dropout=0.0), 2, nn.Identity())
    helper = RotaryPositionEmbeddingHelper(4, 2)
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    seen = []

    def note(_: nn.Module, __: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append(kwargs["rotary_position_embedding_helper"])

    for layer in decoder.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with_rotary = decoder(x, memory, rotary_position_embedding_helper=helper)
    assert seen == [helper, helper]
    assert not torch.allclose(with_rotary, decoder(x, memory))


@pytest.mark.parametrize(
    ("rate", "attention_rate", "expected"), [(0.1, None, 0.1), (0.1, 0.0, 0.0), (0.0, 0.3, 0.3)]
)
def test_dropout_rates(rate: float, attention_rate: float | None, expected: float) -> None:
    arguments = {"dropout": rate, "attention_dropout_rate": attention_rate}
    for layer in (
        TransformerEncoderLayer(8, 2, 12, **arguments),
        TransformerDecoderLayer(8, 2, 12, **arguments),
    ):
        assert layer.self_attn.dropout_layer.p == expected
        assert layer.dropout1.p == rate
        first, second = layer.ffn.ffn
        assert first.dropout_layer is None
        assert (second.dropout_layer.p if second.dropout_layer else 0.0) == rate


def test_copies_have_weights_of_their_own() -> None:
    encoder = TransformerEncoder(TransformerEncoderLayer(8, 2, 12), 3)
    first, second, _ = (layer.ffn.ffn[0].linear_layer.weight for layer in encoder.layers)
    assert first is not second
    assert not torch.equal(first, second)
    of_torch = TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    first, second = (layer.self_attn.in_proj_weight for layer in of_torch.layers)
    assert torch.equal(first, second), "torch's layer cannot draw again: copied as it is"
    assert of_torch(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_reset_parameters_draws_everything_again() -> None:
    layer = TransformerDecoderLayer(8, 2, 12, **BIASES)
    randomize(layer)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            rows, columns = parameter.shape
            assert parameter.abs().max() <= (6 / (rows + columns)) ** 0.5, name


def test_custom_stacks() -> None:
    class Doubling(nn.Module):
        def forward(self, src: torch.Tensor, **_: object) -> torch.Tensor:
            return 2 * src

    class Adding(nn.Module):
        def forward(self, tgt: torch.Tensor, memory: torch.Tensor, **_: object) -> torch.Tensor:
            return tgt + memory.sum()

    model = Transformer(4, 2, custom_encoder=Doubling(), custom_decoder=Adding())
    src, tgt = torch.ones(1, 2, 4), torch.zeros(1, 3, 4)
    assert torch.equal(model(src, tgt), torch.full((1, 3, 4), 16.0))
    assert not list(model.parameters())


def test_meta_tensors_allocate_nothing() -> None:
    model = Transformer(4096, 32, 4, 4, 16384, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def _refused() -> list[tuple[object, str]]:
    layer = TransformerEncoderLayer(8, 2, 12)
    gpt = TransformerDecoderLayer(8, 2, 12, add_cross_attention=False)
    x = torch.zeros(2, 3, 8)
    return [
        (lambda: TransformerEncoder(layer, 2, enable_nested_tensor=True), "enable_nested_tensor"),
        (lambda: TransformerEncoder(layer, 0), "num_layers is 0"),
        (lambda: TransformerDecoder(gpt, -1), "num_layers is -1"),
        (lambda: TransformerEncoderLayer(8, 2, batch_first=False), "batch_first=False"),
        (lambda: TransformerDecoderLayer(8, 2, batch_first=False), "batch_first=False"),
        (lambda: Transformer(8, 2, batch_first=False), "batch_first=False"),
        (lambda: TransformerEncoderLayer(8, 3), "not divisible"),
        (lambda: TransformerEncoderLayer(8, 2, activation="geluu"), "no activation 'geluu'"),
        (lambda: TransformerEncoderLayer(8, 2, dropout=-0.1), "dropout is -0.1"),
        (lambda: TransformerDecoderLayer(8, 2, 12)(x), "no memory"),
        (lambda: gpt(x, x), "memory is given"),
        (lambda: Transformer(8, 2, 1, 1, 12)(x, x[:1]), "src has shape [2, 3, 8]"),
        (lambda: Transformer(4, 2, 1, 1, 12)(x, x), "src has shape [2, 3, 8]"),
    ]


@pytest.mark.parametrize("index", range(13))
def test_refusals(index: int) -> None:
    call, what = _refused()[index]
    with pytest.raises(ConfigError) as error:
        call()
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)

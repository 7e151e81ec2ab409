"""MultiheadAttention against torch's module, a slow version, and itself in steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_references import assert_same, copy_attention, randomize, slow_attention
from torch import nn

from openwafer.errors import ConfigError
from openwafer.layers import (
    AttentionLayer,
    MultiheadAttention,
    RotaryPositionEmbeddingHelper,
    create_autoregressive_mask,
)

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "queries": st.integers(1, 5),
        "keys": st.integers(1, 5),
        "heads": st.sampled_from([1, 2, 3]),
        "head_dim": st.sampled_from([1, 2, 4]),
    }
)


def tensors(size: dict[str, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = size["heads"] * size["head_dim"]
    lengths = (size["queries"], size["keys"], size["keys"])
    q, k, v = (torch.randn(size["batch"], n, hidden, generator=generator) for n in lengths)
    return q, k, v


def attention(size: dict[str, int], **arguments: object) -> MultiheadAttention:
    layer = MultiheadAttention(size["heads"] * size["head_dim"], size["heads"], **arguments)
    randomize(layer)
    return layer


SIZE = {"batch": 2, "queries": 3, "keys": 4, "heads": 2, "head_dim": 4}


@settings(max_examples=15, deadline=None)
@given(size=shapes, bias=st.booleans(), mask_kind=st.sampled_from(["none", "float", "bool", "3d"]))
def test_equals_torch(size: dict[str, int], bias: bool, mask_kind: str) -> None:
    layer = attention(size, use_projection_bias=bias, use_ffn_bias=bias)
    twin = nn.MultiheadAttention(layer.embed_dim, layer.num_heads, bias=bias, batch_first=True)
    copy_attention(layer, twin)
    mask = None
    if mask_kind == "float":
        mask = torch.randn(size["queries"], size["keys"])
    elif mask_kind == "bool":
        mask = torch.rand(size["queries"], size["keys"]) > 0.5
        mask[:, 0] = False  # torch gives NaN for a query without any key
    elif mask_kind == "3d":
        mask = torch.randn(size["batch"] * size["heads"], size["queries"], size["keys"])
    assert_same(
        lambda q, k, v: layer(q, k, v, attn_mask=mask),
        lambda q, k, v: twin(q, k, v, attn_mask=mask, need_weights=False)[0],
        tensors(size),
        [(layer.proj_output_dense_layer.weight, twin.out_proj.weight)],
    )
    projections = (layer.proj_q_dense_layer, layer.proj_k_dense_layer, layer.proj_v_dense_layer)
    grads = torch.cat([projection.weight.grad for projection in projections])
    torch.testing.assert_close(grads, twin.in_proj_weight.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("average", [True, False])
def test_weights_equal_torch(average: bool) -> None:
    layer = attention(SIZE)
    twin = nn.MultiheadAttention(layer.embed_dim, layer.num_heads, bias=False, batch_first=True)
    copy_attention(layer, twin)
    padding = torch.tensor([[False, False, True, False], [False, True, True, True]])
    for inputs in (tensors(SIZE), tensors({**SIZE, "batch": 1})):
        mask = padding[: inputs[0].shape[0]]
        arguments = {"key_padding_mask": mask, "average_attn_weights": average}
        output, weights = layer(*inputs, need_weights=True, **arguments)
        expected, expected_weights = twin(*inputs, **arguments)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(layer(*inputs, key_padding_mask=mask), output)


def test_both_paths_have_the_same_gradients() -> None:
    layer = attention(SIZE, use_projection_bias=True)
    bias = torch.randn(2, 3, 4)
    assert_same(
        lambda q, k, v, b: layer(q, k, v, position_bias=b),
        lambda q, k, v, b: layer(q, k, v, position_bias=b, need_weights=True)[0],
        (*tensors(SIZE), bias),
    )


@settings(max_examples=8, deadline=None)
@given(
    size=shapes,
    seed=st.integers(0, 1000),
    attention_type=st.sampled_from(["dot_product", "scaled_dot_product"]),
    integer=st.booleans(),
)
def test_all_masks_together_equal_the_slow_version(
    size: dict[str, int], seed: int, attention_type: str, integer: bool
) -> None:
    torch.manual_seed(seed)
    layer = attention(size, attention_type=attention_type)
    batch, queries, keys = size["batch"], size["queries"], size["keys"]
    forbidden = torch.rand(batch, queries, keys) > 0.6
    padding = torch.rand(batch, keys) > 0.6
    forbidden[..., 0] = padding[..., 0] = False
    bias = torch.randn(1, size["heads"], queries, keys)
    dtype = torch.int32 if integer else torch.bool
    assert_same(
        lambda q, k, v: layer(
            q,
            k,
            v,
            attn_mask=forbidden.to(dtype),
            key_padding_mask=padding.to(dtype),
            position_bias=bias,
        ),
        lambda q, k, v: slow_attention(
            layer,
            (q, k, v),
            allowed=lambda b, _, i, j: not (forbidden[b, i, j] or padding[b, j]),
            added=lambda _, h, i, j: bias[0, h, i, j],
        ),
        tensors(size, seed),
    )


def test_additive_masks_of_release_1_6() -> None:
    """A float16 mask times -1e4, [batch, 1, query, key] or [batch, 1, 1, key]."""
    layer = attention({**SIZE, "keys": 3})
    inputs = tensors({**SIZE, "keys": 3})
    causal = create_autoregressive_mask(3) * -1e4
    expected = slow_attention(layer, inputs, allowed=lambda b, h, i, j: j <= i)
    for mask in (causal, causal[None], causal.expand(2, 1, 3, 3), causal.expand(2, 2, 3, 3)):
        torch.testing.assert_close(layer(*inputs, attn_mask=mask), expected, rtol=1e-5, atol=2e-6)
    padding = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.float16) * -1e4
    expected = slow_attention(layer, inputs, allowed=lambda b, h, i, j: not padding[b, j])
    torch.testing.assert_close(layer(*inputs, attn_mask=padding[:, None, None]), expected)
    torch.testing.assert_close(layer(*inputs, key_padding_mask=padding), expected)


def test_a_query_without_keys_stays_finite() -> None:
    layer = attention(SIZE)
    inputs = tensors(SIZE)
    padding = torch.ones(2, 4, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        output = layer.to(dtype)(*(x.to(dtype) for x in inputs), key_padding_mask=padding)
        assert output.dtype == dtype
        assert output.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    rotary=st.booleans(),
    masked=st.booleans(),
    as_pair=st.booleans(),
)
def test_cached_keys_and_values_give_the_whole_sequence(
    lengths: list[int], rotary: bool, masked: bool, as_pair: bool
) -> None:
    total = sum(lengths)
    size = {**SIZE, "queries": total, "keys": total}
    layer = attention(size)
    x = tensors(size)[0]
    causal = create_autoregressive_mask(total, torch.bool)
    padding = torch.zeros(2, total, dtype=torch.bool)
    if masked:
        padding[1, total - 1] = True
    helper = RotaryPositionEmbeddingHelper(total, 2) if rotary else None
    whole = layer(
        x,
        x,
        x,
        attn_mask=causal,
        key_padding_mask=padding,
        rotary_position_embedding_helper=helper,
    )
    past, parts, begin = None, [], 0
    for length in lengths:
        end = begin + length
        part = x[:, begin:end]
        output, past = layer(
            part,
            part,
            part,
            # The mask of the new keys alone: cached ones may be attended to.
            attn_mask=causal[begin:end, begin:end],
            key_padding_mask=padding[:, begin:end],
            past_kv=past,
            cache_present_kv=True,
            rotary_position_embedding_helper=helper,
        )
        assert past.shape == (2, 2, size["heads"], end, size["head_dim"])
        past = tuple(past) if as_pair else past
        parts.append(output)
        begin = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=2e-6)


def test_weights_and_cache_together() -> None:
    layer = attention(SIZE)
    output, weights, present = layer(*tensors(SIZE), need_weights=True, cache_present_kv=True)
    assert output.shape == (2, 3, 8)
    assert weights.shape == (2, 3, 4)
    assert present.shape == (2, 2, 2, 4, 4)


def test_dropout_on_the_weights() -> None:
    layer = attention(SIZE, dropout=0.5)
    inputs = tensors(SIZE)
    torch.manual_seed(0)
    first, second = layer(*inputs), layer(*inputs)
    assert not torch.equal(first, second)
    layer.eval()
    torch.testing.assert_close(layer(*inputs), slow_attention(layer, inputs), rtol=1e-5, atol=2e-6)


def test_names_biases_and_initial_values() -> None:
    layer = AttentionLayer(8, 2, output_layer_initializer="ones")
    assert AttentionLayer is MultiheadAttention
    names = [f"proj_{part}_dense_layer" for part in ("q", "k", "v", "output")]
    assert list(layer.state_dict()) == [f"{name}.weight" for name in names]
    assert (layer.proj_output_dense_layer.weight == 1).all()
    bound = (6 / 16) ** 0.5
    assert bound / 2 < layer.proj_q_dense_layer.weight.abs().max() <= bound
    biased = MultiheadAttention(8, 2, use_projection_bias=True, use_ffn_bias=True)
    assert set(biased.state_dict()) == {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    assert all((p == 0).all() for n, p in biased.named_parameters() if n.endswith("bias"))
    assert MultiheadAttention(8, 2, device="meta").proj_q_dense_layer.weight.is_meta


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"attention_type": "scaled_dot"}, "attention_type is 'scaled_dot'"),
        ({"num_heads": 3}, "embed_dim 8 is not divisible by num_heads 3"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"batch_first": False}, "batch_first=False"),
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
        ({"kdim": 8}, "kdim=8"),
        ({"vdim": 4}, "vdim=4"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"attention_initializer": "xavier"}, "no initializer 'xavier'"),
    ],
)
def test_refused_arguments(arguments: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError) as error:
        MultiheadAttention(**{"embed_dim": 8, "num_heads": 2, **arguments})
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"attn_mask": torch.zeros(2, 4)}, "attn_mask has shape [2, 4]"),
        ({"attn_mask": torch.zeros(3, 3)}, "attn_mask has shape [3, 3]"),
        ({"attn_mask": torch.zeros(5, 3, 4)}, "attn_mask has shape [5, 3, 4]"),
        ({"key_padding_mask": torch.zeros(4, 2)}, "key_padding_mask has shape [4, 2]"),
        ({"position_bias": torch.zeros(3, 4)}, "position_bias has shape [3, 4]"),
        ({"past_kv": torch.zeros(2, 2, 2, 1, 3)}, "past_kv has the shapes"),
        ({"v": torch.zeros(2, 3, 8)}, "q, k and v have the shapes"),
        ({"q": torch.zeros(3, 8)}, "q, k and v have the shapes [3, 8], [2, 4, 8], [2, 4, 8]"),
        (
            {
                "position_bias": torch.zeros(2, 3, 4),
                "rotary_position_embedding_helper": RotaryPositionEmbeddingHelper(8, 2),
            },
            "both a position_bias and a rotary",
        ),
    ],
)
def test_refused_inputs(arguments: dict[str, object], what: str) -> None:
    q, k, v = tensors(SIZE)
    with pytest.raises(ConfigError) as error:
        attention(SIZE)(**{"q": q, "k": k, "v": v, **arguments})
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)


def test_a_mask_of_keys_is_pointed_to_the_padding_mask() -> None:
    with pytest.raises(ConfigError, match="key_padding_mask"):
        attention(SIZE)(*tensors(SIZE), attn_mask=torch.zeros(2, 4, dtype=torch.bool))

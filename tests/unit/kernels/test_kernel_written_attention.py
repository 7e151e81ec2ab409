"""Attention that a model writes out is captured as torch's own operation, where the two are the
same; the reference is the model itself in eager PyTorch, dropout drawn from the same key."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import Small, check_against_eager, floats, kernel_names

from openwafer.frontends.torch.capture import capture_module

Tensor = torch.Tensor
BATCH, HEADS, QUERIES, KEYS, SIZE, VALUES = 2, 3, 5, 7, 4, 6
Q, K = floats(BATCH, HEADS, QUERIES, SIZE), floats(BATCH, HEADS, KEYS, SIZE)
V = floats(BATCH, HEADS, KEYS, VALUES)
BIAS = floats(HEADS, QUERIES, KEYS)
SEEN = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(2)
ROWS = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
NEVER = float("-inf")


def _padded(scores: Tensor) -> Tensor:
    return scores + (1.0 - ROWS[:, None, None, :].float()) * -1e4


def _keras(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As MultiHeadAttention of Keras: heads behind positions, the key first, the query scaled."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("aecd,abcd->acbe", k, q * 0.5)
    return torch.einsum("acbe,aecd->abcd", F.softmax(_padded(scores), -1), v).flatten(2)


def _batches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) + torch.arange(KEYS) / 3
    return torch.bmm(F.softmax(scores, dim=2), v).view(BATCH, HEADS, QUERIES, VALUES)


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, b: F.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v,
    "no scale": lambda q, k, v, b: F.softmax(q @ k.mT, -1) @ v,
    "nanoGPT": lambda q, k, v, b: (
        F.dropout(
            F.softmax((q @ k.mT * (1 / math.sqrt(4))).masked_fill(SEEN == 0, NEVER), dim=-1), 0.3
        )
        @ v
    ),
    "bias first": lambda q, k, v, b: F.softmax(b + q @ k.mT, -1) @ v,
    "bias, then scaled": lambda q, k, v, b: F.softmax((_padded(q @ k.mT) + b) / 3.0, -1) @ v,
    "bias taken away": lambda q, k, v, b: F.softmax(q @ k.mT - b, -1) @ v,
    "where": lambda q, k, v, b: F.softmax(torch.where(SEEN, q @ k.mT + b, NEVER), -1) @ v,
    "two masks": lambda q, k, v, b: (
        F.softmax((q @ k.mT).masked_fill(~SEEN, NEVER).masked_fill(~ROWS[:, None, None], NEVER), -1)
        @ v
    ),
    "einsum": lambda q, k, v, b: torch.einsum(
        "bhqs,bhsd->bqhd", F.softmax(torch.einsum("bhqd,bhsd->bhqs", q, k) * 0.5, -1), v
    ).reshape(BATCH, QUERIES, -1),
    "bert's einsum": lambda q, k, v, b: torch.einsum(
        "BNFT,BTNH->BFNH",
        F.softmax(
            _padded(torch.einsum("BTNH,BFNH->BNFT", k.transpose(1, 2), q.transpose(1, 2))), -1
        ),
        v.transpose(1, 2),
    ),
    "keras": lambda q, k, v, b: _keras(q, k, v),
    "bmm": lambda q, k, v, b: _batches(q, k, v),
    "softmax in float32": lambda q, k, v, b: (
        F.softmax(q @ k.mT + b, -1, dtype=torch.float32).to(q.dtype) @ v
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_the_operation(name: str) -> None:
    graph = check_against_eager(SPELLINGS[name], Q, K, V, BIAS)
    names = kernel_names(graph)
    assert "attention" in names
    assert not names & {"attention_spelled_out", "softmax", "matmul", "einsum", "dropout"}


OTHERS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    # A row without a key that is seen has equal weights here, and none there.
    "finite number for hidden": lambda q, k, v, b: (
        F.softmax((q @ k.mT).masked_fill(~SEEN, -1e9), -1) @ v
    ),
    "capped": lambda q, k, v, b: F.softmax(torch.tanh(q @ k.mT), -1) @ v,
    "weights are read": lambda q, k, v, b: (
        (weights := F.softmax(q @ k.mT, -1)) @ v,
        weights,
    ),
    "scores are read": lambda q, k, v, b: (F.softmax((s := q @ k.mT), -1) @ v, s),
    "softmax over heads": lambda q, k, v, b: F.softmax(q @ k.mT, 1) @ v,
    "softmax over queries": lambda q, k, v, b: F.softmax(q @ k.mT, 2) @ v,
    "one key for all heads": lambda q, k, v, b: F.softmax(q @ k[:, :1].mT, -1) @ v,
    "summed over heads": lambda q, k, v, b: torch.einsum(
        "bhqs,bhsd->bqd", F.softmax(q @ k.mT, -1), v
    ),
    "weights transposed": lambda q, k, v, b: torch.einsum(
        "bhqs,bhqd->bhsd", F.softmax(q @ k.mT, -1), v[:, :, :QUERIES]
    ),
    "dropout twice": lambda q, k, v, b: F.dropout(F.dropout(F.softmax(q @ k.mT, -1), 0.1), 0.1) @ v,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_operation_stays(name: str) -> None:
    graph = check_against_eager(OTHERS[name], Q, K, V, BIAS)
    assert "attention" not in kernel_names(graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_of_more_range_than_float16_stays(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.softmax((q @ k.mT).float() + bias, -1).to(dtype) @ v

    model = Small(attend, *(each.to(dtype) for each in (Q, K, V)), BIAS)
    program = capture_module(model, (torch.zeros(2),)).program
    targets = {str(node.target) for node in program.operations}
    fused = "aten.scaled_dot_product_attention.default" in targets
    assert fused is (dtype != torch.float16)


@settings(max_examples=8)
@given(
    layout=st.permutations("bhqd"),
    keys=st.permutations("bhsd"),
    values=st.permutations("bhse"),
    result=st.permutations("bhqe"),
    heads_first=st.booleans(),
    key_first=st.booleans(),
    scale=st.sampled_from([None, 0.5, 3.0]),
)
def test_einsums_with_axes_in_any_order(
    layout, keys, values, result, heads_first, key_first, scale
) -> None:
    q_axes, k_axes, v_axes, out = ("".join(axes) for axes in (layout, keys, values, result))
    scores = "hbqs" if heads_first else "bhqs"
    sizes = {"b": BATCH, "h": HEADS, "q": QUERIES, "s": KEYS, "d": SIZE, "e": VALUES}
    q, k, v = (floats(*(sizes[a] for a in axes)) for axes in (q_axes, k_axes, v_axes))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (k_axes, q_axes) if key_first else (q_axes, k_axes)
        pair = (k, q) if key_first else (q, k)
        product = torch.einsum(f"{first},{second}->{scores}", *pair)
        if scale is not None:
            product = product * scale
        return torch.einsum(f"{scores},{v_axes}->{out}", F.softmax(product, -1), v)

    assert "attention" in kernel_names(check_against_eager(attend, q, k, v))

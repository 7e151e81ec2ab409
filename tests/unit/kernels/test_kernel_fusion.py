"""Hand-written spellings fuse into one kernel, and only where nothing reads their inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_runner import check_against_eager, floats, kernel_names

from openwafer.kernels import CostContext

Tensor = torch.Tensor
X = floats(3, 8)
ROOT = math.sqrt(2 / math.pi)

GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "half first": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "half last": lambda x: x * (torch.erf(x / math.sqrt(2)) + 1) * 0.5,
    "half with erf": lambda x: x * (0.5 * (1.0 + torch.erf(x * 0.7071067811865476))),
    "BERT": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "GPT-2": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    "cube by products": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x * x * x))),
    "fast": lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "torch, tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", GELUS)
def test_gelu_in_all_spellings(name) -> None:
    assert kernel_names(check_against_eager(GELUS[name], X)) == {"gelu"}


def test_other_activations_by_hand() -> None:
    def three(x: Tensor) -> tuple[Tensor, ...]:
        return x * torch.sigmoid(x), torch.sigmoid(1.702 * x) * x, x * torch.tanh(F.softplus(x))

    assert kernel_names(check_against_eager(three, X)) == {"silu", "quick_gelu", "mish"}


def _variance(x: Tensor) -> Tensor:
    return x.var(-1, keepdim=True, unbiased=False)


def _squares(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)


LAYER_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "var": lambda x, w, b: (x - x.mean(-1, True)) / torch.sqrt(_variance(x) + 1e-5) * w + b,
    "mean of squares": lambda x, w, b: (
        w * ((x - x.mean(-1, True)) * torch.rsqrt(_squares(x) + 1e-5)) + b
    ),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_by_hand(name) -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return LAYER_NORMS[name](x, w, b)

    assert kernel_names(check_against_eager(norm, X, floats(8), floats(8))) == {"layer_norm"}


def test_layer_norm_by_hand_with_one_mean_is_one_kernel() -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)) + b

    def norm_by_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), _variance(x)
        return (x - mean) / torch.sqrt(variance + 1e-5) * w + b

    for function in (norm, norm_by_variance):
        assert kernel_names(check_against_eager(function, X, floats(8), floats(8))) == {
            "layer_norm"
        }


def test_rms_norm_by_hand() -> None:
    def llama(x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * wide.to(x.dtype)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w

    for dtype in (torch.float32, torch.bfloat16):
        graph = check_against_eager(llama, floats(3, 8, dtype=dtype), floats(8, dtype=dtype))
        assert kernel_names(graph) == {"rms_norm"}
    assert kernel_names(check_against_eager(plain, X, floats(8))) == {"rms_norm"}


def test_rotary_in_three_spellings() -> None:
    def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin

    def parts(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    for function in (halves, interleaved):
        assert kernel_names(check_against_eager(function, X, X, X)) == {"rotary"}
    assert kernel_names(check_against_eager(parts, X, X, X, X)) == {"rotary"}


Q = floats(2, 3, 5, 4)
BIAS = floats(3, 5, 5)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()

ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "mask chosen": lambda q, k, v, b, m: (
        torch.softmax(torch.where(m, q @ k.mT, -1e4) + b, -1) @ v
    ),
    "capped": lambda q, k, v, b, m: (
        F.softmax(torch.tanh(q @ k.mT / 30.0) * 30.0 + b, -1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "einsum, masked by a finite number": lambda q, k, v, b, m: torch.einsum(
        "bhqs,bhsd->bhqd",
        F.softmax((torch.einsum("bhqd,bhsd->bhqs", q, k) * 0.5).masked_fill(~m, -1e4), -1),
        v,
    ),
    "baddbmm": lambda q, k, v, b, m: torch.bmm(
        F.softmax(
            torch.baddbmm(b.repeat(2, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT).view(2, 3, 5, 5)
            .masked_fill(~m, -1e4), -1).view(6, 5, 5),
        v.flatten(0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_in_spellings_that_stay(name) -> None:
    """Those that are torch's own operation are in test_frontends_written_attention.py."""
    graph = check_against_eager(ATTENTIONS[name], Q, Q, Q, BIAS, CAUSAL)
    assert "attention_spelled_out" in kernel_names(graph)
    assert not kernel_names(graph) & {"softmax", "matmul", "einsum", "matmul_add"}


def test_attention_whose_probabilities_are_read_is_matched_one_by_one() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = F.softmax(q @ k.mT, -1)
        return probabilities @ v, probabilities

    names = kernel_names(check_against_eager(attend, Q, Q, Q))
    assert "attention_spelled_out" not in names
    assert {"softmax", "matmul"} <= names


def test_both_spellings_of_attention_count_the_same_products() -> None:
    """[2, 3, 5, 4] queries, keys and values: two products of 2 * 3 * 5 * 5 * 4."""
    context = CostContext(num_samples=2, training=True)
    macs = 2 * (2 * 3 * 5 * 5 * 4)
    for function in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.softmax(q @ k.mT / 2, -1) @ v,
        lambda q, k, v: torch.einsum(
            "bhqs,bhsd->bhqd", F.softmax(torch.einsum("bhqd,bhsd->bhqs", q, k), -1), v
        ),
    ):
        graph = check_against_eager(function, Q, Q, Q)
        cost = next(m for m in graph.matches if m.kernel.family == "attention").cost(context)
        assert (cost.forward.macs, cost.backward.macs) == (macs, 2 * macs)


def test_an_operation_shared_by_two_weights_is_still_covered_once() -> None:
    def tied(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w)

    assert kernel_names(check_against_eager(tied, X, floats(8, 8))) == {"linear"}

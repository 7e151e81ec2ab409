"""Initializers, activations and losses against their definitions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_references import assert_same

from openwafer.errors import ConfigError
from openwafer.layers import GPTLMHeadModelLoss, create_initializer, get_activation, smooth_loss

NUM_OUT, NUM_IN = 200, 300


def filled(spec: object) -> torch.Tensor:
    torch.manual_seed(0)
    tensor = torch.full((NUM_OUT, NUM_IN), math.nan, requires_grad=True)
    create_initializer(spec)(tensor)
    assert tensor.requires_grad
    return tensor.detach()


XAVIER = math.sqrt(2 / (NUM_IN + NUM_OUT))
LECUN = math.sqrt(1 / NUM_IN)
UNIFORM_RATIO = math.sqrt(3)


@pytest.mark.parametrize(
    ("spec", "std", "largest_over_std"),
    [
        ("uniform", 0.05 / UNIFORM_RATIO, UNIFORM_RATIO),
        ({"name": "Uniform", "a": -1, "b": 1}, 1 / UNIFORM_RATIO, UNIFORM_RATIO),
        ("normal", 0.05, None),
        ({"name": "normal", "std": 0.02}, 0.02, None),
        ("xavier_normal", XAVIER, None),
        ("glorot_normal", XAVIER, None),
        ("xavier_uniform", XAVIER, UNIFORM_RATIO),
        ("glorot_uniform", XAVIER, UNIFORM_RATIO),
        ({"name": "xavier_uniform", "gain": "tanh"}, XAVIER * 5 / 3, UNIFORM_RATIO),
        ({"name": "xavier_normal", "gain": 2.0}, XAVIER * 2, None),
        ("truncated_normal", 0.05 * 0.87962566, 2 / 0.87962566),
        ("variance_scaling", LECUN, 2 / 0.87962566),
        ({"name": "variance_scaling", "scale": 2.0, "mode": "fan_out", "distribution": "normal"},
         math.sqrt(2 / NUM_OUT), None),
        ({"name": "variance_scaling", "mode": "fan_avg", "distribution": "uniform"},
         XAVIER, UNIFORM_RATIO),
        ("lecun_normal", LECUN, 2 / 0.87962566),
        ("lecun_uniform", LECUN, UNIFORM_RATIO),
        ("kaiming_normal", math.sqrt(2) * LECUN, None),
        ({"name": "kaiming_uniform", "a": 1.0, "nonlinearity": "relu", "mode": "fan_out"},
         math.sqrt(2 / NUM_OUT), UNIFORM_RATIO),
    ],
)  # fmt: skip
def test_random_values(spec: object, std: float, largest_over_std: float | None) -> None:
    tensor = filled(spec)
    assert tensor.std().item() == pytest.approx(std, rel=0.01)
    assert abs(tensor.mean().item()) < std / 50
    largest = tensor.abs().max().item() / std
    if largest_over_std is None:
        assert largest > 3.5
    else:
        assert largest == pytest.approx(largest_over_std, rel=0.01)


def test_fixed_values() -> None:
    assert (filled("ones") == 1).all()
    assert (filled("zeros") == 0).all()
    assert (filled("constant") == 0).all()
    assert (filled({"name": "constant", "val": 7}) == 7).all()
    assert torch.equal(filled("eye"), torch.eye(NUM_OUT, NUM_IN))
    assert (filled(lambda tensor: tensor.data.fill_(5)) == 5).all()


def test_variance_scaling_of_a_convolution_counts_the_window() -> None:
    torch.manual_seed(0)
    tensor = torch.empty(64, 32, 3, 3)
    create_initializer("lecun_normal")(tensor)
    assert tensor.std().item() == pytest.approx(1 / math.sqrt(32 * 9), rel=0.02)


DEFINITIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "tanh": math.tanh,
    "gelu_new": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: x / 2 * (1 + math.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "linear": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
}


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_activations(name: str) -> None:
    points = [-3.0, -0.5, 0.0, 0.7, 8.0]
    values = get_activation(name.upper())(torch.tensor(points))
    expected = torch.tensor([DEFINITIONS[name](x) for x in points])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_activations_that_are_no_names(caplog: pytest.LogCaptureFixture) -> None:
    assert get_activation(torch.sin) is torch.sin
    assert get_activation(None)(torch.ones(1)) == 1
    with caplog.at_level(logging.WARNING, logger="openwafer"):
        get_activation("swish")
        get_activation("swish")
    assert len([r for r in caplog.records if "swish" in r.message]) <= 1
    with pytest.raises(ConfigError, match="did you mean `gelu_new`"):
        get_activation("gelu_nw")


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 4),
    classes=st.integers(1, 5),
    weight=st.floats(0.01, 2.0),
    mask_dtype=st.sampled_from([torch.int32, torch.float32, torch.bool]),
)
def test_language_model_loss(
    batch: int, length: int, classes: int, weight: float, mask_dtype: torch.dtype
) -> None:
    loss = GPTLMHeadModelLoss(classes, weight)
    labels = torch.randint(0, classes, (batch, length), dtype=torch.int32)
    mask = torch.rand(batch, length) > 0.4

    def reference(logits: torch.Tensor) -> torch.Tensor:
        total = logits.sum() * 0
        for b in range(batch):
            for i in range(length):
                if mask[b, i]:
                    probabilities = logits[b, i].exp() / logits[b, i].exp().sum()
                    total = total - probabilities[labels[b, i].item()].log()
        return total / batch * weight

    assert_same(
        lambda logits: loss(logits, labels, mask.to(mask_dtype)),
        reference,
        [torch.randn(batch, length, classes)],
    )


def test_language_model_loss_beyond_the_range_of_half() -> None:
    logits = torch.zeros(1, 20_000, 1000, dtype=torch.float16)
    labels = torch.zeros(1, 20_000, dtype=torch.int64)
    loss = GPTLMHeadModelLoss(1000, 1.0)(logits, labels, torch.ones_like(labels))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(20_000 * math.log(1000), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smooth_loss_equals_torch(smoothing: float) -> None:
    labels = torch.tensor([1, 0, 3, 2])
    assert_same(
        lambda x: smooth_loss(x, F.cross_entropy(x, labels, reduction="none"), smoothing, 4),
        lambda x: F.cross_entropy(x, labels, reduction="none", label_smoothing=smoothing),
        [torch.randn(4, 4)],
    )
    scores = torch.randn(2, 2, 4)
    plain = F.cross_entropy(scores.view(-1, 4), labels, reduction="none")
    assert smooth_loss(scores, plain, smoothing, 4).shape == (4,)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: create_initializer("xavier_unifrom"), "no initializer 'xavier_unifrom'"),
        (lambda: create_initializer({"std": 0.1}), "cannot be made from"),
        (lambda: create_initializer(None), "cannot be made from None"),
        (lambda: create_initializer({"name": "normal", "stdd": 0.1}), "no parameter 'stdd'"),
        (lambda: create_initializer({"name": "ones", "val": 1}), "no parameter 'val'"),
        (lambda: create_initializer({"name": "xavier_normal", "gain": "gelu"}), "no gain for"),
        (lambda: filled({"name": "variance_scaling", "mode": "fan"}), "no mode 'fan'"),
        (lambda: filled({"name": "variance_scaling", "distribution": "n"}), "no distribution"),
    ],
)
def test_refusals(call: object, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)


@pytest.mark.parametrize("shapes", [((1, 2, 5), (1, 2), (1, 2)), ((1, 2, 4), (2,), (1, 2)),
                                    ((1, 2, 4), (1, 2), (1, 1))])  # fmt: skip
def test_language_model_loss_refuses_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="have the shapes"):
        GPTLMHeadModelLoss(4, 1.0)(*(torch.zeros(shape) for shape in shapes))

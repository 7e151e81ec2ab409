"""FeedForwardNetwork and SingleFeedForwardLayer against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_references import assert_same

from openwafer.errors import ConfigError
from openwafer.layers import FeedForwardNetwork, SingleFeedForwardLayer

REFERENCES = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    None: lambda x: x,
}


@settings(max_examples=10, deadline=None)
@given(
    units=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    names=st.lists(st.sampled_from(list(REFERENCES)), min_size=3, max_size=3),
    given_names=st.booleans(),
    bias=st.booleans(),
    leading=st.sampled_from([(), (2,), (2, 3)]),
)
def test_equals_the_formula(
    units: list[int],
    names: list[str | None],
    given_names: bool,
    bias: bool,
    leading: tuple[int, ...],
) -> None:
    names = names[: len(units)] if given_names else [None] * len(units)
    network = FeedForwardNetwork(
        4,
        units,
        names if given_names else None,
        use_bias=bias,
        bias_initializer={"name": "constant", "val": 0.5},
    )

    def reference(x: torch.Tensor) -> torch.Tensor:
        for layer, name in zip(network.ffn, names, strict=True):
            x = x @ layer.linear_layer.weight.T + (0.5 if bias else 0.0)
            x = REFERENCES[name](x)
        return x

    assert_same(network, reference, [torch.randn(*leading, 4)])


def test_names_and_initial_values() -> None:
    network = FeedForwardNetwork(
        3, [4, 2], ["relu", None], use_bias=True, output_layer_initializer="ones"
    )
    names = [f"ffn.{index}.linear_layer.{part}" for index in (0, 1) for part in ("weight", "bias")]
    assert list(network.state_dict()) == names
    first, last = (layer.linear_layer for layer in network.ffn)
    assert (last.weight == 1).all()
    assert (first.weight != 1).any()
    assert (first.bias == 0).all()
    with torch.no_grad():
        last.bias.fill_(3)
    network.reset_parameters()
    assert (last.bias == 0).all()


def test_dropout_follows_the_activation_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = SingleFeedForwardLayer(4, 400, activation=lambda x: x * 0 + 1, dropout=0.25)
    outputs = layer(torch.randn(1, 4))
    assert outputs.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.6 < (outputs != 0).float().mean() < 0.9
    assert (layer.eval()(torch.randn(1, 4)) == 1).all()
    assert SingleFeedForwardLayer(4, 4, dropout=0.0).dropout_layer is None
    network = FeedForwardNetwork(4, [4, 4], layers_dropout_rates=[None, 0.5])
    assert network.ffn[0].dropout_layer is None
    assert network.ffn[1].dropout_layer.p == 0.5


def test_single_layer_equals_torch() -> None:
    layer = SingleFeedForwardLayer(3, 5, use_bias=True, activation="GELU")
    linear = layer.linear_layer
    assert_same(
        layer,
        lambda x: F.gelu(F.linear(x, linear.weight, linear.bias)),
        [torch.randn(2, 3)],
    )


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: FeedForwardNetwork(3, []), "layers_units is empty"),
        (lambda: FeedForwardNetwork(3, [4], ["relu", None]), "layers_activation has 2 entries"),
        (lambda: FeedForwardNetwork(3, [4, 4], None, [0.1]), "layers_dropout_rates has 1"),
        (lambda: FeedForwardNetwork(3, [4, 0]), "out_features is 0"),
        (lambda: SingleFeedForwardLayer(3, 4, activation=3), "the activation is a int"),
        (lambda: SingleFeedForwardLayer(3, 4, dropout=2.0), "dropout is 2.0"),
    ],
)
def test_refusals(call: object, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert what in error.value.what
    assert error.value.allowed
    assert error.value.where.startswith(__file__)

"""Stacks of linear layers, each with its activation and dropout.

Decides the order (linear, activation, dropout) and the initial values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from openwafer.layers.activations import Activation, get_activation
from openwafer.layers.arguments import argument_error, check_positive, check_probability
from openwafer.layers.initializers import InitializerSpec, create_initializer

__all__ = ["FeedForwardNetwork", "SingleFeedForwardLayer"]


class SingleFeedForwardLayer(nn.Module):
    """One linear layer, then the activation, then dropout.

    Args:
        in_features, out_features: sizes of the last dimension.
        use_bias: whether the linear layer has a bias.
        activation: a name (see `activations.ACTIVATIONS`), a function, or None.
        dropout: a rate, or None.

    Raises:
        ConfigError: unknown activation, or a size or rate out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = False,
        activation: str | Activation | None = None,
        dropout: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        check_probability(dropout=dropout)
        super().__init__()
        self.linear_layer = nn.Linear(in_features, out_features, bias=use_bias, device=device)
        self.act_layer = None if activation is None else get_activation(activation)
        self.dropout_layer = nn.Dropout(dropout) if dropout else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        outputs = self.linear_layer(inputs)
        if self.act_layer is not None:
            outputs = self.act_layer(outputs)
        if self.dropout_layer is not None:
            outputs = self.dropout_layer(outputs)
        return outputs


class FeedForwardNetwork(nn.Module):
    """Linear layers one after another.

    Args:
        input_unit: features of the input.
        layers_units: features after each layer.
        layers_activation: per layer a name, a function or None; None for none at all.
        layers_dropout_rates: per layer a rate or None; None for none at all.
        use_bias: whether the layers have biases.
        kernel_initializer, bias_initializer: initial weights and biases.
        output_layer_initializer: initial weights of the last layer, where they are others.

    Raises:
        ConfigError: lists of different lengths, no layers, or what a single layer refuses.
    """

    def __init__(
        self,
        input_unit: int,
        layers_units: Sequence[int],
        layers_activation: Sequence[str | Activation | None] | None = None,
        layers_dropout_rates: Sequence[float | None] | None = None,
        use_bias: bool = False,
        kernel_initializer: InitializerSpec = "xavier_uniform",
        bias_initializer: InitializerSpec = "zeros",
        output_layer_initializer: InitializerSpec | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        num_layers = len(layers_units)
        if num_layers == 0:
            raise argument_error("layers_units is empty", allowed="at least one layer")
        activations = _one_each("layers_activation", layers_activation, num_layers)
        rates = _one_each("layers_dropout_rates", layers_dropout_rates, num_layers)
        super().__init__()
        sizes = [input_unit, *layers_units]
        self.ffn = nn.ModuleList(
            SingleFeedForwardLayer(
                sizes[index],
                sizes[index + 1],
                use_bias=use_bias,
                activation=activations[index],
                dropout=rates[index],
                device=device,
            )
            for index in range(num_layers)
        )
        self._kernel_initializer = create_initializer(kernel_initializer)
        self._bias_initializer = create_initializer(bias_initializer)
        self._output_initializer = (
            self._kernel_initializer
            if output_layer_initializer is None
            else create_initializer(output_layer_initializer)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and biases."""
        for index, layer in enumerate(self.ffn):
            last = index == len(self.ffn) - 1
            initializer = self._output_initializer if last else self._kernel_initializer
            for name, parameter in layer.named_parameters():
                (self._bias_initializer if name.endswith("bias") else initializer)(parameter.data)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., input_unit] → [..., layers_units[-1]]."""
        outputs = inputs
        for layer in self.ffn:
            outputs = layer(outputs)
        return outputs


def _one_each(name: str, values: Sequence[Any] | None, num_layers: int) -> Sequence[Any]:
    if values is None:
        return [None] * num_layers
    if len(values) != num_layers:
        raise argument_error(
            f"{name} has {len(values)} entries",
            allowed=f"{num_layers}, one for each entry of layers_units",
        )
    return values

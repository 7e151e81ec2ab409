"""Stacks of dense layers, and what stands around a block.

Decides the order of dense layer, activation and dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.layers.base import BaseLayer
from openwafer.frontends.tf.layers.plain import (
    Activation,
    AddLayer,
    DenseLayer,
    DropoutLayer,
)

__all__ = ["FeedForwardNetwork", "FeedForwardNetworkV2", "PrePostProcessWrapper"]


class FeedForwardNetwork(BaseLayer):
    """Dense layers, each with its activation and dropout.

    Args:
        layers_units: the size of each layer.
        layers_activation, layers_dropout_rates: one for each layer; None is none anywhere.
        output_layer_initializer: of the last layer; None is kernel_initializer.

    Raises:
        ConfigError: the lists are not of one length.
    """

    def __init__(
        self,
        layers_units: Sequence[int],
        layers_activation: Sequence[Activation] | None = None,
        layers_dropout_rates: Sequence[float] | None = None,
        use_bias: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        output_layer_initializer: Any = None,
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        dropout_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        count = len(layers_units)
        activations = list(layers_activation or [None] * count)
        rates = [rate or 0.0 for rate in layers_dropout_rates or [0.0] * count]
        if not count == len(activations) == len(rates):
            raise ConfigError(
                f"{count} layers have {len(activations)} activations and {len(rates)} dropout rates"
            )
        initializers = [kernel_initializer] * count
        if output_layer_initializer is not None:
            initializers[-1] = output_layer_initializer
        self.dense_layers = [
            DenseLayer(
                units,
                activation,
                use_bias,
                initializer,
                bias_initializer,
                kernel_regularizer,
                bias_regularizer,
                dtype=self._dtype_policy,
                name=f"dense_{number}",
            )
            for number, (units, activation, initializer) in enumerate(
                zip(layers_units, activations, initializers, strict=True)
            )
        ]
        self.dropout_layers = [DropoutLayer(rate, seed=dropout_seed) for rate in rates]

    def call(self, inputs: Any, training: bool = True, **kwargs: Any) -> Any:
        hidden = inputs
        for dense, dropout in zip(self.dense_layers, self.dropout_layers, strict=True):
            hidden = dropout(dense(hidden), training=training)
        return hidden


class FeedForwardNetworkV2(FeedForwardNetwork):
    """d_model → d_ff with activation and dropout → d_model."""

    def __init__(
        self,
        d_ff: int,
        d_model: int,
        activation: Activation = "relu",
        dropout_rate: float = 0.0,
        use_bias: bool = False,
        input_layer_initializer: Any = "glorot_uniform",
        output_layer_initializer: Any = "glorot_uniform",
        dropout_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            [d_ff, d_model],
            [activation, None],
            [dropout_rate, 0.0],
            use_bias,
            input_layer_initializer,
            output_layer_initializer=output_layer_initializer,
            dropout_seed=dropout_seed,
            **kwargs,
        )


class PrePostProcessWrapper(BaseLayer):
    """A layer with others before and after it.

    Args:
        layer: what is wrapped.
        pre_process_config, post_process_config: lists of (layer class, its arguments). An AddLayer
            adds the wrapper's input: the residual.
    """

    def __init__(
        self,
        layer: Any,
        pre_process_config: Sequence[tuple[Any, dict[str, Any]]] = (),
        post_process_config: Sequence[tuple[Any, dict[str, Any]]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layer = layer
        self.before = [make(**options) for make, options in pre_process_config]
        self.after = [make(**options) for make, options in post_process_config]

    def call(self, inputs: Any, *args: Any, training: bool = True, **kwargs: Any) -> Any:
        hidden = _through(self.before, inputs, inputs, training)
        result = self.layer(hidden, *args, training=training, **kwargs)
        if isinstance(result, tuple):
            first, *others = result
            return (_through(self.after, first, inputs, training), *others)
        return _through(self.after, result, inputs, training)


def _through(layers: Sequence[Any], x: Any, residual: Any, training: bool) -> Any:
    for layer in layers:
        if isinstance(layer, AddLayer):
            x = layer([x, residual])
        elif isinstance(layer, DropoutLayer):
            x = layer(x, training=training)
        else:
            x = layer(x)
    return x

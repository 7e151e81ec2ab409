"""What the blocks of the zoo's TensorFlow transformers are made of: attention, normalization and
the feed-forward network of `openwafer.layers`, under the same names.

Decides the feed-forward network, and the options that all blocks of a stack share. Does not decide
the order of parts in a block (tf/encoder.py, tf/decoder.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.zoo.tf.activations import activation, dropout
from openwafer.zoo.tf.attention import MultiheadAttention
from openwafer.zoo.tf.initializers import Initializer, glorot_uniform

__all__ = ["BlockOptions", "FeedForwardNetwork", "element"]


def element(name: str, index: int) -> str:
    """The name of a list's element: its scope lies in the list's."""
    return f"{name}/{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """What the blocks of one stack have in common; names and defaults are those of
    `openwafer.layers.TransformerDecoderLayer`.

    inner_dropout_rate: between the two layers of the network.
    draw, draw_output: initial weights of all products, and of those that write to the residual
        stream; None for the same.
    dtype: Keras' precision policy.
    """

    width: int
    num_heads: int
    filter_size: int
    nonlinearity: str = "gelu"
    dropout_rate: float = 0.1
    attention_dropout_rate: float | None = None
    inner_dropout_rate: float | None = None
    layer_norm_epsilon: float = 1e-5
    norm_first: bool = False
    attention_type: str = "scaled_dot_product"
    use_projection_bias: bool = False
    use_ffn_bias_in_attention: bool = False
    use_ffn_bias: bool = False
    draw: Initializer = glorot_uniform
    draw_output: Initializer | None = None
    dtype: Any = None

    def attention(self, name: str) -> MultiheadAttention:
        rate = self.attention_dropout_rate
        return MultiheadAttention(
            self.width,
            self.num_heads,
            name=name,
            dropout_rate=self.dropout_rate if rate is None else rate,
            attention_type=self.attention_type,
            use_projection_bias=self.use_projection_bias,
            use_ffn_bias=self.use_ffn_bias_in_attention,
            initializer=self.draw,
            output_initializer=self.draw_output,
            dtype=self.dtype,
        )

    def network(self, name: str) -> FeedForwardNetwork:
        return FeedForwardNetwork(
            [self.filter_size, self.width],
            [self.nonlinearity, None],
            [self.inner_dropout_rate, self.dropout_rate],
            name=name,
            use_bias=self.use_ffn_bias,
            initializer=self.draw,
            output_initializer=self.draw_output,
            dtype=self.dtype,
        )

    def norm(self, name: str) -> Any:
        epsilon = self.layer_norm_epsilon
        return tf.keras.layers.LayerNormalization(epsilon=epsilon, name=name, dtype=self.dtype)


class FeedForwardNetwork(tf.keras.layers.Layer):
    """Dense layers one after another, each with its activation and dropout: [..., in] → [...,
    units[-1]].

    Args:
        units: features after each layer.
        activations: a name for each layer, or None.
        dropout_rates: after each layer's activation, or None.
    """

    def __init__(
        self,
        units: Sequence[int],
        activations: Sequence[str | None],
        dropout_rates: Sequence[float | None],
        *,
        name: str,
        use_bias: bool = False,
        initializer: Initializer = glorot_uniform,
        output_initializer: Initializer | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        draws = [initializer] * (len(units) - 1) + [output_initializer or initializer]
        self.dense = [
            tf.keras.layers.Dense(
                size,
                use_bias=use_bias,
                kernel_initializer=draw(),
                name=f"{element('ffn', index)}/linear_layer",
                dtype=self._dtype_policy,
            )
            for index, (size, draw) in enumerate(zip(units, draws, strict=True))
        ]
        self.activations = [activation(name or "linear") for name in activations]
        self.dropout_rates = list(dropout_rates)

    def call(self, inputs: Any, training: bool = False) -> Any:
        hidden = inputs
        parts = zip(self.dense, self.activations, self.dropout_rates, strict=True)
        for dense, function, rate in parts:
            hidden = dropout(function(dense(hidden)), rate, training)
        return hidden

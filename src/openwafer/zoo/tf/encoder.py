"""The encoder of the zoo's TensorFlow models: that of `openwafer.layers.encoder`, for BERT and what
is made of it, Transformer and Linformer.

Decides the order of normalization, attention, dropout and residual sums. What attention and network
compute is in tf/blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.blocks import BlockOptions, element

__all__ = ["Encoder", "EncoderLayer"]


class EncoderLayer(tf.keras.layers.Layer):
    """Self-attention, then the network, each with a residual sum: hidden [B, S, width] → the same.

    Args:
        attention: takes the place of the options' attention.
    """

    def __init__(self, options: BlockOptions, *, name: str, attention: Any = None) -> None:
        super().__init__(name=name, dtype=options.dtype)
        self.options = options
        self.self_attn = options.attention("self_attn") if attention is None else attention
        self.ffn = options.network("ffn")
        self.norm1, self.norm2 = options.norm("norm1"), options.norm("norm2")

    def call(self, hidden: Any, training: bool = False, **given: Any) -> Any:
        """given: what attention takes besides: `bias`, added to its scores."""

        def attend(x: Any) -> Any:
            attended = self.self_attn(x, training=training, **given)
            return dropout(attended, self.options.dropout_rate, training)

        def network(x: Any) -> Any:
            return self.ffn(x, training=training)

        return self._added(self._added(hidden, attend, self.norm1), network, self.norm2)

    def _added(self, x: Any, part: Callable[[Any], Any], norm: Any) -> Any:
        """The residual sum, normalized before the part or after the sum."""
        return x + part(norm(x)) if self.options.norm_first else norm(x + part(x))


class Encoder(tf.keras.layers.Layer):
    """A stack of encoder layers.

    Args:
        with_norm: normalize the last layer's output.
    """

    def __init__(
        self, options: BlockOptions, num_layers: int, *, name: str, with_norm: bool
    ) -> None:
        super().__init__(name=name, dtype=options.dtype)
        self.layers = [
            EncoderLayer(options, name=element("layers", index)) for index in range(num_layers)
        ]
        self.norm = options.norm("norm") if with_norm else None

    def call(self, hidden: Any, **given: Any) -> Any:
        """given: what each layer takes, the same for all."""
        for layer in self.layers:
            hidden = layer(hidden, **given)
        return hidden if self.norm is None else self.norm(hidden)

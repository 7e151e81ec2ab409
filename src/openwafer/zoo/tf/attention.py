"""Attention of the zoo's TensorFlow models: `openwafer.layers.MultiheadAttention`, with the same
arithmetic and under the same names.

Decides projections, scores and what is added to them. A mask is a bias of -1e4.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.layers.masks import MASKED_LOGIT
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.initializers import Initializer, glorot_uniform

__all__ = [
    "MultiheadAttention",
    "attend",
    "future_bias",
    "merge_heads",
    "padding_bias",
    "split_heads",
]


def future_bias(length: int) -> Any:
    """[S, S], float32, to be added to attention's scores: -1e4 where a key lies in the future."""
    positions = tf.range(length)
    future = positions[None, :] > positions[:, None]
    return tf.cast(future, tf.float32) * MASKED_LOGIT


def padding_bias(mask: Any) -> Any:
    """[B, S], 1 where a token is real → [B, 1, 1, S], float32: -1e4 where it is not."""
    return tf.cast(tf.equal(mask, 0), tf.float32)[:, None, None, :] * MASKED_LOGIT


class MultiheadAttention(tf.keras.layers.Layer):
    """softmax(q kᵀ · scale + bias) v with its projections, [B, S, width] → the same.

    Args:
        width: features of inputs and outputs.
        num_heads: a divisor of `width`.
        dropout_rate: on the attention weights.
        attention_type: `scaled_dot_product` (scale 1/√head size), or `dot_product` (1).
        use_projection_bias, use_ffn_bias: of q, k, v, and of the output projection.
        initializer, output_initializer: of the projections; the last one None for the same.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        name: str,
        dropout_rate: float = 0.0,
        attention_type: str = "scaled_dot_product",
        use_projection_bias: bool = False,
        use_ffn_bias: bool = False,
        initializer: Initializer = glorot_uniform,
        output_initializer: Initializer | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if width % num_heads:
            raise ConfigError(
                f"{width} features are not divided by {num_heads} heads",
                allowed="heads of equal size",
            )
        self.num_heads, self.head_size = num_heads, width // num_heads
        self.scale = 1 / math.sqrt(self.head_size) if attention_type[0] == "s" else 1.0
        self.dropout_rate = dropout_rate

        def projection(letter: str, use_bias: bool, draw: Initializer) -> Any:
            return tf.keras.layers.Dense(
                width,
                use_bias=use_bias,
                kernel_initializer=draw(),
                name=f"proj_{letter}_dense_layer",
                dtype=self._dtype_policy,
            )

        self.proj_q = projection("q", use_projection_bias, initializer)
        self.proj_k = projection("k", use_projection_bias, initializer)
        self.proj_v = projection("v", use_projection_bias, initializer)
        self.proj_output = projection("output", use_ffn_bias, output_initializer or initializer)

    def call(
        self,
        queries: Any,
        memory: Any = None,
        bias: Any = None,
        rotate: Callable[[Any], Any] | None = None,
        training: bool = False,
    ) -> Any:
        """Attend from `queries` to `memory` (None: to themselves).

        Args:
            bias: added to the scores; spreads over [B, heads, queries, keys].
            rotate: what turns queries and keys, [B, heads, S, head size], by their positions.
        """
        memory = queries if memory is None else memory
        query, key = self._heads(self.proj_q(queries)), self._heads(self.proj_k(memory))
        value = self._heads(self.proj_v(memory))
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        attended = attend(
            query, key, value, bias, self.scale, self.dropout_rate if training else 0.0
        )
        return self.proj_output(merge_heads(attended))

    def _heads(self, x: Any) -> Any:
        return split_heads(x, self.num_heads)


def split_heads(x: Any, num_heads: int) -> Any:
    """[B, S, heads · size] → [B, heads, S, size]."""
    batch, length, width = x.shape
    split = tf.reshape(x, [batch, length, num_heads, width // num_heads])
    return tf.transpose(split, [0, 2, 1, 3])


def merge_heads(x: Any) -> Any:
    """[B, heads, S, size] → [B, S, heads · size]."""
    batch, num_heads, length, size = x.shape
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [batch, length, num_heads * size])


def attend(query: Any, key: Any, value: Any, bias: Any, scale: float, dropout_rate: float) -> Any:
    """softmax(query keyᵀ · scale + bias) value, [B, heads, S, size]; the softmax in float32."""
    scores = tf.matmul(query, key, transpose_b=True)
    scores = tf.cast(scores if scale == 1.0 else scores * scale, tf.float32)
    weights = tf.nn.softmax(scores if bias is None else scores + bias)
    weights = tf.cast(dropout(weights, dropout_rate, True), value.dtype)
    return tf.matmul(weights, value)

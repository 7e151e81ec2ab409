"""Attention with several heads.

Decides projections, scores, the mask and the relative position bias.

Sources: Vaswani et al. (arXiv 1706.03762), section 3.2; the buckets of relative positions are those
of T5, Raffel et al. (arXiv 1910.10683), section 2.1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from openwafer.errors import ConfigError
from openwafer.frontends.tf.layers.base import BaseLayer
from openwafer.frontends.tf.library import tf

__all__ = ["AttentionLayer", "SelfAttentionLayer"]

_MAX_DISTANCE = 128


class AttentionLayer(BaseLayer):
    """q [batch, queries, size], v [batch, keys, size] → [batch, queries, output size].

    Args:
        hidden_size, num_heads: of the projections; heads divide the size.
        output_projection_size: None is hidden_size.
        use_projection_bias: of queries, keys and values; use_ffn_bias: of the output projection.
        attention_type: scaled_dot_product, or dot_product without 1/√(size of a head).
        use_relative_attention_bias: a learned bias for each bucket of relative positions.
        relative_attention_bias: a table of another layer [buckets, heads] in place of an own one.

    Raises:
        ConfigError: sizes do not fit, or the attention type is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        output_projection_size: int | None = None,
        use_projection_bias: bool = False,
        use_ffn_bias: bool = False,
        initializer: Any = "glorot_uniform",
        query_layer_initializer: Any = None,
        key_layer_initializer: Any = None,
        value_layer_initializer: Any = None,
        relative_attention_bias_weight_initializer: Any = None,
        output_layer_initializer: Any = None,
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        attention_type: str = "scaled_dot_product",
        dropout_rate: float = 0.0,
        dropout_seed: int | None = None,
        use_relative_attention_bias: bool = False,
        relative_attention_bias: Any = None,
        num_relative_attention_buckets: int = 32,
        bidirectional_relative_attention: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if hidden_size % num_heads:
            raise ConfigError(f"hidden_size {hidden_size} is not divided by {num_heads} heads")
        if attention_type not in ("scaled_dot_product", "dot_product"):
            raise ConfigError(
                f"unknown attention_type {attention_type!r}",
                allowed="scaled_dot_product, dot_product",
            )
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.scale = 1 / math.sqrt(self.head_size) if attention_type[0] == "s" else 1.0

        def projection(name: str, size: int, use_bias: bool, own_initializer: Any) -> Any:
            return tf.keras.layers.Dense(
                size,
                use_bias=use_bias,
                kernel_initializer=initializer if own_initializer is None else own_initializer,
                kernel_regularizer=kernel_regularizer,
                bias_regularizer=bias_regularizer,
                dtype=self._dtype_policy,
                name=name,
            )

        biased = use_projection_bias
        self.query = projection("query", hidden_size, biased, query_layer_initializer)
        self.key = projection("key", hidden_size, biased, key_layer_initializer)
        self.value = projection("value", hidden_size, biased, value_layer_initializer)
        output_size = output_projection_size or hidden_size
        self.output_projection = projection(
            "output", output_size, use_ffn_bias, output_layer_initializer
        )
        self.dropout = tf.keras.layers.Dropout(dropout_rate, seed=dropout_seed)
        self.uses_bias = use_relative_attention_bias
        self.bias_table = relative_attention_bias
        self._bias_initializer = relative_attention_bias_weight_initializer or "glorot_uniform"
        self.num_buckets = num_relative_attention_buckets
        self.bidirectional = bidirectional_relative_attention

    def build(self, input_shape: Any) -> None:
        if self.uses_bias and self.bias_table is None:
            self.bias_table = self.add_weight(
                name="relative_attention_bias",
                shape=(self.num_buckets, self.num_heads),
                initializer=self._bias_initializer,
            )
        super().build(input_shape)

    def call(
        self,
        q: Any,
        v: Any,
        mask: Any = None,
        past_kv: Any = None,
        cache_present_kv: bool = False,
        training: bool = True,
        position_bias: Any = None,
        cache_position_bias: bool = False,
    ) -> Any:
        """Attend from `q` to `v`.

        Args:
            mask: spreads over [batch, heads, queries, keys]: true where a query may see a key, or
                numbers that are added to the scores.
            past_kv: (keys, values) of earlier positions, [batch, heads, positions, head size].
            position_bias: of an earlier layer, in place of this one's.

        Returns:
            The result; with `cache_present_kv` or `cache_position_bias` a tuple, with
            (keys, values) and the bias after it.
        """
        queries = self._heads(self.query(q)) * self.scale
        keys, values = self._heads(self.key(v)), self._heads(self.value(v))
        if past_kv is not None:
            keys = tf.concat([past_kv[0], keys], 2)
            values = tf.concat([past_kv[1], values], 2)
        scores = tf.matmul(queries, keys, transpose_b=True)
        if self.uses_bias and position_bias is None:
            position_bias = self._relative_bias(queries.shape[2], keys.shape[2])
        if position_bias is not None:
            scores = scores + tf.cast(position_bias, scores.dtype)
        if mask is not None:
            scores = scores + _as_addend(mask, scores.dtype)
        weights = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), scores.dtype)
        weights = self.dropout(weights, training=training)
        result = self.output_projection(self._together(tf.matmul(weights, values)))
        further: list[Any] = [(keys, values)] if cache_present_kv else []
        further += [position_bias] if cache_position_bias else []
        return (result, *further) if further else result

    def _heads(self, x: Any) -> Any:
        """[batch, length, size] → [batch, heads, length, head size]"""
        batch, length, _ = x.shape
        split = tf.reshape(x, [batch, length, self.num_heads, self.head_size])
        return tf.transpose(split, [0, 2, 1, 3])

    def _together(self, x: Any) -> Any:
        batch, _, length, _ = x.shape
        shape = [batch, length, self.num_heads * self.head_size]
        return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), shape)

    def _relative_bias(self, num_queries: int, num_keys: int) -> Any:
        """[1, heads, queries, keys]; the last query stands at the last key."""
        buckets = _buckets(num_queries, num_keys, self.num_buckets, self.bidirectional)
        return tf.transpose(tf.gather(self.bias_table, buckets), [2, 0, 1])[None]


class SelfAttentionLayer(AttentionLayer):
    """call(x, …): attention of a sequence to itself."""

    def call(  # pyright: ignore[reportIncompatibleMethodOverride] (the documented signature)
        self, x: Any, mask: Any = None, **kwargs: Any
    ) -> Any:
        return super().call(x, x, mask, **kwargs)


def _as_addend(mask: Any, dtype: Any) -> Any:
    """0 where a boolean mask is true, and the lowest finite half of the type elsewhere."""
    if not mask.dtype.is_bool:
        return tf.cast(mask, dtype)
    return (1 - tf.cast(mask, dtype)) * tf.constant(dtype.min / 2, dtype)


def _buckets(
    num_queries: int, num_keys: int, num_buckets: int, bidirectional: bool
) -> np.ndarray[Any, Any]:
    """Which bucket each pair's distance is in: half of them one distance each, the others wider
    with the distance's logarithm, to 128; [queries, keys]."""
    queries = np.arange(num_queries)[:, None] + num_keys - num_queries
    ahead = np.arange(num_keys)[None, :] - queries
    first = np.zeros_like(ahead)
    if bidirectional:
        num_buckets //= 2
        first, distance = np.where(ahead > 0, num_buckets, 0), np.abs(ahead)
    else:
        distance = np.maximum(-ahead, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distance, 1) / exact) / math.log(_MAX_DISTANCE / exact)
    wide = np.minimum(exact + (ratio * (num_buckets - exact)).astype(np.int64), num_buckets - 1)
    return (first + np.where(distance < exact, distance, wide)).astype(np.int32)

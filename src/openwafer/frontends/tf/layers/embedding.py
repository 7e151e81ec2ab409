"""Embeddings of tokens, positions and segments, and a projection with a shared weight.

Decides how a table is made and read.

Source of the fixed position embedding: Vaswani et al., "Attention Is All You Need" (arXiv
1706.03762), section 3.5, with all sines before all cosines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from openwafer.errors import ConfigError
from openwafer.frontends.tf.layers.base import BaseLayer
from openwafer.frontends.tf.layers.plain import Activation, activation_function
from openwafer.frontends.tf.library import tf

__all__ = [
    "EmbeddingLayer",
    "PositionEmbeddingLayer",
    "SegmentEmbeddingLayer",
    "SharedWeightsDenseLayer",
]


class EmbeddingLayer(BaseLayer):
    """Rows of a table by index, times `scale`; `pad_id` gives zeros where it is not negative.

    mask_zero, input_length: accepted, as Keras has them; masks are the model's to make.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: Any = "uniform",
        bias_initializer: Any = "zeros",
        embeddings_regularizer: Any = None,
        activity_regularizer: Any = None,
        embeddings_constraint: Any = None,
        mask_zero: bool = False,
        input_length: int | None = None,
        use_bias: bool = False,
        weight_name: str = "embedding_weights",
        boundary_casting: bool = False,
        tf_summary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            boundary_casting, tf_summary, activity_regularizer=activity_regularizer, **kwargs
        )
        self.input_dim, self.output_dim, self.use_bias = input_dim, output_dim, use_bias
        self.weight_name = weight_name
        self._initializers = (embeddings_initializer, bias_initializer)
        self._regularizer, self._constraint = embeddings_regularizer, embeddings_constraint

    def build(self, input_shape: Any) -> None:
        table, bias = self._initializers
        self.table: Any = self.add_weight(
            name=self.weight_name,
            shape=(self.input_dim, self.output_dim),
            initializer=table,
            regularizer=self._regularizer,
            constraint=self._constraint,
        )
        self.bias: Any = None
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.output_dim,), initializer=bias)
        super().build(input_shape)

    def embedding_table(self) -> Any:
        """The table [input_dim, output_dim]."""
        return self.table

    def call(self, inputs: Any, pad_id: int = -1, scale: float = 1, **kwargs: Any) -> Any:
        found = tf.nn.embedding_lookup(self.table, inputs)
        if self.bias is not None:
            found = found + self.bias
        if pad_id >= 0:
            found = found * tf.cast(tf.not_equal(inputs, pad_id), found.dtype)[..., None]
        return found if scale == 1 else found * scale


class PositionEmbeddingLayer(BaseLayer):
    """x [batch, positions, size] with the embedding of each position added.

    Raises:
        ConfigError: embedding_type is neither fixed nor learned, or a learned one has no
            max_position_embeddings.
    """

    def __init__(
        self,
        max_position_embeddings: int | None = None,
        embedding_type: str = "fixed",
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if embedding_type not in ("fixed", "learned"):
            raise ConfigError(
                f"unknown embedding_type {embedding_type!r}", allowed="fixed, learned"
            )
        if embedding_type == "learned" and max_position_embeddings is None:
            raise ConfigError("a learned position embedding needs max_position_embeddings")
        self.max_positions, self.embedding_type = max_position_embeddings, embedding_type
        self._initializer, self._regularizer = embeddings_initializer, embeddings_regularizer

    def build(self, input_shape: Any) -> None:
        if self.embedding_type == "learned":
            self.table: Any = self.add_weight(
                name="position_embedding_weights",
                shape=(self.max_positions, int(input_shape[-1])),
                initializer=self._initializer,
                regularizer=self._regularizer,
            )
        super().build(input_shape)

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        _, length, size = inputs.shape
        if self.embedding_type == "learned":
            return inputs + self.table[:length]
        return inputs + tf.constant(_waves(length, size), inputs.dtype)


def _waves(length: int, size: int) -> np.ndarray[Any, Any]:
    """Sines, then cosines, of the positions in wavelengths from 2π to 10000 · 2π."""
    half = size // 2
    rates = np.exp(-np.arange(half) * (np.log(10_000.0) / max(half - 1, 1)))
    angles = np.arange(length)[:, None] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(waves, ((0, 0), (0, size - waves.shape[1])))


class SegmentEmbeddingLayer(BaseLayer):
    """call(x, segment_ids): x [batch, positions, size] with the embedding of each segment added."""

    def __init__(
        self,
        num_segments: int = 2,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_segments = num_segments
        self._initializer, self._regularizer = embeddings_initializer, embeddings_regularizer

    def build(self, input_shape: Any) -> None:
        self.table: Any = self.add_weight(
            name="segment_embedding_weights",
            shape=(self.num_segments, int(input_shape[-1])),
            initializer=self._initializer,
            regularizer=self._regularizer,
        )
        super().build(input_shape)

    def call(self, inputs: Any, segment_ids: Any, **kwargs: Any) -> Any:
        return inputs + tf.nn.embedding_lookup(self.table, segment_ids)


class SharedWeightsDenseLayer(BaseLayer):
    """call(inputs, kernel, transpose_kernel=True): a projection with a weight that is another
    layer's, such as an embedding table [units, size]; the bias is its own."""

    def __init__(
        self,
        units: int,
        activation: Activation = None,
        use_bias: bool = True,
        bias_initializer: Any = "zeros",
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        bias_constraint: Any = None,
        boundary_casting: bool = False,
        tf_summary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            boundary_casting, tf_summary, activity_regularizer=activity_regularizer, **kwargs
        )
        self.units, self.use_bias = units, use_bias
        self.activation = activation_function(activation)
        self._bias_options = (bias_initializer, bias_regularizer, bias_constraint)

    def build(self, input_shape: Any) -> None:
        initializer, regularizer, constraint = self._bias_options
        if self.use_bias:
            self.bias: Any = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer=initializer,
                regularizer=regularizer,
                constraint=constraint,
            )
        super().build(input_shape)

    def call(self, inputs: Any, kernel: Any, transpose_kernel: bool = True, **kwargs: Any) -> Any:
        flat = tf.reshape(inputs, [-1, inputs.shape[-1]])
        result = tf.matmul(flat, kernel, transpose_b=transpose_kernel)
        if self.use_bias:
            result = tf.nn.bias_add(result, self.bias)
        return self.activation(tf.reshape(result, [*inputs.shape[:-1], self.units]))

"""Losses, and poolers that make one vector of a sequence.

Decides what is summed over what.
"""

from __future__ import annotations

from typing import Any

from openwafer.errors import ConfigError, nearest
from openwafer.frontends.tf.layers.base import BaseLayer
from openwafer.frontends.tf.library import tf

__all__ = ["CrossEntropyFromLogitsLayer", "PoolerLayer", "PoolerLayerV2", "SquaredErrorLayer"]

_POOLERS = ("mean", "max", "sum", "first", "last")


class CrossEntropyFromLogitsLayer(BaseLayer):
    """labels [...] (classes), logits [..., classes] → losses [...]."""

    def call(self, labels: Any, logits: Any, **kwargs: Any) -> Any:
        logits = tf.cast(logits, tf.float32)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


class SquaredErrorLayer(BaseLayer):
    """(pred - labels)², in float32."""

    def call(self, labels: Any, pred: Any, **kwargs: Any) -> Any:
        return tf.math.squared_difference(tf.cast(pred, tf.float32), tf.cast(labels, tf.float32))


class PoolerLayer(BaseLayer):
    """One vector for each sequence: its mean, max, sum, first or last element along `axis`.

    call(inputs, padding_mask=None): the mask is 1 at padding, in a shape that spreads over the
    inputs; what is padding does not count for mean, max and sum, and `last` is the last that is
    none.

    Raises:
        ConfigError: pooler_type is none of these.
    """

    def __init__(self, pooler_type: str = "mean", axis: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if pooler_type not in _POOLERS:
            raise ConfigError(
                f"unknown pooler_type {pooler_type!r}",
                allowed=", ".join(_POOLERS),
                hint=nearest(pooler_type, _POOLERS),
            )
        self.pooler_type, self.axis = pooler_type, 1 if axis is None else axis

    def call(self, inputs: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
        axis, kind = self.axis, self.pooler_type
        if kind == "first":
            return tf.gather(inputs, 0, axis=axis)
        kept = tf.ones_like(inputs)
        if padding_mask is not None:
            kept = kept * (1.0 - tf.cast(padding_mask, inputs.dtype))
        if kind == "max":
            lowest = tf.constant(inputs.dtype.min, inputs.dtype)
            return tf.reduce_max(tf.where(kept > 0, inputs, lowest), axis)
        if kind == "last":
            # One where an element is kept and none after it is.
            after = tf.cumsum(kept, axis, exclusive=True, reverse=True)
            kept = tf.where(after > 0, tf.zeros_like(kept), kept)
        total = tf.reduce_sum(inputs * kept, axis)
        if kind != "mean":
            return total
        return total / tf.maximum(tf.reduce_sum(kept, axis), 1.0)


class PoolerLayerV2(PoolerLayer):
    """PoolerLayer with a mask that is 1 at what counts."""

    def call(self, inputs: Any, padding_mask: Any = None, **kwargs: Any) -> Any:
        if padding_mask is not None:
            padding_mask = 1.0 - tf.cast(padding_mask, inputs.dtype)
        return super().call(inputs, padding_mask, **kwargs)

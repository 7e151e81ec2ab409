"""The decoder of the zoo's TensorFlow models: that of `openwafer.layers.decoder`, for GPT-2, GPT-3
and Transformer.

Decides the order of normalization, attention, dropout and residual sums, and what the prediction of
the next token is measured by. What attention and network compute is in tf/blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from openwafer.data.dataset import DataInfo
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import (
    accuracy_metric,
    bits_per_x_metric,
    perplexity_metric,
)
from openwafer.frontends.tf.metrics.of_objects import streaming_object
from openwafer.frontends.tf.metrics.sums import Place
from openwafer.zoo.gpt2.metrics import GzipMetric
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.blocks import BlockOptions, element
from openwafer.zoo.tf.losses import token_losses, weighted_token_loss
from openwafer.zoo.tf.model import Features

__all__ = ["Decoder", "DecoderLayer", "next_token_loss", "next_token_metrics"]


class DecoderLayer(tf.keras.layers.Layer):
    """Self-attention, with `attends_to_memory` attention to an encoder's output, and the network.

    hidden [B, S, width] → the same.
    """

    def __init__(self, options: BlockOptions, *, name: str, attends_to_memory: bool) -> None:
        super().__init__(name=name, dtype=options.dtype)
        self.options = options
        self.self_attn, self.norm1 = options.attention("self_attn"), options.norm("norm1")
        self.multihead_attn: Any = None
        self.norm2: Any = None
        if attends_to_memory:
            self.multihead_attn = options.attention("multihead_attn")
            self.norm2 = options.norm("norm2")
        self.norm3, self.ffn = options.norm("norm3"), options.network("ffn")

    def call(
        self,
        hidden: Any,
        bias: Any = None,
        memory: Any = None,
        memory_bias: Any = None,
        training: bool = False,
    ) -> Any:
        """
        Args:
            bias: added to the scores of self-attention; it is not causal by itself.
            memory: the encoder's output; memory_bias: added to the scores over it.
        """
        rate = self.options.dropout_rate

        def attend(x: Any) -> Any:
            return dropout(self.self_attn(x, bias=bias, training=training), rate, training)

        def attend_to_memory(x: Any) -> Any:
            attended = self.multihead_attn(x, memory, bias=memory_bias, training=training)
            return dropout(attended, rate, training)

        def network(x: Any) -> Any:
            return self.ffn(x, training=training)

        hidden = self._added(hidden, attend, self.norm1)
        if self.multihead_attn is not None:
            hidden = self._added(hidden, attend_to_memory, self.norm2)
        return self._added(hidden, network, self.norm3)

    def _added(self, x: Any, part: Callable[[Any], Any], norm: Any) -> Any:
        """The residual sum, normalized before the part or after the sum."""
        return x + part(norm(x)) if self.options.norm_first else norm(x + part(x))


class Decoder(tf.keras.layers.Layer):
    """A stack of decoder layers, with a normalization at its end."""

    def __init__(
        self, options: BlockOptions, num_layers: int, *, name: str, attends_to_memory: bool
    ) -> None:
        super().__init__(name=name, dtype=options.dtype)
        self.layers = [
            DecoderLayer(
                options, name=element("layers", index), attends_to_memory=attends_to_memory
            )
            for index in range(num_layers)
        ]
        self.norm = options.norm("norm")

    def call(self, hidden: Any, **given: Any) -> Any:
        """`given`: what each layer takes, the same for all."""
        for layer in self.layers:
            hidden = layer(hidden, **given)
        return self.norm(hidden)


class _LossOptions(Protocol):
    """The keys of a configuration that the loss reads; see GPT2Config."""

    @property
    def loss_scaling(self) -> str: ...
    @property
    def loss_weight(self) -> float: ...


def next_token_loss(logits: Any, features: Features, options: _LossOptions) -> Any:
    """The loss of GPT-2, GPT-3 and GPT-J, a scalar: over the tokens of `attention_mask`."""
    return weighted_token_loss(
        logits,
        features["labels"],
        features["attention_mask"],
        options.loss_scaling,
        options.loss_weight,
    )


def next_token_metrics(
    logits: Any, features: Features, info: DataInfo | None
) -> dict[str, tuple[Any, Any]]:
    """Those of NextTokenMetrics, over the tokens that count: `eval/accuracy_lm` and
    `eval/perplexity_lm`; where the data know the text that they stand for, its
    `eval/bits_per_byte` and, to compare, what gzip -9 takes."""
    labels, mask = features["labels"], tf.cast(features["attention_mask"], tf.float32)
    predictions = tf.argmax(logits, -1, labels.dtype)
    total_loss, num_tokens = tf.reduce_sum(token_losses(logits, labels) * mask), tf.reduce_sum(mask)
    found = {
        "eval/accuracy_lm": accuracy_metric(labels, predictions, mask),
        "eval/perplexity_lm": perplexity_metric(total_loss, num_tokens),
    }
    if info is not None and info.bytes_per_token:
        tokens_per_byte = 1 / info.bytes_per_token
        found["eval/bits_per_byte"] = bits_per_x_metric(
            total_loss, num_tokens, dataset=tokens_per_byte
        )
    if info is not None and info.tokenizer is not None:
        gzip = GzipMetric(info.tokenizer, name="gzip_bits_per_byte")
        found["eval/gzip_bits_per_byte"] = streaming_object(gzip, [labels, mask], Place())
    return found

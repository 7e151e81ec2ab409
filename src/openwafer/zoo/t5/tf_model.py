"""T5 in TensorFlow: the network of torch_model.py, under the same names."""

from __future__ import annotations

from typing import Any

import torch

from openwafer.frontends.tf.library import tf
from openwafer.layers.relative_position import distance_buckets
from openwafer.zoo.t5.torch_model import T5Config
from openwafer.zoo.tf.activations import activation, dropout
from openwafer.zoo.tf.attention import attend, future_bias, merge_heads, padding_bias, split_heads
from openwafer.zoo.tf.blocks import element
from openwafer.zoo.tf.embedding import LanguageHead
from openwafer.zoo.tf.initializers import normal
from openwafer.zoo.tf.seq2seq import Seq2SeqTFModel

__all__ = ["MODEL", "T5TFModel"]


class T5TFModel(Seq2SeqTFModel[T5Config]):
    """Token tables, two stacks, and the output layer."""

    def __init__(self, config: T5Config, **options: Any) -> None:
        config.check_shared_embedding()
        super().__init__(config, **options)
        policy = self.policy
        self._shared = _embedding(config.num_src_tokens, config, "shared", policy)
        self._decoder_embedding = self._shared
        if not config.share_encoder_decoder_embedding:
            self._decoder_embedding = _embedding(
                config.num_tgt_tokens, config, "decoder_embedding", policy
            )
        self._encoder = T5Stack(config, policy, decoder=False)
        self._decoder = T5Stack(config, policy, decoder=True)
        self._head = LanguageHead(
            config.num_tgt_tokens,
            tied_to=self._decoder_embedding if config.share_embedding_weights else None,
            initializer=normal(1.0),
            dtype=policy,
        )

    def encode(self, token_ids: Any, mask: Any, training: bool) -> Any:
        return self._encoder(
            self._shared(token_ids), mask_bias=padding_bias(mask), training=training
        )

    def decode(
        self, token_ids: Any, mask: Any, memory: Any, memory_mask: Any, training: bool
    ) -> Any:
        hidden = self._decoder(
            self._decoder_embedding(token_ids),
            mask_bias=padding_bias(mask) + future_bias(token_ids.shape[1]),
            memory=memory,
            memory_bias=padding_bias(memory_mask),
            training=training,
        )
        config = self.config
        return self._head(hidden * config.d_model**-0.5 if config.scales_output else hidden)


class T5Stack(tf.keras.layers.Layer):
    """The encoder, or the decoder: hidden [batch, seq, d_model] → the same."""

    def __init__(self, config: T5Config, policy: Any, *, decoder: bool) -> None:
        super().__init__(name="decoder" if decoder else "encoder", dtype=policy)
        num_layers = (
            config.decoder_num_hidden_layers if decoder else config.encoder_num_hidden_layers
        )
        self.config = config
        self.relative_position = RelativePosition(config, bidirectional=not decoder)
        self.layers = [
            T5Layer(config, policy, name=element("layers", index), decoder=decoder)
            for index in range(num_layers)
        ]
        self.norm = _norm(config, "norm", policy)

    def call(
        self,
        hidden: Any,
        mask_bias: Any,
        memory: Any = None,
        memory_bias: Any = None,
        training: bool = False,
    ) -> Any:
        """
        Args:
            mask_bias: added to self-attention's scores, [batch, 1, 1 or seq, seq].
            memory: what the decoder attends to; memory_bias: added to those scores.
        """
        config = self.config
        before, after = (
            config.dropout_rate if used else None
            for used in (
                config.use_pre_encoder_decoder_dropout,
                config.use_dropout_outside_residual_path,
            )
        )
        bias = self.relative_position(hidden) + mask_bias
        hidden = dropout(hidden, before, training)
        for layer in self.layers:
            hidden = layer(
                hidden, bias=bias, memory=memory, memory_bias=memory_bias, training=training
            )
        return dropout(self.norm(hidden), after, training)


class RelativePosition(tf.keras.layers.Layer):
    """x [batch, seq, …] → the bias of each distance between its positions, [1, heads, seq, seq],
    float32."""

    def __init__(self, config: T5Config, *, bidirectional: bool) -> None:
        super().__init__(name="relative_position", dtype="float32", autocast=False)
        self.num_buckets = config.relative_attention_num_buckets
        self.bidirectional = bidirectional
        self.table = tf.keras.layers.Embedding(
            self.num_buckets,
            config.num_heads,
            embeddings_initializer=normal(config.d_model**-0.5)(),
            name="relative_attention_bias",
        )

    def call(self, x: Any) -> Any:
        positions = torch.arange(x.shape[1], device="cpu")
        buckets = distance_buckets(
            positions[None, :] - positions[:, None],
            self.num_buckets,
            bidirectional=self.bidirectional,
        )
        found = self.table(tf.constant(buckets.numpy()))
        return tf.transpose(found, [2, 0, 1])[None]


class T5Layer(tf.keras.layers.Layer):
    """Self-attention, in the decoder attention to the encoder's output, a feed-forward network."""

    def __init__(self, config: T5Config, policy: Any, *, name: str, decoder: bool) -> None:
        super().__init__(name=name, dtype=policy)
        self.dropout_rate = config.dropout_rate
        self.self_attention_norm = _norm(config, "self_attention_norm", policy)
        self.self_attention = T5Attention(config, policy, name="self_attention")
        self.cross_attention_norm: Any = None
        self.cross_attention: Any = None
        if decoder:
            self.cross_attention_norm = _norm(config, "cross_attention_norm", policy)
            self.cross_attention = T5Attention(config, policy, name="cross_attention")
        self.feed_forward_norm = _norm(config, "feed_forward_norm", policy)
        self.feed_forward = T5FeedForward(config, policy, decoder=decoder)

    def call(
        self, hidden: Any, bias: Any, memory: Any, memory_bias: Any, training: bool = False
    ) -> Any:
        """See T5Stack.call; `bias` with the positions'."""

        def added(result: Any) -> Any:
            return hidden + dropout(result, self.dropout_rate, training)

        normed = self.self_attention_norm(hidden)
        hidden = added(self.self_attention(normed, keys=normed, bias=bias, training=training))
        if self.cross_attention is not None:
            normed = self.cross_attention_norm(hidden)
            hidden = added(
                self.cross_attention(normed, keys=memory, bias=memory_bias, training=training)
            )
        normed = self.feed_forward_norm(hidden)
        return added(self.feed_forward(normed, training=training))


class T5Attention(tf.keras.layers.Layer):
    """softmax(q kᵀ + bias) v with `num_heads` heads of `d_kv` features."""

    def __init__(self, config: T5Config, policy: Any, *, name: str) -> None:
        super().__init__(name=name, dtype=policy)
        d_model, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        rate = config.attention_dropout_rate
        self.dropout_rate = config.dropout_rate if rate is None else rate
        self.q = _dense(inner, "q", (d_model * config.d_kv) ** -0.5, policy)
        self.k = _dense(inner, "k", d_model**-0.5, policy)
        self.v = _dense(inner, "v", d_model**-0.5, policy)
        self.o = _dense(d_model, "o", inner**-0.5, policy)

    def call(self, queries: Any, keys: Any, bias: Any, training: bool = False) -> Any:
        """queries, keys [batch, seq, d_model]; `bias` is added to the scores."""
        query, key, value = (
            split_heads(projected, self.num_heads)
            for projected in (self.q(queries), self.k(keys), self.v(keys))
        )
        rate = self.dropout_rate if training else 0.0
        return self.o(merge_heads(attend(query, key, value, bias, 1.0, rate)))


class T5FeedForward(tf.keras.layers.Layer):
    """wo(f(wi x)), or with a gate wo(f(wi x) · wi_gate x)."""

    def __init__(self, config: T5Config, policy: Any, *, decoder: bool) -> None:
        super().__init__(name="feed_forward", dtype=policy)
        name = config.decoder_nonlinearity if decoder else config.encoder_nonlinearity
        self.activation, gated = activation(name.removeprefix("gated-")), name.startswith("gated-")
        rate = config.relu_dropout_rate
        self.dropout_rate = config.dropout_rate if rate is None else rate
        d_model, d_ff = config.d_model, config.d_ff
        self.wi = _dense(d_ff, "wi", d_model**-0.5, policy)
        self.wi_gate = _dense(d_ff, "wi_gate", d_model**-0.5, policy) if gated else None
        self.wo = _dense(d_model, "wo", d_ff**-0.5, policy)

    def call(self, x: Any, training: bool = False) -> Any:
        inner = self.activation(self.wi(x))
        if self.wi_gate is not None:
            inner = inner * self.wi_gate(x)
        return self.wo(dropout(inner, self.dropout_rate, training))


class RMSNorm(tf.keras.layers.Layer):
    """x / √(mean(x²) + ε) · weight over the last dimension, in float32."""

    def __init__(self, epsilon: float, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype)
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        self.weight: Any = self.add_weight(
            name="weight", shape=(int(input_shape[-1]),), initializer="ones"
        )
        super().build(input_shape)

    def call(self, x: Any) -> Any:
        wide = tf.cast(x, tf.float32)
        mean_square = tf.reduce_mean(tf.square(wide), -1, keepdims=True)
        normed = wide * tf.math.rsqrt(mean_square + self.epsilon)
        return tf.cast(normed, x.dtype) * self.weight


def _norm(config: T5Config, name: str, policy: Any) -> Any:
    if config.use_t5_layer_norm:
        return RMSNorm(config.layer_norm_epsilon, name=name, dtype=policy)
    epsilon = config.layer_norm_epsilon
    return tf.keras.layers.LayerNormalization(epsilon=epsilon, name=name, dtype=policy)


def _dense(units: int, name: str, std: float, policy: Any) -> Any:
    return tf.keras.layers.Dense(
        units, use_bias=False, kernel_initializer=normal(std)(), name=name, dtype=policy
    )


def _embedding(num_tokens: int, config: T5Config, name: str, policy: Any) -> Any:
    return tf.keras.layers.Embedding(
        num_tokens,
        config.d_model,
        embeddings_initializer=normal(1.0)(),
        name=name,
        dtype=policy,
    )


MODEL = T5TFModel

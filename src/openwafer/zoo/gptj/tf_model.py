"""GPT-J in TensorFlow: the network of torch_model.py, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.layers import RotaryPositionEmbeddingHelper
from openwafer.zoo.gptj.torch_model import GPTJConfig
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.attention import future_bias
from openwafer.zoo.tf.blocks import BlockOptions, element
from openwafer.zoo.tf.decoder import next_token_loss, next_token_metrics
from openwafer.zoo.tf.embedding import LanguageHead
from openwafer.zoo.tf.initializers import normal
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "GPTJTFModel"]


class GPTJTFModel(TFZooModel[GPTJConfig]):
    """input_ids [batch, seq] → logits [batch, seq, vocab_size]; see torch_model.GPTJ."""

    def __init__(self, config: GPTJConfig, **options: Any) -> None:
        super().__init__(config, **options)
        draw, blocks = normal(config.initializer_range), _block_options(config, self.policy)
        self._embedding = tf.keras.layers.Embedding(
            config.vocab_size,
            config.hidden_size,
            embeddings_initializer=draw(),
            name="word_embeddings",
            dtype=self.policy,
        )
        self._layers = [
            GPTJBlock(
                blocks,
                name=element("layers", index),
                has_second_norm=config.use_untied_layer_norm,
            )
            for index in range(config.num_hidden_layers)
        ]
        self._norm = blocks.norm("norm")
        self._head = LanguageHead(
            config.vocab_size,
            tied_to=self._embedding if config.share_embedding_weights else None,
            initializer=draw,
            use_bias=config.use_bias_in_output,
            dtype=self.policy,
        )

    def build_model(self, features: Features, mode: str) -> Outputs:
        config, training = self.config, mode == tf.estimator.ModeKeys.TRAIN
        hidden = self._embedding(features["input_ids"])
        hidden = dropout(hidden, config.embedding_dropout_rate, training)
        length = hidden.shape[1]
        bias, rotate = future_bias(length), _rotation(config, length)
        for layer in self._layers:
            hidden = layer(hidden, bias=bias, rotate=rotate, training=training)
        return {"logits": self._head(self._norm(hidden))}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        return next_token_loss(model_outputs["logits"], features, self.config)

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        assert features is not None, "the labels are among the features"
        return next_token_metrics(model_outputs["logits"], features, self.info)


class GPTJBlock(tf.keras.layers.Layer):
    """x + attention(norm(x)) + network(norm(x)), [batch, seq, hidden].

    Args:
        has_second_norm: the network has a normalization of its own.
    """

    def __init__(self, options: BlockOptions, *, name: str, has_second_norm: bool) -> None:
        super().__init__(name=name, dtype=options.dtype)
        self.norm1 = options.norm("norm1")
        self.norm2 = options.norm("norm2") if has_second_norm else None
        self.self_attn, self.ffn = options.attention("self_attn"), options.network("ffn")
        self.dropout_rate = options.dropout_rate

    def call(
        self, hidden: Any, bias: Any, rotate: Callable[[Any], Any], training: bool = False
    ) -> Any:
        """bias: added to the scores; rotate: turns queries and keys by their positions."""
        normed = self.norm1(hidden)
        attended = self.self_attn(normed, bias=bias, rotate=rotate, training=training)
        network = self.ffn(normed if self.norm2 is None else self.norm2(hidden), training=training)
        return dropout(attended, self.dropout_rate, training) + network + hidden


def _block_options(config: GPTJConfig, policy: Any) -> BlockOptions:
    return BlockOptions(
        width=config.hidden_size,
        num_heads=config.num_heads,
        filter_size=config.filter_size,
        nonlinearity=config.nonlinearity,
        dropout_rate=config.residual_dropout_rate,
        attention_dropout_rate=config.attention_dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
        use_projection_bias=config.use_projection_bias_in_attention,
        use_ffn_bias_in_attention=config.use_ffn_bias_in_attention,
        use_ffn_bias=config.use_ffn_bias,
        draw=normal(config.initializer_range),
        dtype=policy,
    )


def _rotation(config: GPTJConfig, length: int) -> Callable[[Any], Any]:
    """Turns the first `rotary_dim` features of [batch, head, seq, head size], in float32, by the
    angles of `openwafer.layers.RotaryPositionEmbeddingHelper`.

    Raises:
        ConfigError: more positions than there are.
    """
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"the sequence reaches position {length - 1}",
            where="model.max_position_embeddings",
            allowed=f"positions below {config.max_position_embeddings}",
        )
    size = config.rotary_dim
    helper = RotaryPositionEmbeddingHelper(length, size)
    sin, cos = (tf.constant(table.numpy()) for table in helper.create_fixed_pos_emb("cpu"))

    def rotate(x: Any) -> Any:
        batch, num_heads, _, head_size = x.shape
        pairs = tf.reshape(x[..., :size], [batch, num_heads, length, size // 2, 2])
        even, odd = tf.unstack(tf.cast(pairs, tf.float32), axis=-1)
        turned = tf.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        turned = tf.cast(tf.reshape(turned, [batch, num_heads, length, size]), x.dtype)
        return turned if head_size == size else tf.concat([turned, x[..., size:]], axis=-1)

    return rotate


MODEL = GPTJTFModel

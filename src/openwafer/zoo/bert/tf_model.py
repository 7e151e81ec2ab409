"""BERT in TensorFlow: the twin of torch_model.py, under the same names.

Decides the backbone, which the fine-tuning families share, and the two heads, losses and metrics of
pre-training.
"""

from __future__ import annotations

from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import accuracy_metric, perplexity_metric
from openwafer.zoo.bert.torch_model import BackboneConfig, BertConfig
from openwafer.zoo.tf.activations import activation, dropout
from openwafer.zoo.tf.attention import padding_bias
from openwafer.zoo.tf.blocks import BlockOptions
from openwafer.zoo.tf.embedding import TokenEmbedding
from openwafer.zoo.tf.encoder import Encoder
from openwafer.zoo.tf.initializers import Initializer
from openwafer.zoo.tf.losses import (
    cross_entropies,
    token_losses,
    weighted_loss,
    weighted_token_loss,
)
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = [
    "MODEL",
    "Backbone",
    "BertTF",
    "block_options",
    "initial_dense",
    "is_training",
    "rows_that_count",
]


def is_training(mode: str) -> bool:
    """Whether dropout is active."""
    return mode == tf.estimator.ModeKeys.TRAIN


def block_options(config: BackboneConfig, dtype: Any) -> BlockOptions:
    """What the layers of the encoder have in common."""
    return BlockOptions(
        width=config.hidden_size,
        num_heads=config.num_heads,
        filter_size=config.filter_size,
        nonlinearity=config.encoder_nonlinearity,
        dropout_rate=config.dropout_rate,
        attention_dropout_rate=config.attention_dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
        norm_first=config.use_pre_normalization,
        attention_type=config.attention_type,
        use_projection_bias=config.use_projection_bias_in_attention,
        use_ffn_bias_in_attention=config.use_ffn_bias_in_attention,
        use_ffn_bias=config.use_ffn_bias,
        draw=_normal(config),
        dtype=dtype,
    )


def _normal(config: BackboneConfig) -> Initializer:
    """Normally distributed with standard deviation `initializer_range`, cut off at twice that."""
    std = config.initializer_range
    return lambda: tf.keras.initializers.TruncatedNormal(stddev=std)


def initial_dense(
    config: BackboneConfig, units: int, name: str, dtype: Any, use_bias: bool = True
) -> Any:
    """A dense layer with this configuration's initial weights."""
    return tf.keras.layers.Dense(
        units,
        use_bias=use_bias,
        kernel_initializer=_normal(config)(),
        name=name,
        dtype=dtype,
    )


def rows_that_count(attention_mask: Any) -> Any:
    """[batch]: 1 for a sample, 0 for a row that only fills the last batch (it has no tokens)."""
    return attention_mask[:, 0]


class Backbone(tf.keras.layers.Layer):
    """Embeddings and encoder, and the pooler where a head asks for it.

    Args:
        encoder: takes the place of the transformer encoder.
    """

    def __init__(
        self, config: BackboneConfig, dtype: Any, *, with_pooler: bool, encoder: Any = None
    ) -> None:
        super().__init__(name="backbone", dtype=dtype)
        width = config.hidden_size
        embedding_size = config.embedding_size or width
        options = block_options(config, dtype)
        self.config = config
        self.num_segments = config.num_segments if config.use_segment_embedding else 0
        self.embeddings = TokenEmbedding(
            config.vocab_size,
            embedding_size,
            name="embeddings",
            initializer=options.draw,
            num_positions=config.max_position_embeddings + config.first_position,
            position_type=config.position_embedding_type if config.use_position_embedding else None,
            num_segments=self.num_segments,
            dtype=dtype,
        )
        self.embedding_norm = options.norm("embedding_norm")
        self.embedding_projection = (
            initial_dense(config, width, "embedding_projection", dtype)
            if embedding_size != width
            else None
        )
        self.encoder = encoder or Encoder(
            options,
            config.num_hidden_layers,
            name="encoder",
            with_norm=config.use_pre_normalization,
        )
        self.pooler = initial_dense(config, width, "pooler", dtype) if with_pooler else None

    @property
    def token_table(self) -> Any:
        """[vocab, embedding]"""
        return self.embeddings.table

    def call(
        self,
        input_ids: Any,
        attention_mask: Any,
        token_type_ids: Any = None,
        training: bool = False,
    ) -> tuple[Any, Any]:
        """The last hidden states, [batch, seq, hidden], and the sequence as one vector, from its
        first token, [batch, hidden]; None where there is no pooler.

        Args:
            input_ids, token_type_ids: [batch, seq], integers; no segments stand for the first one.
            attention_mask: [batch, seq], 1 on tokens, 0 on padding, which comes last.
        """
        config, segments = self.config, token_type_ids
        if segments is None or self.num_segments == 1:
            # A table of one row has nothing to choose from.
            segments = tf.zeros_like(input_ids)
        hidden = self.embeddings(input_ids, segments, first_position=config.first_position)
        hidden = dropout(self.embedding_norm(hidden), config.dropout_rate, training)
        if self.embedding_projection is not None:
            hidden = self.embedding_projection(hidden)
        hidden = self.encoder(hidden, bias=padding_bias(attention_mask), training=training)
        pooled = None if self.pooler is None else tf.tanh(self.pooler(hidden[:, 0]))
        return hidden, pooled

    def of_batch(self, features: Features, mode: str) -> tuple[Any, Any]:
        """`call` for a batch's input_ids, attention_mask and, if it has some, token_type_ids."""
        return self(
            features["input_ids"],
            features["attention_mask"],
            features.get("token_type_ids"),
            training=is_training(mode),
        )


class MaskedTokenHead(tf.keras.layers.Layer):
    """Which token stands behind a mask: a layer of its own, then the token table transposed."""

    def __init__(self, config: BertConfig, dtype: Any) -> None:
        super().__init__(name="masked_token_head", dtype=dtype)
        self.config, self.size = config, config.embedding_size or config.hidden_size
        self.dense = initial_dense(config, self.size, "dense", dtype, config.use_ffn_bias_in_mlm)
        self.nonlinearity = activation(config.mlm_nonlinearity)
        self.norm = block_options(config, dtype).norm("norm")
        self.table: Any = None
        self.bias: Any = None

    def build(self, input_shape: Any) -> None:
        config = self.config
        if not config.share_embedding_weights:
            self.table = self.add_weight(
                name="table",
                shape=(config.vocab_size, self.size),
                initializer=_normal(config)(),
            )
        if config.use_output_bias_in_mlm:
            self.bias = self.add_weight(
                name="bias", shape=(config.vocab_size,), initializer="zeros"
            )
        super().build(input_shape)

    def call(self, hidden: Any, token_table: Any) -> Any:
        """[batch, masked, hidden] → [batch, masked, vocab]; the token table is [vocab,
        embedding]."""
        shape = [*hidden.shape[:-1], self.config.vocab_size]
        hidden = self.norm(self.nonlinearity(self.dense(hidden)))
        table = token_table if self.table is None else self.table
        flat = tf.reshape(hidden, [-1, self.size])
        logits = tf.matmul(flat, tf.cast(table, flat.dtype), transpose_b=True)
        if self.bias is not None:
            logits = tf.nn.bias_add(logits, tf.cast(self.bias, logits.dtype))
        return tf.reshape(logits, shape)


class BertTF(TFZooModel[BertConfig]):
    """BERT with its pre-training heads."""

    def _encoder(self) -> Any:
        """What takes the place of the transformer encoder, if anything does."""
        return None

    def build_model(self, features: Features, mode: str) -> Outputs:
        """`masked_lm` [batch, masked, vocab] and, with NSP, `next_sentence` [batch, 2].

        Batch: input_ids, attention_mask, token_type_ids [batch, seq]; masked_lm_positions
        [batch, masked], without which every position is predicted.
        """
        config = self.config
        backbone = Backbone(
            config, self.policy, with_pooler=not config.disable_nsp, encoder=self._encoder()
        )
        hidden, pooled = backbone.of_batch(features, mode)
        masked = hidden
        if "masked_lm_positions" in features:
            masked = tf.gather(hidden, features["masked_lm_positions"], batch_dims=1)
        head = MaskedTokenHead(config, self.policy)
        heads = {"masked_lm": head(masked, backbone.token_table)}
        if not config.disable_nsp:
            next_sentence = initial_dense(
                config, config.num_cls_classes, "next_sentence_head", self.policy
            )
            heads["next_sentence"] = next_sentence(pooled)
        return heads

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """Masked tokens, plus next sentence.

        Batch: labels, masked_lm_mask [batch, masked], next_sentence_label [batch, 1],
        mlm_loss_scale [batch, 1] (see `mlm_loss_scaling`).
        """
        loss = self._masked_lm_loss(model_outputs["masked_lm"], features)
        if "next_sentence" not in model_outputs:
            return loss
        classes = tf.reshape(features["next_sentence_label"], [-1])
        losses = cross_entropies(model_outputs["next_sentence"], classes)
        rows = rows_that_count(features["attention_mask"])
        return loss + weighted_loss(losses, rows, "num_tokens")

    def _masked_lm_loss(self, logits: Any, features: Features) -> Any:
        config = self.config
        weights, scaling = features["masked_lm_mask"], config.mlm_loss_scaling
        if scaling != "num_tokens" and "mlm_loss_scale" in features:
            weights = tf.cast(weights, tf.float32) * features["mlm_loss_scale"]
        elif scaling == "precomputed_num_masked":
            raise ConfigError(
                "mlm_loss_scaling is precomputed_num_masked, and the batch has no mlm_loss_scale",
                where="model.mlm_loss_scaling",
                allowed="num_tokens, batch_size, or an input with dynamic_mlm_scale: True",
            )
        return weighted_token_loss(
            logits, features["labels"], weights, scaling, config.mlm_loss_weight
        )

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Accuracy and perplexity of masked tokens, accuracy of next sentences."""
        assert features is not None, "the labels are in the batch"
        tokens, words = model_outputs["masked_lm"], features["labels"]
        weights = tf.cast(features["masked_lm_mask"], tf.float32)
        total = tf.reduce_sum(token_losses(tokens, words) * weights)
        found = {
            "eval/accuracy_masked_lm": accuracy_metric(words, tf.argmax(tokens, -1), weights),
            "eval/mlm_perplexity": perplexity_metric(total, tf.reduce_sum(weights)),
        }
        if "next_sentence" in model_outputs:
            found["eval/accuracy_cls"] = accuracy_metric(
                tf.reshape(features["next_sentence_label"], [-1]),
                tf.argmax(model_outputs["next_sentence"], -1),
                rows_that_count(features["attention_mask"]),
            )
        return found


MODEL = BertTF

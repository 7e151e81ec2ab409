"""GPT-2 in TensorFlow: the network of torch_model.py, under the same names.

GPT-3 in zoo/gpt3 is the same network in other sizes.
"""

from __future__ import annotations

import math
from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.zoo.gpt2.torch_model import GPT2Config
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.attention import future_bias
from openwafer.zoo.tf.blocks import BlockOptions
from openwafer.zoo.tf.decoder import Decoder, next_token_loss, next_token_metrics
from openwafer.zoo.tf.embedding import LanguageHead, TokenEmbedding
from openwafer.zoo.tf.initializers import normal
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "GPT2TFModel"]


class GPT2TFModel(TFZooModel[GPT2Config]):
    """input_ids [batch, seq] → logits [batch, seq, vocab_size]; see torch_model.GPT2."""

    def __init__(self, config: GPT2Config, **options: Any) -> None:
        super().__init__(config, **options)
        draw = normal(config.initializer_range)
        self._embedding = TokenEmbedding(
            config.vocab_size,
            config.hidden_size,
            name="embedding_layer",
            initializer=draw,
            num_positions=config.max_position_embeddings,
            position_type=config.position_embedding_type if config.use_position_embedding else None,
            dtype=self.policy,
        )
        self._decoder = Decoder(
            _block_options(config, self.policy),
            config.num_hidden_layers,
            name="transformer_decoder",
            attends_to_memory=False,
        )
        self._head = LanguageHead(
            config.vocab_size,
            tied_to=self._embedding.word_embeddings if config.share_embedding_weights else None,
            initializer=draw,
            use_bias=config.use_bias_in_output,
            dtype=self.policy,
        )

    def build_model(self, features: Features, mode: str) -> Outputs:
        config, training = self.config, mode == tf.estimator.ModeKeys.TRAIN
        rate = config.embedding_dropout_rate
        hidden = self._embedding(features["input_ids"])
        hidden = dropout(hidden, config.dropout_rate if rate is None else rate, training)
        bias = future_bias(hidden.shape[1])
        return {"logits": self._head(self._decoder(hidden, bias=bias, training=training))}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        return next_token_loss(model_outputs["logits"], features, self.config)

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        assert features is not None, "the labels are among the features"
        return next_token_metrics(model_outputs["logits"], features, self.info)


def _block_options(config: GPT2Config, policy: Any) -> BlockOptions:
    """What writes to the residual stream begins smaller."""
    std = config.initializer_range
    return BlockOptions(
        width=config.hidden_size,
        num_heads=config.num_heads,
        filter_size=config.filter_size,
        nonlinearity=config.nonlinearity,
        dropout_rate=config.dropout_rate,
        attention_dropout_rate=config.attention_dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
        norm_first=True,
        attention_type=config.attention_type,
        use_projection_bias=config.use_projection_bias_in_attention,
        use_ffn_bias_in_attention=config.use_ffn_bias_in_attention,
        use_ffn_bias=config.use_ffn_bias,
        draw=normal(std),
        draw_output=normal(std / math.sqrt(2 * config.num_hidden_layers)),
        dtype=policy,
    )


MODEL = GPT2TFModel

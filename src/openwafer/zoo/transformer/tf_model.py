"""The Transformer in TensorFlow: the network of torch_model.py, under the same names."""

from __future__ import annotations

import math
from typing import Any

from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.attention import future_bias, padding_bias
from openwafer.zoo.tf.blocks import BlockOptions
from openwafer.zoo.tf.decoder import Decoder
from openwafer.zoo.tf.embedding import LanguageHead, TokenEmbedding
from openwafer.zoo.tf.encoder import Encoder
from openwafer.zoo.tf.initializers import normal
from openwafer.zoo.tf.seq2seq import Seq2SeqTFModel
from openwafer.zoo.transformer.torch_model import TransformerConfig

__all__ = ["MODEL", "TransformerTFModel"]


class TransformerTFModel(Seq2SeqTFModel[TransformerConfig]):
    """Embeddings, the two stacks with a final normalization each, and the output layer."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        config.check_shared_embedding()
        super().__init__(config, **options)
        policy, blocks = self.policy, _block_options(config, self.policy)
        self._embedding = _embedding(config, config.num_src_tokens, "embedding", policy)
        self._decoder_embedding = self._embedding
        if not config.share_encoder_decoder_embedding:
            self._decoder_embedding = _embedding(
                config, config.num_tgt_tokens, "decoder_embedding", policy
            )
        self._encoder = Encoder(
            blocks, config.encoder_num_hidden_layers, name="encoder", with_norm=True
        )
        self._decoder = Decoder(
            blocks, config.decoder_num_hidden_layers, name="decoder", attends_to_memory=True
        )
        tied = self._decoder_embedding.word_embeddings
        self._head = LanguageHead(
            config.num_tgt_tokens,
            tied_to=tied if config.share_embedding_weights else None,
            initializer=normal(config.d_model**-0.5),
            use_bias=config.use_bias_in_output,
            dtype=policy,
        )

    def encode(self, token_ids: Any, mask: Any, training: bool) -> Any:
        hidden = self._before(self._embedding(token_ids), training)
        hidden = self._encoder(hidden, bias=padding_bias(mask), training=training)
        return self._after(hidden, training)

    def decode(
        self, token_ids: Any, mask: Any, memory: Any, memory_mask: Any, training: bool
    ) -> Any:
        hidden = self._decoder(
            self._before(self._decoder_embedding(token_ids), training),
            bias=future_bias(token_ids.shape[1]) + padding_bias(mask),
            memory=memory,
            memory_bias=padding_bias(memory_mask),
            training=training,
        )
        return self._head(self._after(hidden, training))

    def _before(self, hidden: Any, training: bool) -> Any:
        config = self.config
        used = config.use_pre_encoder_decoder_dropout
        return dropout(hidden, config.dropout_rate if used else None, training)

    def _after(self, hidden: Any, training: bool) -> Any:
        config = self.config
        used = config.use_dropout_outside_residual_path
        return dropout(hidden, config.dropout_rate if used else None, training)


def _embedding(
    config: TransformerConfig, num_tokens: int, name: str, policy: Any
) -> TokenEmbedding:
    longest = max(config.src_max_sequence_length, config.tgt_max_sequence_length)
    return TokenEmbedding(
        num_tokens,
        config.d_model,
        name=name,
        initializer=normal(config.d_model**-0.5),
        num_positions=config.max_position_embeddings or longest,
        position_type=config.position_embedding_type,
        scale=math.sqrt(config.d_model),
        dtype=policy,
    )


def _block_options(config: TransformerConfig, policy: Any) -> BlockOptions:
    rate = config.relu_dropout_rate
    return BlockOptions(
        width=config.d_model,
        num_heads=config.num_heads,
        filter_size=config.d_ff,
        nonlinearity=config.nonlinearity,
        dropout_rate=config.dropout_rate,
        attention_dropout_rate=config.attention_dropout_rate,
        inner_dropout_rate=config.dropout_rate if rate is None else rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
        norm_first=config.use_pre_encoder_decoder_layer_norm,
        attention_type=config.attention_type,
        use_projection_bias=config.use_projection_bias_in_attention,
        use_ffn_bias_in_attention=config.use_ffn_bias_in_attention,
        use_ffn_bias=config.use_ffn_bias,
        dtype=policy,
    )


MODEL = TransformerTFModel

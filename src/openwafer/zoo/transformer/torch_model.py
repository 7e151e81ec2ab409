"""The Transformer (arXiv:1706.03762): translation by an encoder and a decoder.

Made of the layer API. Token embeddings are scaled by √d_model and get sinusoidal or learned
positions; a layer normalizes after each residual sum, or before each part. With all biases on, the
network is that of torch.nn.Transformer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.errors import ConfigError
from openwafer.layers import (
    EmbeddingLayer,
    FeedForwardNetwork,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    create_autoregressive_mask,
)
from openwafer.zoo.model import SIZE
from openwafer.zoo.seq2seq import Seq2SeqConfig, Seq2SeqModel

__all__ = ["TransformerConfig", "TransformerModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig(Seq2SeqConfig):
    """The `model` section; see Seq2SeqConfig for the keys that T5 has too.

    max_position_embeddings: positions; None for the longer of the two sequence lengths.
    position_embedding_type: `fixed` (sinusoids) or `learned`.
    attention_type: `scaled_dot_product`, or `dot_product` without 1/√(d_model/num_heads).
    use_projection_bias_in_attention, use_ffn_bias_in_attention: biases of the query, key and value
        projections, and of attention's output; use_ffn_bias: of the feed-forward network;
        use_bias_in_output: of the output layer.
    use_pre_encoder_decoder_layer_norm: normalize before attention and network, not after the sums.
    use_dropout_outside_residual_path: dropout on each stack's output too.
    """

    nonlinearity: str = "relu"
    max_position_embeddings: int | None = field(default=None, metadata=SIZE)
    position_embedding_type: Literal["fixed", "learned"] = "fixed"
    attention_type: Literal["scaled_dot_product", "dot_product"] = "scaled_dot_product"
    use_projection_bias_in_attention: bool = False
    use_ffn_bias_in_attention: bool = False
    use_ffn_bias: bool = True
    use_bias_in_output: bool = False
    layer_norm_epsilon: float = field(default=1e-5, metadata=limits(above=0.0))
    use_pre_encoder_decoder_layer_norm: bool = False
    use_dropout_outside_residual_path: bool = False


class TransformerModel(Seq2SeqModel[TransformerConfig]):
    """Embeddings, the two stacks with a final normalization each, and the output layer."""

    def __init__(self, config: TransformerConfig) -> None:
        config.check_shared_embedding()
        if config.d_model % config.num_heads:
            raise ConfigError(
                f"d_model is {config.d_model}, num_heads is {config.num_heads}",
                where="model.num_heads",
                allowed="a divisor of d_model",
            )
        super().__init__(config)
        self.embedding = _embedding(config, config.num_src_tokens)
        self.decoder_embedding = None
        if not config.share_encoder_decoder_embedding:
            self.decoder_embedding = _embedding(config, config.num_tgt_tokens)
        before, after = (
            nn.Dropout(config.dropout_rate if used else 0.0)
            for used in (
                config.use_pre_encoder_decoder_dropout,
                config.use_dropout_outside_residual_path,
            )
        )
        self.dropout_before, self.dropout_after = before, after
        encoder_layer = TransformerEncoderLayer(**_layer_arguments(config))
        encoder_layer.ffn = _feed_forward(config)
        self.encoder = TransformerEncoder(
            encoder_layer, config.encoder_num_hidden_layers, _norm(config)
        )
        decoder_layer = TransformerDecoderLayer(**_layer_arguments(config))
        decoder_layer.ffn = _feed_forward(config)
        self.decoder = TransformerDecoder(
            decoder_layer, config.decoder_num_hidden_layers, _norm(config)
        )
        self.lm_head = nn.Linear(
            config.d_model, config.num_tgt_tokens, bias=config.use_bias_in_output
        )
        if config.share_embedding_weights:
            tied = (self.decoder_embedding or self.embedding).get_input_embeddings()
            assert isinstance(tied, nn.Embedding)
            self.lm_head.weight = tied.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=config.d_model**-0.5)
        if config.use_bias_in_output:
            nn.init.zeros_(self.lm_head.bias)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.dropout_before(self.embedding(input_ids))
        return self.dropout_after(self.encoder(hidden, src_key_padding_mask=attention_mask == 0))

    def decode(
        self,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
        memory: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        embedding = self.decoder_embedding or self.embedding
        length = decoder_input_ids.shape[1]
        hidden = self.decoder(
            self.dropout_before(embedding(decoder_input_ids)),
            memory,
            tgt_mask=create_autoregressive_mask(length, dtype=torch.bool, device=memory.device),
            tgt_key_padding_mask=decoder_attention_mask == 0,
            memory_key_padding_mask=attention_mask == 0,
        )
        return self.lm_head(self.dropout_after(hidden))


class ScaledEmbedding(EmbeddingLayer):
    """√d_model · token + position."""

    def forward(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, past_length: int = 0
    ) -> Tensor:
        """[batch, seq] → [batch, seq, d_model]."""
        tokens = self.word_embeddings(input_ids)
        positions = self._positions(past_length, input_ids.shape[-1], input_ids.device)
        assert positions is not None
        return tokens * math.sqrt(tokens.shape[-1]) + positions


def _embedding(config: TransformerConfig, num_tokens: int) -> ScaledEmbedding:
    longest = max(config.src_max_sequence_length, config.tgt_max_sequence_length)
    std = {"name": "normal", "std": config.d_model**-0.5}
    return ScaledEmbedding(
        num_tokens,
        config.d_model,
        embeddings_initializer=std,
        max_position_embeddings=config.max_position_embeddings or longest,
        position_embedding_type=config.position_embedding_type,
        position_embeddings_initializer=std,
    )


def _layer_arguments(config: TransformerConfig) -> dict[str, Any]:
    return {
        "d_model": config.d_model,
        "nhead": config.num_heads,
        "dim_feedforward": config.d_ff,
        "dropout": config.dropout_rate,
        "attention_dropout_rate": config.attention_dropout_rate,
        "activation": config.nonlinearity,
        "layer_norm_eps": config.layer_norm_epsilon,
        "norm_first": config.use_pre_encoder_decoder_layer_norm,
        "attention_type": config.attention_type,
        "use_projection_bias_in_attention": config.use_projection_bias_in_attention,
        "use_ffn_bias_in_attention": config.use_ffn_bias_in_attention,
        "use_ffn_bias": config.use_ffn_bias,
    }


def _feed_forward(config: TransformerConfig) -> FeedForwardNetwork:
    """With dropout inside too, which the layers' own network has not."""
    rate = config.relu_dropout_rate
    return FeedForwardNetwork(
        config.d_model,
        [config.d_ff, config.d_model],
        layers_activation=[config.nonlinearity, None],
        layers_dropout_rates=[config.dropout_rate if rate is None else rate, config.dropout_rate],
        use_bias=config.use_ffn_bias,
    )


def _norm(config: TransformerConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

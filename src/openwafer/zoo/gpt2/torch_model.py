"""GPT-2: a decoder that predicts the next token (Radford et al. 2019).

Decides the architecture, its initial weights and its loss. Pre-normalization, learned positions,
output weights tied to the token table; the arithmetic is that of Hugging Face's GPT2LMHeadModel.
GPT-3 in zoo/gpt3 is the same network in other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.layers import (
    EmbeddingLayer,
    TransformerDecoder,
    TransformerDecoderLayer,
    create_autoregressive_mask,
)
from openwafer.layers.masks import MASKED_LOGIT
from openwafer.zoo.losses import weighted_token_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ModelConfig, ZooModel

__all__ = ["GPT2", "GPT2Config", "causal_bias", "example_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The `model` section.

    filter_size: features inside a block's feed-forward network.
    share_embedding_weights: the output layer's weight is the token table.
    position_embedding_type: `learned`, or `fixed` sinusoids without weights.
    initializer_range: standard deviation of initial weights; those that write to the residual
        stream begin smaller by √(2 · num_hidden_layers).
    loss_scaling: `num_tokens`: the mean over the tokens that count; `batch_size`: their sum divided
        by the number of sequences, as release 1.6 has it in PyTorch.
    loss_weight: factor of the loss.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("num_hidden_layers",),
        "heads": ("num_heads",),
    }

    vocab_size: int = field(default=50257, metadata=SIZE)
    max_position_embeddings: int = field(default=1024, metadata=SIZE)
    hidden_size: int = field(default=768, metadata=SIZE)
    num_hidden_layers: int = field(default=12, metadata=SIZE)
    num_heads: int = field(default=12, metadata=SIZE)
    filter_size: int = field(default=3072, metadata=SIZE)
    nonlinearity: str = "gelu_new"
    position_embedding_type: Literal["learned", "fixed"] = "learned"
    use_position_embedding: bool = True
    share_embedding_weights: bool = True
    use_bias_in_output: bool = False
    attention_type: Literal["scaled_dot_product", "dot_product"] = "scaled_dot_product"
    use_projection_bias_in_attention: bool = True
    use_ffn_bias_in_attention: bool = True
    use_ffn_bias: bool = True
    dropout_rate: float = field(default=0.1, metadata=RATE)
    embedding_dropout_rate: float | None = field(default=None, metadata=RATE)
    attention_dropout_rate: float = field(default=0.1, metadata=RATE)
    layer_norm_epsilon: float = field(default=1e-5, metadata=limits(above=0.0))
    initializer_range: float = field(default=0.02, metadata=limits(minimum=0.0))
    loss_scaling: Literal["num_tokens", "batch_size"] = "num_tokens"
    loss_weight: float = 1.0


class GPT2(ZooModel[GPT2Config]):
    """input_ids [batch, seq] → logits [batch, seq, vocab_size].

    Sequences are padded on the right, so the causal mask alone keeps padding from the tokens that
    count; `attention_mask` [batch, seq] says which labels these are.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.embedding_layer = EmbeddingLayer(
            config.vocab_size,
            config.hidden_size,
            embeddings_initializer=_as_it_is,
            max_position_embeddings=config.max_position_embeddings,
            position_embedding_type=_positions(config),
            position_embeddings_initializer=_as_it_is,
        )
        rate = config.embedding_dropout_rate
        self.drop_embd = nn.Dropout(config.dropout_rate if rate is None else rate)
        block = TransformerDecoderLayer(
            config.hidden_size,
            config.num_heads,
            dim_feedforward=config.filter_size,
            dropout=config.dropout_rate,
            activation=config.nonlinearity,
            layer_norm_eps=config.layer_norm_epsilon,
            norm_first=True,
            add_cross_attention=False,
            attention_dropout_rate=config.attention_dropout_rate,
            attention_type=config.attention_type,
            use_projection_bias_in_attention=config.use_projection_bias_in_attention,
            use_ffn_bias_in_attention=config.use_ffn_bias_in_attention,
            use_ffn_bias=config.use_ffn_bias,
            attention_initializer=_as_it_is,
            ffn_initializer=_as_it_is,
        )
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.transformer_decoder = TransformerDecoder(block, config.num_hidden_layers, norm)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=config.use_bias_in_output
        )
        if config.share_embedding_weights:
            tokens = self.embedding_layer.get_input_embeddings()
            assert isinstance(tokens, nn.Embedding)
            self.lm_head.weight = tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: normal, biases zero."""
        config = self.config
        to_residual = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif "norm" not in name:
                writes = name.endswith(
                    ("proj_output_dense_layer.weight", "ffn.1.linear_layer.weight")
                )
                nn.init.normal_(weight, std=to_residual if writes else config.initializer_range)

    def logits(self, **batch: Tensor) -> Tensor:
        hidden = self.drop_embd(self.embedding_layer(batch["input_ids"]))
        hidden = self.transformer_decoder(hidden, tgt_mask=causal_bias(hidden))
        return self.lm_head(hidden)

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        assert isinstance(logits, Tensor)
        config = self.config
        return weighted_token_loss(
            logits,
            batch["labels"],
            batch["attention_mask"],
            config.loss_scaling,
            config.loss_weight,
        )

    def example_batch(self, batch_size: int) -> Batch:
        shape = (batch_size, self.config.max_position_embeddings)
        return example_tokens(shape, self.config.vocab_size, self.device)


def causal_bias(hidden: Tensor) -> Tensor:
    """[seq, seq] to be added to attention logits: -1e4 where a key lies in the future."""
    future = create_autoregressive_mask(hidden.shape[1], torch.float32, hidden.device)
    return future * MASKED_LOGIT


def example_tokens(shape: tuple[int, int], vocab_size: int, device: torch.device) -> Batch:
    """A random batch of next-token prediction, [batch, seq], without padding."""

    def tokens() -> Tensor:
        return torch.randint(0, vocab_size, shape, device=device)

    ones = torch.ones(shape, dtype=torch.int64, device=device)
    return {"input_ids": tokens(), "attention_mask": ones, "labels": tokens()}


def _positions(config: GPT2Config) -> str | None:
    return config.position_embedding_type if config.use_position_embedding else None


def _as_it_is(weight: Tensor) -> Tensor:
    """Initial weights are drawn once, in `reset_parameters`."""
    return weight

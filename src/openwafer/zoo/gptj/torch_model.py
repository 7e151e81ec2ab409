"""GPT-J (Wang and Komatsuzaki 2021): next-token prediction with rotary positions.

Decides the architecture and its initial weights. Attention and feed-forward network of a block work
on the same normalized input and are added together; the arithmetic is that of Hugging Face's
GPTJForCausalLM. The loss is GPT-2's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.layers import (
    FeedForwardNetwork,
    MultiheadAttention,
    RotaryPositionEmbeddingHelper,
)
from openwafer.zoo.gpt2.torch_model import causal_bias, example_tokens
from openwafer.zoo.losses import weighted_token_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ModelConfig, ZooModel

__all__ = ["GPTJ", "GPTJConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTJConfig(ModelConfig):
    """The `model` section.

    rotary_dim: features of each head that are rotated, an even number.
    residual_dropout_rate: after attention and after the feed-forward network.
    use_untied_layer_norm: a normalization of its own for the feed-forward network.
    loss_scaling, loss_weight: see GPT2Config.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("num_hidden_layers",),
        "heads": ("num_heads",),
    }

    vocab_size: int = field(default=50400, metadata=SIZE)
    max_position_embeddings: int = field(default=2048, metadata=SIZE)
    hidden_size: int = field(default=4096, metadata=SIZE)
    num_hidden_layers: int = field(default=28, metadata=SIZE)
    num_heads: int = field(default=16, metadata=SIZE)
    filter_size: int = field(default=16384, metadata=SIZE)
    rotary_dim: int = field(default=64, metadata=limits(minimum=2))
    nonlinearity: str = "gelu_new"
    share_embedding_weights: bool = False
    use_bias_in_output: bool = True
    use_projection_bias_in_attention: bool = False
    use_ffn_bias_in_attention: bool = False
    use_ffn_bias: bool = True
    use_untied_layer_norm: bool = False
    embedding_dropout_rate: float = field(default=0.0, metadata=RATE)
    residual_dropout_rate: float = field(default=0.0, metadata=RATE)
    attention_dropout_rate: float = field(default=0.0, metadata=RATE)
    layer_norm_epsilon: float = field(default=1e-5, metadata=limits(above=0.0))
    initializer_range: float = field(default=0.02, metadata=limits(minimum=0.0))
    loss_scaling: Literal["num_tokens", "batch_size"] = "num_tokens"
    loss_weight: float = 1.0


class GPTJBlock(nn.Module):
    """x + attention(norm(x)) + network(norm(x)), [batch, seq, hidden]."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.norm2 = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            if config.use_untied_layer_norm
            else None
        )
        self.self_attn = MultiheadAttention(
            config.hidden_size,
            config.num_heads,
            dropout=config.attention_dropout_rate,
            use_projection_bias=config.use_projection_bias_in_attention,
            use_ffn_bias=config.use_ffn_bias_in_attention,
            attention_initializer=_as_it_is,
        )
        self.dropout1 = nn.Dropout(config.residual_dropout_rate)
        self.ffn = FeedForwardNetwork(
            config.hidden_size,
            [config.filter_size, config.hidden_size],
            layers_activation=[config.nonlinearity, None],
            layers_dropout_rates=[None, config.residual_dropout_rate],
            use_bias=config.use_ffn_bias,
            kernel_initializer=_as_it_is,
        )

    def forward(
        self, hidden: Tensor, mask: Tensor, rotary: RotaryPositionEmbeddingHelper
    ) -> Tensor:
        normed = self.norm1(hidden)
        attended = self.self_attn(
            normed, normed, normed, attn_mask=mask, rotary_position_embedding_helper=rotary
        )
        network = self.ffn(normed if self.norm2 is None else self.norm2(hidden))
        return self.dropout1(attended) + network + hidden


class GPTJ(ZooModel[GPTJConfig]):
    """input_ids [batch, seq] → logits [batch, seq, vocab_size].

    Sequences are padded on the right, as for GPT-2.
    """

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop_embd = nn.Dropout(config.embedding_dropout_rate)
        self.layers = nn.ModuleList(GPTJBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=config.use_bias_in_output
        )
        if config.share_embedding_weights:
            self.lm_head.weight = self.word_embeddings.weight
        self._rotary = RotaryPositionEmbeddingHelper(
            config.max_position_embeddings, config.rotary_dim
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: normal, biases zero."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif "norm" not in name:
                nn.init.normal_(weight, std=self.config.initializer_range)

    def logits(self, **batch: Tensor) -> Tensor:
        hidden = self.drop_embd(self.word_embeddings(batch["input_ids"]))
        mask = causal_bias(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask, self._rotary)
        return self.lm_head(self.norm(hidden))

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


def _as_it_is(weight: Tensor) -> Tensor:
    """Initial weights are drawn once, in `reset_parameters`."""
    return weight

"""Linformer (arXiv:2006.04768): RoBERTa with attention to a fixed number of mixed positions.

Keys and values [seq, head_dim] are multiplied from the left by learned matrices [projected, seq],
so that attention costs seq · projected in place of seq². Padding is zero before it is mixed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.layers import FeedForwardNetwork
from openwafer.layers.initializers import create_initializer
from openwafer.zoo.bert.torch_model import (
    Bert,
    BertConfig,
    initial_linear,
    normal_initializer,
)
from openwafer.zoo.model import SIZE

__all__ = ["Linformer", "LinformerConfig", "LinformerEncoder"]

Style = Literal[
    "linformer", "linformer-shared-heads", "linformer-shared-kv", "linformer-shared-layers"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinformerConfig(BertConfig):
    """The `model` section; only what differs from BERT.

    projected_dims: mixed positions.
    attention_style: which matrices there are: in every layer one for the keys and one for the
        values of each head (`linformer`), for all heads together (`-shared-heads`), one for keys
        and values of all heads (`-shared-kv`), or that one for all layers (`-shared-layers`).
    """

    disable_nsp: bool = True
    use_segment_embedding: bool = False
    projected_dims: int = field(default=256, metadata=SIZE)
    attention_style: Style = "linformer-shared-heads"


class Linformer(Bert):
    """Linformer with its masked-token head."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config, encoder=LinformerEncoder(config))


class LinformerEncoder(nn.Module):
    """A stack of layers, and the matrix that they share where they do."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LinformerLayer(config) for _ in range(config.num_hidden_layers))
        shares_layers = config.attention_style == "linformer-shared-layers"
        self.projection = _projection(config) if shares_layers else None
        self.norm = None
        if config.use_pre_normalization:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        """[batch, seq, hidden] → the same; the mask [batch, seq] is 0 on tokens."""
        is_token = (src_key_padding_mask == 0).to(torch.float32)[..., None]
        for layer in self.layers:
            src = layer(src, is_token, self.projection)
        return src if self.norm is None else self.norm(src)


class LinformerLayer(nn.Module):
    """Self-attention, then a feed-forward network, each with a residual sum; the parameters that a
    BERT layer has too have its names."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.norm_first = config.use_pre_normalization
        self.self_attn = LinformerAttention(config)
        self.ffn = FeedForwardNetwork(
            config.hidden_size,
            [config.filter_size, config.hidden_size],
            layers_activation=[config.encoder_nonlinearity, None],
            layers_dropout_rates=[None, config.dropout_rate],
            use_bias=config.use_ffn_bias,
            kernel_initializer=normal_initializer(config),
        )
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.dropout1 = nn.Dropout(config.dropout_rate)

    def forward(self, hidden: Tensor, is_token: Tensor, shared: Tensor | None) -> Tensor:
        """[batch, seq, hidden] → the same; is_token [batch, seq, 1] is 0 on padding."""
        if self.norm_first:
            hidden = hidden + self._attend(self.norm1(hidden), is_token, shared)
            return hidden + self.ffn(self.norm2(hidden))
        hidden = self.norm1(hidden + self._attend(hidden, is_token, shared))
        return self.norm2(hidden + self.ffn(hidden))

    def _attend(self, hidden: Tensor, is_token: Tensor, shared: Tensor | None) -> Tensor:
        return self.dropout1(self.self_attn(hidden, is_token, shared))


class LinformerAttention(nn.Module):
    """softmax(q (E k)ᵀ / √head_dim) F v: E and F mix the positions of keys and of values."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout_rate = config.attention_dropout_rate
        head_dim = config.hidden_size // config.num_heads
        self.scale = head_dim**-0.5 if config.attention_type == "scaled_dot_product" else 1.0

        def linear(bias: bool) -> nn.Linear:
            return initial_linear(config, config.hidden_size, config.hidden_size, bias)

        self.proj_q_dense_layer = linear(config.use_projection_bias_in_attention)
        self.proj_k_dense_layer = linear(config.use_projection_bias_in_attention)
        self.proj_v_dense_layer = linear(config.use_projection_bias_in_attention)
        self.proj_output_dense_layer = linear(config.use_ffn_bias_in_attention)
        style = config.attention_style
        num_heads = config.num_heads if style == "linformer" else None
        own = style != "linformer-shared-layers"
        self.key_projection = _projection(config, num_heads) if own else None
        self.value_projection = None
        if own and style != "linformer-shared-kv":
            self.value_projection = _projection(config, num_heads)

    def forward(self, hidden: Tensor, is_token: Tensor, shared: Tensor | None) -> Tensor:
        """[batch, seq, hidden] → the same; `shared` [projected, max_seq] serves where this layer
        has no matrix of its own."""
        of_keys = shared if self.key_projection is None else self.key_projection
        of_values = of_keys if self.value_projection is None else self.value_projection
        assert of_keys is not None
        assert of_values is not None
        keys = self.proj_k_dense_layer(hidden) * is_token.to(hidden.dtype)
        values = self.proj_v_dense_layer(hidden) * is_token.to(hidden.dtype)
        length = hidden.shape[1]
        attended = F.scaled_dot_product_attention(
            self._split_heads(self.proj_q_dense_layer(hidden)),
            torch.matmul(of_keys[..., :length], self._split_heads(keys)),
            torch.matmul(of_values[..., :length], self._split_heads(values)),
            dropout_p=self.dropout_rate if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_output_dense_layer(attended.transpose(1, 2).flatten(-2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] → [batch, head, seq, head_dim]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _projection(config: LinformerConfig, num_heads: int | None = None) -> nn.Parameter:
    """[projected, max_seq], or one for each head, [head, projected, max_seq]; normally distributed
    with variance 1 / projected, as the paper's theorem 2 has it."""
    shape = (config.projected_dims, config.max_position_embeddings)
    weight = torch.empty(shape if num_heads is None else (num_heads, *shape))
    create_initializer({"name": "normal", "std": config.projected_dims**-0.5})(weight)
    return nn.Parameter(weight)

"""The transformer's encoder: self-attention and a feed-forward network.

Decides the order of normalization, attention, dropout and residual sums, in one layer and in a
stack.
"""

from __future__ import annotations

import torch
from torch import nn

from openwafer.layers.activations import Activation
from openwafer.layers.arguments import argument_error, check_batch_first, check_probability
from openwafer.layers.attention import MultiheadAttention
from openwafer.layers.feed_forward import FeedForwardNetwork
from openwafer.layers.initializers import InitializerSpec
from openwafer.layers.stack import copies_of

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]


class TransformerEncoderLayer(nn.Module):
    """Self-attention, then a feed-forward network of two layers, each with a residual sum.

    Args:
        d_model: features of input and output.
        nhead: number of attention heads.
        dim_feedforward: features between the two feed-forward layers.
        dropout: rate after attention and after the network's second layer (torch's layer has
            dropout after its first one too).
        activation: between the two layers: a name or a function.
        layer_norm_eps: of both normalizations.
        batch_first: must be True.
        norm_first: normalize before attention and network, not after the sums.
        attention_dropout_rate: rate on the attention weights; None for `dropout`.
        attention_type: see MultiheadAttention.
        use_projection_bias_in_attention, use_ffn_bias_in_attention, use_ffn_bias: biases on the
            query, key and value projections, on attention's output, and in the network.
        attention_initializer, ffn_initializer: initial weights.

    Raises:
        ConfigError: an argument that is not supported.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = "gelu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        device: torch.device | str | None = None,
        attention_dropout_rate: float | None = None,
        attention_type: str = "scaled_dot_product",
        use_projection_bias_in_attention: bool = False,
        use_ffn_bias_in_attention: bool = False,
        use_ffn_bias: bool = False,
        attention_initializer: InitializerSpec = "xavier_uniform",
        ffn_initializer: InitializerSpec = "xavier_uniform",
    ) -> None:
        check_batch_first(batch_first)
        check_probability(dropout=dropout)
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = MultiheadAttention(
            d_model,
            nhead,
            dropout=dropout if attention_dropout_rate is None else attention_dropout_rate,
            use_projection_bias=use_projection_bias_in_attention,
            use_ffn_bias=use_ffn_bias_in_attention,
            attention_initializer=attention_initializer,
            attention_type=attention_type,
            device=device,
        )
        self.ffn = FeedForwardNetwork(
            d_model,
            [dim_feedforward, d_model],
            layers_activation=[activation, None],
            layers_dropout_rates=[None, dropout],
            use_bias=use_ffn_bias,
            kernel_initializer=ffn_initializer,
            device=device,
        )
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, device=device)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, device=device)
        self.dropout1 = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for part in (self.self_attn, self.ffn, self.norm1, self.norm2):
            part.reset_parameters()

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[batch, seq, d_model] → the same; for the masks see MultiheadAttention.forward."""
        if self.norm_first:
            src = src + self._attend(self.norm1(src), src_mask, src_key_padding_mask)
            return src + self.ffn(self.norm2(src))
        src = self.norm1(src + self._attend(src, src_mask, src_key_padding_mask))
        return self.norm2(src + self.ffn(src))

    def _attend(
        self, x: torch.Tensor, mask: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor:
        return self.dropout1(self.self_attn(x, x, x, attn_mask=mask, key_padding_mask=padding))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers.

    Args:
        encoder_layer: copied for each layer, with new weights.
        num_layers: number of copies.
        norm: applied to the last layer's output.
        enable_nested_tensor: must be False.

    Raises:
        ConfigError: nested tensors are asked for, or no layers.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = False,
    ) -> None:
        if enable_nested_tensor:
            raise argument_error(
                "enable_nested_tensor=True is not supported",
                allowed="enable_nested_tensor=False",
                hint="pad the sequences to one length and give src_key_padding_mask",
            )
        super().__init__()
        self.layers = copies_of(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[batch, seq, d_model] → the same; all layers get the same masks."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)

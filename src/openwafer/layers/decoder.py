"""The transformer's decoder: self-attention, attention to an encoder's output, a feed-forward
network.

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
from openwafer.layers.rotary import RotaryPositionEmbeddingHelper
from openwafer.layers.stack import copies_of

__all__ = ["TransformerDecoder", "TransformerDecoderLayer"]


class TransformerDecoderLayer(nn.Module):
    """Self-attention, cross-attention, then a feed-forward network, each with a residual sum.

    Arguments are those of TransformerEncoderLayer, and

    Args:
        add_cross_attention: attend to the encoder's output; False for a decoder alone (GPT).

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
        add_cross_attention: bool = True,
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

        def attention() -> MultiheadAttention:
            return MultiheadAttention(
                d_model,
                nhead,
                dropout=dropout if attention_dropout_rate is None else attention_dropout_rate,
                use_projection_bias=use_projection_bias_in_attention,
                use_ffn_bias=use_ffn_bias_in_attention,
                attention_initializer=attention_initializer,
                attention_type=attention_type,
                device=device,
            )

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, device=device)

        self.norm_first = norm_first
        self.add_cross_attention = add_cross_attention
        self.self_attn = attention()
        self.norm1, self.dropout1 = norm(), nn.Dropout(dropout)
        if add_cross_attention:
            self.multihead_attn = attention()
            self.norm2, self.dropout2 = norm(), nn.Dropout(dropout)
        self.norm3 = norm()
        self.ffn = FeedForwardNetwork(
            d_model,
            [dim_feedforward, d_model],
            layers_activation=[activation, None],
            layers_dropout_rates=[None, dropout],
            use_bias=use_ffn_bias,
            kernel_initializer=ffn_initializer,
            device=device,
        )

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for part in (self.self_attn, self.ffn, self.norm1, self.norm3):
            part.reset_parameters()
        if self.add_cross_attention:
            self.multihead_attn.reset_parameters()
            self.norm2.reset_parameters()

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        rotary_position_embedding_helper: RotaryPositionEmbeddingHelper | None = None,
    ) -> torch.Tensor:
        """One layer; for the masks see MultiheadAttention.forward.

        Args:
            tgt: [batch, seq, d_model].
            memory: the encoder's output, [batch, memory_seq, d_model], for cross-attention.
            tgt_mask, tgt_key_padding_mask: of the self-attention. It is not causal by itself.
            memory_mask, memory_key_padding_mask: of the cross-attention.
            rotary_position_embedding_helper: rotates the self-attention's queries and keys.

        Returns:
            [batch, seq, d_model].

        Raises:
            ConfigError: `memory` is missing, or given to a layer without cross-attention.
        """
        self._check_memory(memory)
        rotary = rotary_position_embedding_helper

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self._self_attend(x, tgt_mask, tgt_key_padding_mask, rotary)

        def attend_to_memory(x: torch.Tensor) -> torch.Tensor:
            return self._cross_attend(x, memory, memory_mask, memory_key_padding_mask)

        if self.norm_first:
            tgt = tgt + attend(self.norm1(tgt))
            if self.add_cross_attention:
                tgt = tgt + attend_to_memory(self.norm2(tgt))
            return tgt + self.ffn(self.norm3(tgt))
        tgt = self.norm1(tgt + attend(tgt))
        if self.add_cross_attention:
            tgt = self.norm2(tgt + attend_to_memory(tgt))
        return self.norm3(tgt + self.ffn(tgt))

    def _self_attend(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        rotary: RotaryPositionEmbeddingHelper | None,
    ) -> torch.Tensor:
        attended = self.self_attn(
            x,
            x,
            x,
            attn_mask=mask,
            key_padding_mask=padding,
            rotary_position_embedding_helper=rotary,
        )
        return self.dropout1(attended)

    def _cross_attend(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None,
        mask: torch.Tensor | None,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        attended = self.multihead_attn(x, memory, memory, attn_mask=mask, key_padding_mask=padding)
        return self.dropout2(attended)

    def _check_memory(self, memory: torch.Tensor | None) -> None:
        if self.add_cross_attention and memory is None:
            raise argument_error(
                "the decoder's cross-attention has no memory to attend to",
                allowed="memory: the encoder's output, [batch, memory_seq, d_model]",
                hint="give memory, or build the layer with add_cross_attention=False",
            )
        if memory is not None and not self.add_cross_attention:
            raise argument_error(
                "memory is given to a decoder layer without cross-attention",
                allowed="memory=None where add_cross_attention=False",
            )


class TransformerDecoder(nn.Module):
    """A stack of decoder layers.

    Args:
        decoder_layer: copied for each layer, with new weights.
        num_layers: number of copies.
        norm: applied to the last layer's output.

    Raises:
        ConfigError: no layers.
    """

    def __init__(
        self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layers = copies_of(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        rotary_position_embedding_helper: RotaryPositionEmbeddingHelper | None = None,
    ) -> torch.Tensor:
        """[batch, seq, d_model] → the same; all layers get the same memory and masks."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory=memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                rotary_position_embedding_helper=rotary_position_embedding_helper,
            )
        return tgt if self.norm is None else self.norm(tgt)

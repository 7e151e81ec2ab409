"""The whole encoder-decoder transformer (arXiv:1706.03762).

Decides how encoder and decoder are joined. Embeddings and the output layer are the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from openwafer.layers.activations import Activation
from openwafer.layers.arguments import argument_error, check_batch_first
from openwafer.layers.decoder import TransformerDecoder, TransformerDecoderLayer
from openwafer.layers.encoder import TransformerEncoder, TransformerEncoderLayer
from openwafer.layers.initializers import InitializerSpec

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """An encoder and a decoder that attends to its output, each with a final normalization.

    Args:
        num_encoder_layers, num_decoder_layers: layers of the two stacks.
        custom_encoder, custom_decoder: used in place of the stack built from the other arguments.
        others: see TransformerEncoderLayer; both stacks get the same.

    Raises:
        ConfigError: an argument that is not supported.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = "gelu",
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        attention_type: str = "scaled_dot_product",
        use_projection_bias_in_attention: bool = False,
        use_ffn_bias_in_attention: bool = False,
        use_ffn_bias: bool = False,
        attention_initializer: InitializerSpec = "xavier_uniform",
        ffn_initializer: InitializerSpec = "xavier_uniform",
        device: torch.device | str | None = None,
    ) -> None:
        check_batch_first(batch_first)
        super().__init__()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first
        shared: dict[str, Any] = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "norm_first": norm_first,
            "attention_type": attention_type,
            "use_projection_bias_in_attention": use_projection_bias_in_attention,
            "use_ffn_bias_in_attention": use_ffn_bias_in_attention,
            "use_ffn_bias": use_ffn_bias,
            "attention_initializer": attention_initializer,
            "ffn_initializer": ffn_initializer,
            "device": device,
        }

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, device=device)

        self.encoder = custom_encoder
        if self.encoder is None:
            encoder_layer = TransformerEncoderLayer(d_model, nhead, **shared)
            self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        self.decoder = custom_decoder
        if self.decoder is None:
            decoder_layer = TransformerDecoderLayer(d_model, nhead, **shared)
            self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())

    def forward(
        self,
        src: torch.Tensor,
        tgt: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode `src`, then decode `tgt`; for the masks see MultiheadAttention.forward.

        Args:
            src: [batch, src_seq, d_model].
            tgt: [batch, tgt_seq, d_model].
            src_mask: [src_seq, src_seq], `tgt_mask`: [tgt_seq, tgt_seq],
                `memory_mask`: [tgt_seq, src_seq].
            src_key_padding_mask, memory_key_padding_mask: [batch, src_seq],
                `tgt_key_padding_mask`: [batch, tgt_seq].

        Returns:
            [batch, tgt_seq, d_model].

        Raises:
            ConfigError: shapes that do not fit.
        """
        same_batch = src.dim() == tgt.dim() == 3 and src.shape[0] == tgt.shape[0]
        if not same_batch or not src.shape[-1] == tgt.shape[-1] == self.d_model:
            raise argument_error(
                f"src has shape {list(src.shape)}, tgt {list(tgt.shape)}",
                allowed=f"[batch, seq, {self.d_model}] with one batch size",
            )
        assert self.encoder is not None
        assert self.decoder is not None
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )

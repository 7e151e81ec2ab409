"""The layer API: building blocks of transformers, as ordinary torch.nn modules.

Names, arguments and defaults are those of release 1.6's PyTorch layers. A model built from them
runs in plain PyTorch and in both execution modes. Names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openwafer.lazy import lazy_names

if TYPE_CHECKING:
    from openwafer.layers.activations import get_activation
    from openwafer.layers.attention import AttentionLayer, MultiheadAttention
    from openwafer.layers.decoder import TransformerDecoder, TransformerDecoderLayer
    from openwafer.layers.embedding import EmbeddingLayer
    from openwafer.layers.encoder import TransformerEncoder, TransformerEncoderLayer
    from openwafer.layers.feed_forward import FeedForwardNetwork, SingleFeedForwardLayer
    from openwafer.layers.initializers import create_initializer
    from openwafer.layers.losses import GPTLMHeadModelLoss, smooth_loss
    from openwafer.layers.masks import create_autoregressive_mask
    from openwafer.layers.relative_position import RelativePositionEmbeddingLayer
    from openwafer.layers.rotary import RotaryPositionEmbeddingHelper
    from openwafer.layers.transformer import Transformer

__all__ = [
    "AttentionLayer",
    "EmbeddingLayer",
    "FeedForwardNetwork",
    "GPTLMHeadModelLoss",
    "MultiheadAttention",
    "RelativePositionEmbeddingLayer",
    "RotaryPositionEmbeddingHelper",
    "SingleFeedForwardLayer",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "create_autoregressive_mask",
    "create_initializer",
    "get_activation",
    "smooth_loss",
]

_HOMES = {
    "AttentionLayer": ".attention",
    "EmbeddingLayer": ".embedding",
    "FeedForwardNetwork": ".feed_forward",
    "GPTLMHeadModelLoss": ".losses",
    "MultiheadAttention": ".attention",
    "RelativePositionEmbeddingLayer": ".relative_position",
    "RotaryPositionEmbeddingHelper": ".rotary",
    "SingleFeedForwardLayer": ".feed_forward",
    "Transformer": ".transformer",
    "TransformerDecoder": ".decoder",
    "TransformerDecoderLayer": ".decoder",
    "TransformerEncoder": ".encoder",
    "TransformerEncoderLayer": ".encoder",
    "create_autoregressive_mask": ".masks",
    "create_initializer": ".initializers",
    "get_activation": ".activations",
    "smooth_loss": ".losses",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

"""Relative position bias, as in T5 (arXiv:1910.10683).

Decides which distance falls into which bucket, and looks the buckets' biases up. Attention adds
them to its logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from openwafer.layers.arguments import argument_error, check_positive
from openwafer.layers.initializers import InitializerSpec, create_initializer

__all__ = ["RelativePositionEmbeddingLayer", "distance_buckets"]

_MAX_DISTANCE = 128
"""Distances from here on share a bucket (T5)."""


class RelativePositionEmbeddingLayer(nn.Module):
    """A learned bias for each head and each bucket of distances between query and key.

    Args:
        num_heads: number of attention heads.
        relative_attention_bias: use this table, [bucket, head], instead of a new one: an
            nn.Embedding (shared as it is) or a tensor (a parameter is shared).
        num_relative_attention_buckets: rows of a new table.
        bidirectional_relative_attention: half of the buckets are for keys after the query; if
            False, all such keys count as distance 0.
        relative_attn_bias_initializer: initial values of a new table.

    Raises:
        ConfigError: a table of another shape, or a number of buckets that cannot be used.
    """

    def __init__(
        self,
        num_heads: int,
        relative_attention_bias: nn.Embedding | torch.Tensor | None = None,
        num_relative_attention_buckets: int = 32,
        bidirectional_relative_attention: bool = False,
        relative_attn_bias_initializer: InitializerSpec = "xavier_uniform",
    ) -> None:
        check_positive(
            num_heads=num_heads, num_relative_attention_buckets=num_relative_attention_buckets
        )
        _check_buckets(num_relative_attention_buckets, bidirectional_relative_attention)
        super().__init__()
        self.num_relative_attention_buckets = num_relative_attention_buckets
        self.bidirectional_relative_attention = bidirectional_relative_attention
        self._initializer = create_initializer(relative_attn_bias_initializer)
        shape = (num_relative_attention_buckets, num_heads)
        if relative_attention_bias is None:
            self.relative_attention_bias = nn.Embedding(*shape)
            self.reset_parameters()
        else:
            self.relative_attention_bias = _as_table(relative_attention_bias, shape)

    def reset_parameters(self) -> None:
        """Draw a new table."""
        self._initializer(self.relative_attention_bias.weight.data)

    def forward(self, seq_length: int, key_length: int, past_kv: Any = None) -> torch.Tensor:
        """The bias [1, head, seq_length, key_length].

        Args:
            seq_length: number of queries.
            key_length: number of keys, cached ones included.
            past_kv: anything but None says that the queries are the last `seq_length` of the
                `key_length` positions; otherwise both begin at position 0.
        """
        device = self.relative_attention_bias.weight.device
        first = 0 if past_kv is None else key_length - seq_length
        queries = torch.arange(first, first + seq_length, device=device)
        keys = torch.arange(key_length, device=device)
        buckets = distance_buckets(
            keys[None, :] - queries[:, None],
            self.num_relative_attention_buckets,
            bidirectional=self.bidirectional_relative_attention,
        )
        return self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)


def distance_buckets(
    key_minus_query: torch.Tensor, num_buckets: int, *, bidirectional: bool
) -> torch.Tensor:
    """The bucket of each distance, int64 in [0, num_buckets).

    One half of the buckets holds one distance each; the other half grows geometrically up to
    _MAX_DISTANCE. `bidirectional`: a half of all is for keys after the query.
    """
    if bidirectional:
        num_buckets //= 2
        offset = (key_minus_query > 0).to(torch.int64) * num_buckets
        distance = key_minus_query.abs()
    else:
        offset = None
        distance = (-key_minus_query).clamp(min=0)
    num_exact = num_buckets // 2
    # float32 and this order of operations, as pretrained models were made with.
    growth = torch.log(distance.clamp(min=num_exact).to(torch.float32) / num_exact)
    share = growth / math.log(_MAX_DISTANCE / num_exact)
    far = num_exact + (share * (num_buckets - num_exact)).to(torch.int64)
    bucket = torch.where(distance < num_exact, distance, far.clamp(max=num_buckets - 1))
    return bucket if offset is None else bucket + offset


def _check_buckets(num_buckets: int, bidirectional: bool) -> None:
    directions = 2 if bidirectional else 1
    num_exact = num_buckets // directions // 2
    if num_buckets % directions or not 1 <= num_exact < _MAX_DISTANCE:
        raise argument_error(
            f"num_relative_attention_buckets is {num_buckets}",
            allowed=f"{2 * directions} to {2 * directions * _MAX_DISTANCE - directions}"
            + (", an even number" if bidirectional else ""),
        )


def _as_table(given: nn.Embedding | torch.Tensor, shape: tuple[int, int]) -> nn.Embedding:
    weight = given.weight if isinstance(given, nn.Embedding) else given
    if tuple(weight.shape) != shape:
        raise argument_error(
            f"relative_attention_bias has shape {list(weight.shape)}",
            allowed=f"[bucket, head], here {list(shape)}",
        )
    if isinstance(given, nn.Embedding):
        return given
    table = nn.Embedding(*shape, device="meta")
    table.weight = given if isinstance(given, nn.Parameter) else nn.Parameter(given)
    return table

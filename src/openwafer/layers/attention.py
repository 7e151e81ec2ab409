"""Multi-head attention.

Decides the projections, the scaling and what is cached; masks are read in masks.py, rotation is in
rotary.py. The product itself is torch's scaled_dot_product_attention, which compilers know, except
where the attention weights are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from openwafer.errors import nearest
from openwafer.layers.arguments import (
    argument_error,
    check_batch_first,
    check_positive,
    check_probability,
)
from openwafer.layers.initializers import InitializerSpec, create_initializer
from openwafer.layers.masks import AttentionShape, attention_bias
from openwafer.layers.rotary import RotaryPositionEmbeddingHelper

__all__ = ["AttentionLayer", "MultiheadAttention"]

_ATTENTION_TYPES = ("dot_product", "scaled_dot_product")


class MultiheadAttention(nn.Module):
    """Attention with several heads, softmax(q kᵀ / √head_dim + masks) v, with its projections.

    Args:
        embed_dim: features of inputs and outputs.
        num_heads: a divisor of `embed_dim`.
        dropout: rate on the attention weights.
        batch_first: must be True.
        add_bias_kv, add_zero_attn: must be False.
        kdim, vdim: must be None: keys and values have `embed_dim` features.
        use_projection_bias: biases on the query, key and value projections.
        use_ffn_bias: a bias on the output projection.
        attention_initializer: of all four projections; biases begin at zero.
        output_layer_initializer: of the output projection, where it is another.
        attention_type: `scaled_dot_product`, or `dot_product` without the 1/√head_dim.

    Raises:
        ConfigError: an argument that is not supported.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        use_projection_bias: bool | None = None,
        use_ffn_bias: bool = False,
        attention_initializer: InitializerSpec = "xavier_uniform",
        output_layer_initializer: InitializerSpec | None = None,
        attention_type: str = "scaled_dot_product",
        device: torch.device | str | None = None,
    ) -> None:
        _check_attention_type(attention_type)
        _check_heads(embed_dim, num_heads)
        check_batch_first(batch_first)
        check_probability(dropout=dropout)
        _check_unset(add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, kdim=kdim, vdim=vdim)
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.attention_type = attention_type

        def projection(use_bias: bool) -> nn.Linear:
            return nn.Linear(embed_dim, embed_dim, bias=use_bias, device=device)

        self.proj_q_dense_layer = projection(bool(use_projection_bias))
        self.proj_k_dense_layer = projection(bool(use_projection_bias))
        self.proj_v_dense_layer = projection(bool(use_projection_bias))
        self.dropout_layer = nn.Dropout(dropout)
        self.proj_output_dense_layer = projection(use_ffn_bias)
        self._initializer = create_initializer(attention_initializer)
        self._output_initializer = (
            self._initializer
            if output_layer_initializer is None
            else create_initializer(output_layer_initializer)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        inputs = (self.proj_q_dense_layer, self.proj_k_dense_layer, self.proj_v_dense_layer)
        for layer in inputs:
            self._initializer(layer.weight.data)
        self._output_initializer(self.proj_output_dense_layer.weight.data)
        for layer in (*inputs, self.proj_output_dense_layer):
            if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        past_kv: torch.Tensor | Sequence[torch.Tensor] | None = None,
        cache_present_kv: bool = False,
        position_bias: torch.Tensor | None = None,
        rotary_position_embedding_helper: RotaryPositionEmbeddingHelper | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Attend from `q` to `k` and `v`.

        Args:
            q: [batch, query, embed_dim].
            k, v: [batch, key, embed_dim].
            attn_mask: [query, key], [batch, query, key], [batch * head, query, key] or
                [batch, head, query, key]. Floating point: added to the logits. Boolean or integer:
                True (not zero) forbids.
            key_padding_mask: [batch, key], for keys that nobody may attend to; the same two kinds.
            need_weights: give the attention weights too, [batch, query, key].
            average_attn_weights: if False, give them for each head, [batch, head, query, key].
            past_kv: keys and values of earlier positions, [2, batch, head, past, head_dim] or a
                pair; `k` and `v` come after them, and so do the positions of `q`.
            cache_present_kv: give the keys and values too, cached ones included, for use as the
                next call's `past_kv`: [2, batch, head, past + key, head_dim].
            position_bias: [head, query, key] or [1 or batch, head, query, key]; added to the
                logits.
            rotary_position_embedding_helper: rotates queries and keys; not with `position_bias`.

        Returns:
            The output [batch, query, embed_dim]; then, if asked for, the weights; then the cache.

        Raises:
            ConfigError: shapes that do not fit, or two position schemes at once.
        """
        self._check_inputs(q, k, v, past_kv)
        if position_bias is not None and rotary_position_embedding_helper is not None:
            raise argument_error(
                "both a position_bias and a rotary_position_embedding_helper are given",
                allowed="one position scheme",
            )
        query, key, value = self._project(q, k, v, past_kv, rotary_position_embedding_helper)
        # In 32 bits at least, so that a sum with 16-bit logits is the same however autocast is run.
        bias_dtype = torch.promote_types(query.dtype, torch.float32)
        shape = AttentionShape(
            batch=q.shape[0],
            num_heads=self.num_heads,
            query_length=q.shape[1],
            key_length=key.shape[2],
            past_length=key.shape[2] - k.shape[1],
        )
        bias = attention_bias(attn_mask, key_padding_mask, position_bias, shape, bias_dtype)
        extras: list[torch.Tensor] = []
        if need_weights:
            attended, weights = self._attend_with_weights(query, key, value, bias)
            extras.append(weights.mean(dim=1) if average_attn_weights else weights)
        else:
            attended = self._attend(query, key, value, bias)
        if cache_present_kv:
            extras.append(torch.stack([key, value]))
        output = self.proj_output_dense_layer(attended.transpose(1, 2).flatten(-2))
        return (output, *extras) if extras else output

    def _project(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_kv: torch.Tensor | Sequence[torch.Tensor] | None,
        rotary: RotaryPositionEmbeddingHelper | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [batch, head, seq, head_dim], the cached ones in front."""
        query = self._split_heads(self.proj_q_dense_layer(q))
        key = self._split_heads(self.proj_k_dense_layer(k))
        value = self._split_heads(self.proj_v_dense_layer(v))
        past_length = 0 if past_kv is None else past_kv[0].shape[-2]
        if rotary is not None:
            query = rotary.rotate_tensor(query, past_length + q.shape[1], offset=past_length)
            key = rotary.rotate_tensor(key, past_length + k.shape[1], offset=past_length)
        if past_kv is not None:
            key = torch.cat([past_kv[0].to(key), key], dim=-2)
            value = torch.cat([past_kv[1].to(value), value], dim=-2)
        return query, key, value

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """[batch, head, query, head_dim]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if bias is None else bias.to(query.dtype),
            dropout_p=self.dropout_layer.p if self.training else 0.0,
            scale=self._scale,
        )

    def _attend_with_weights(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same step by step, with the weights [batch, head, query, key], after dropout."""
        logits = torch.matmul(query * self._scale, key.transpose(-1, -2))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if bias is not None:
            logits = logits + bias
        weights = self.dropout_layer(torch.softmax(logits, dim=-1).to(value.dtype))
        return torch.matmul(weights, value), weights

    @property
    def _scale(self) -> float:
        head_dim = self.embed_dim // self.num_heads
        return head_dim**-0.5 if self.attention_type == "scaled_dot_product" else 1.0

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, embed_dim] → [batch, head, seq, head_dim]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _check_inputs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_kv: torch.Tensor | Sequence[torch.Tensor] | None,
    ) -> None:
        shapes = [list(x.shape) for x in (q, k, v)]
        same = all(len(s) == 3 and [s[0], s[2]] == [q.shape[0], self.embed_dim] for s in shapes)
        if not same or shapes[1] != shapes[2]:
            raise argument_error(
                f"q, k and v have the shapes {', '.join(map(str, shapes))}",
                allowed=f"[batch, seq, {self.embed_dim}], one batch size, k and v alike",
            )
        if past_kv is None:
            return
        past_shapes = [list(x.shape) for x in past_kv]
        past_length = past_shapes[0][-2] if past_shapes and len(past_shapes[0]) > 1 else 0
        head_dim = self.embed_dim // self.num_heads
        if past_shapes != [[q.shape[0], self.num_heads, past_length, head_dim]] * 2:
            raise argument_error(
                f"past_kv has the shapes {', '.join(map(str, past_shapes))}",
                allowed=f"keys and values, [{q.shape[0]}, {self.num_heads}, past, {head_dim}] each",
            )


AttentionLayer = MultiheadAttention
"""The name in the release notes."""


def _check_attention_type(attention_type: str) -> None:
    if attention_type not in _ATTENTION_TYPES:
        raise argument_error(
            f"attention_type is {attention_type!r}",
            allowed=", ".join(_ATTENTION_TYPES),
            hint=nearest(str(attention_type), _ATTENTION_TYPES),
        )


def _check_heads(embed_dim: int, num_heads: int) -> None:
    check_positive(embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise argument_error(
            f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}",
            allowed="heads of equal size",
        )


def _check_unset(**unsupported: object) -> None:
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise argument_error(
                f"{name}={value!r} is not supported",
                allowed=f"{name}={'None' if name.endswith('dim') else 'False'}",
            )

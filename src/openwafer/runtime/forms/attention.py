"""Attention as batched matrix products, a block of queries at a time.

Decides this form of scaled_dot_product_attention and its gradient: for each block of queries the
products with those keys that it may see, so that a causal mask saves the other half of the work.
Logits, softmax and their gradients stay in fp32 within a block; where the layer is compiled they
are fused, which is what makes this form fast on a CPU. Does not decide when it is used (forms.py).

Only logsumexp is kept between the passes, [batch * head, query, 1] in fp32, as a flash kernel does.
Products give their own dtype: in 16 bits a logit is rounded as autocast's own products are, and
attention weights are summed as they are multiplied, rounded, so that they are not kept twice.

What the blocks take of query, key and value is made contiguous: torch's products copy operands that
are not, each time and element by element where they are transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["AttentionShape", "attend_in_blocks"]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is fixed about an attention when it is compiled.

    block: queries at a time.
    causal: query i sees the keys up to i alone; there are as many keys as queries.
    keep: the probability that dropout keeps an attention weight.
    """

    scale: float
    block: int
    causal: bool
    keep: float = 1.0


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor | None,
    shape: AttentionShape,
) -> torch.Tensor:
    """softmax(q kᵀ · scale + bias) v.

    Args:
        query: [batch, head, query, features].
        key, value: [batch, head, key, features].
        bias: added to the logits; broadcasts to [batch, head, query, key]; gets no gradient.
        kept: [batch, head, query, key], bool: the attention weights that dropout keeps.

    Returns:
        [batch, head, query, features], laid out as [batch, query, head, features].
    """
    return _Blocks.apply(query, key, value, bias, kept, shape)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        kept: torch.Tensor | None,
        shape: AttentionShape,
    ) -> torch.Tensor:
        q, k, v = (_merged(t) for t in (query, key, value))
        hidden = _hidden(key, shape)
        results: list[torch.Tensor] = []
        logsumexps: list[torch.Tensor] = []
        for rows in _blocks(query.shape[2], shape.block):
            place = (rows, _visible(rows, key.shape[2], shape))
            keys, values = (_part(t, place[1]) for t in (k, v))
            logits = _logits(_part(q, rows), keys, hidden, bias, place, query.shape, shape)
            top = logits.amax(-1, keepdim=True)
            if bias is not None:  # a row with nothing to see
                top = torch.where(top == float("-inf"), 0.0, top)
            weights = torch.exp(logits - top).to(q.dtype)
            total = weights.to(top.dtype).sum(-1, keepdim=True)
            if bias is not None:
                total = torch.where(total == 0.0, 1.0, total)
            summed = torch.bmm(_dropped(weights, kept, place, shape), values)
            results.append((summed.to(total.dtype) / total).to(q.dtype))
            logsumexps.append(top + total.log())
        result = torch.cat(results, 1)
        logsumexp = torch.cat(logsumexps, 1)
        ctx.save_for_backward(query, key, value, bias, kept, result, logsumexp)
        ctx.shape = shape
        return result.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, bias, kept, result, logsumexp = ctx.saved_tensors
        shape: AttentionShape = ctx.shape
        q, k, v, g = (_merged(t) for t in (query, key, value, grads[0]))
        wide = logsumexp.dtype
        inner = (g.to(wide) * result.to(wide)).sum(-1, keepdim=True)
        hidden = _hidden(key, shape)
        grad_query: list[torch.Tensor] = []
        grad_key = _Pieces()
        grad_value = _Pieces()
        for rows in _blocks(query.shape[2], shape.block):
            place = (rows, _visible(rows, key.shape[2], shape))
            queries, grads_out = (_part(t, rows) for t in (q, g))
            keys, values = (_part(t, place[1]) for t in (k, v))
            logits = _logits(queries, keys, hidden, bias, place, query.shape, shape)
            weights = torch.exp(logits - logsumexp[:, rows])
            grad_weights = torch.bmm(grads_out, values.transpose(1, 2)).to(wide)
            grad_weights = _dropped(grad_weights, kept, place, shape)
            grad_logits = (weights * (grad_weights - inner[:, rows]) * shape.scale).to(q.dtype)
            dropped = _dropped(weights, kept, place, shape).to(q.dtype)
            grad_query.append(torch.bmm(grad_logits, keys))
            grad_key.add(torch.bmm(grad_logits.transpose(1, 2), queries), shape.block)
            grad_value.add(torch.bmm(dropped.transpose(1, 2), grads_out), shape.block)
        return (
            torch.cat(grad_query, 1).view(query.shape),
            grad_key.joined(q.dtype).view(key.shape),
            grad_value.joined(q.dtype).view(value.shape),
            None,
            None,
            None,
        )


class _Pieces:
    """A sum over blocks of queries, kept in fp32 by blocks of keys."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []

    def add(self, part: torch.Tensor, block: int) -> None:
        wide = torch.promote_types(part.dtype, torch.float32)
        for index, rows in enumerate(_blocks(part.shape[1], block)):
            piece = part[:, rows].to(wide)
            if index < len(self._pieces):
                self._pieces[index] = self._pieces[index] + piece
            else:
                self._pieces.append(piece)

    def joined(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat(self._pieces, 1).to(dtype)


def _merged(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, head, ...] → [batch * head, ...]."""
    return tensor.reshape(-1, *tensor.shape[2:])


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _visible(rows: slice, num_keys: int, shape: AttentionShape) -> slice:
    return slice(0, rows.stop if shape.causal else num_keys)


def _part(tensor: torch.Tensor, positions: slice) -> torch.Tensor:
    return tensor[:, positions].contiguous()


def _hidden(key: torch.Tensor, shape: AttentionShape) -> torch.Tensor | None:
    """What a causal mask adds to the logits of the last block of queries, [block, key]: 0 up to a
    query's own position, -inf after it. Blocks before it take it from further right.

    It is a running sum because torch's compiler keeps a sum in memory. Positions that are compared
    it works out anew for every element, which took as long as the exponential function.
    """
    if not shape.causal:
        return None
    num_keys = -(-key.shape[2] // shape.block) * shape.block
    first = torch.arange(num_keys - shape.block + 1, num_keys + 1, device=key.device)[:, None]
    here = torch.arange(num_keys, device=key.device)[None, :] == first
    wide = torch.promote_types(key.dtype, torch.float32)
    return torch.where(here, float("-inf"), 0.0).to(wide).cumsum(1)


def _logits(
    queries: torch.Tensor,
    keys: torch.Tensor,
    hidden: torch.Tensor | None,
    bias: torch.Tensor | None,
    place: tuple[slice, slice],
    sizes: torch.Size,
    shape: AttentionShape,
) -> torch.Tensor:
    """[batch * head, rows, columns] in fp32 (fp64 for fp64), masked.

    Args:
        queries, keys: of this block, [batch * head, rows or columns, feature].
        hidden: `_hidden`'s, for all blocks.
        bias: for all queries and keys.
    """
    rows, columns = place
    product = torch.bmm(queries, keys.transpose(1, 2))
    logits = product.to(torch.promote_types(product.dtype, torch.float32)) * shape.scale
    if hidden is not None:
        first = hidden.shape[1] - shape.block - rows.start
        logits = logits + hidden[: rows.stop - rows.start, first : first + columns.stop]
    if bias is not None:
        part = bias[..., rows if bias.shape[-2] > 1 else slice(0, 1), :]
        logits = _merged(logits.view(*sizes[:2], *logits.shape[1:]) + part)
    return logits


def _dropped(
    weights: torch.Tensor,
    kept: torch.Tensor | None,
    place: tuple[slice, slice],
    shape: AttentionShape,
) -> torch.Tensor:
    if kept is None:
        return weights
    wide = torch.promote_types(weights.dtype, torch.float32)
    scaled = _merged(kept[:, :, place[0], place[1]]).to(wide) / shape.keep
    return (weights.to(wide) * scaled).to(weights.dtype)

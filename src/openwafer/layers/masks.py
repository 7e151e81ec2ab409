"""Attention masks as one additive bias.

Decides how the three kinds of mask are read and combined:

- a floating-point mask is added to the attention logits;
- a boolean or integer mask adds -1e4 where it is True (not zero);
- a key padding mask, of either kind, does the same for keys, whatever the query.

-1e4 in place of minus infinity is the convention of release 1.6: it fits 16-bit floats, its softmax
is exactly 0 in 32 bits beside any allowed key, and a query whose keys are all masked stays finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openwafer.layers.arguments import argument_error, check_positive

__all__ = ["MASKED_LOGIT", "AttentionShape", "attention_bias", "create_autoregressive_mask"]

MASKED_LOGIT = -1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The sizes that masks must fit. `key_length` counts the `past_length` cached keys too."""

    batch: int
    num_heads: int
    query_length: int
    key_length: int
    past_length: int = 0


def create_autoregressive_mask(
    max_sequence_length: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """A [seq, seq] matrix of ones above the diagonal: 1 (True) where a key lies in the future.

    As an `attn_mask` take it with `dtype=torch.bool`, or multiply the floating-point form by -1e4.
    """
    check_positive(max_sequence_length=max_sequence_length)
    positions = torch.arange(max_sequence_length, device=device)
    return (positions[None, :] > positions[:, None]).to(dtype)


def attention_bias(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    shape: AttentionShape,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The sum of all that is added to the logits, for broadcasting to [batch, head, query, key].

    Args:
        attn_mask: [query, key], [batch, query, key], [batch * head, query, key] or
            [batch, head, query, key]; the query dimension may be 1.
        key_padding_mask: [batch, key].
        position_bias: [head, query, key] or [1 or batch, head, query, key].
        dtype: of the result.

    A mask that covers the new keys alone leaves the cached ones before them unmasked.

    Raises:
        ConfigError: a mask of another shape.
    """
    terms: list[torch.Tensor] = []
    if attn_mask is not None:
        terms.append(_additive(_over_heads(_over_past(attn_mask, shape), shape), dtype))
    if key_padding_mask is not None:
        padding = _over_past(key_padding_mask, shape)
        _require(
            tuple(padding.shape) == (shape.batch, shape.key_length),
            "key_padding_mask",
            key_padding_mask,
            f"[batch, key], here [{shape.batch}, {shape.key_length}]",
        )
        terms.append(_additive(padding[:, None, None, :], dtype))
    if position_bias is not None:
        bias = position_bias if position_bias.dim() == 4 else position_bias[None]
        _require(_fits(bias, shape), "position_bias", position_bias, _expected(shape, "[head, "))
        terms.append(bias.to(dtype))
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _over_past(mask: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """The mask with zeros in front for cached keys, where it has none for them."""
    new_keys = shape.key_length - shape.past_length
    if not shape.past_length or mask.dim() == 0 or mask.shape[-1] != new_keys:
        return mask
    past = mask.new_zeros((*mask.shape[:-1], shape.past_length))
    return torch.cat([past, mask], dim=-1)


def _over_heads(mask: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """The mask with four dimensions."""
    spread = mask
    if mask.dim() == 2:
        spread = mask[None, None]
    elif mask.dim() == 3 and mask.shape[0] in (1, shape.batch):
        spread = mask[:, None]
    elif mask.dim() == 3 and mask.shape[0] == shape.batch * shape.num_heads:
        spread = mask.reshape(shape.batch, shape.num_heads, *mask.shape[1:])
    _require(_fits(spread, shape), "attn_mask", mask, _expected(shape, "["))
    return spread


def _fits(bias: torch.Tensor, shape: AttentionShape) -> bool:
    wanted = (shape.batch, shape.num_heads, shape.query_length)
    return (
        bias.dim() == 4
        and bias.shape[-1] == shape.key_length
        and all(size in (1, full) for size, full in zip(bias.shape, wanted, strict=False))
    )


def _expected(shape: AttentionShape, start: str) -> str:
    return (
        f"{start}query, key], alone or after a batch dimension, or [batch, head, query, key]; here "
        f"batch {shape.batch}, {shape.num_heads} heads, {shape.query_length} queries, "
        f"{shape.key_length} keys"
    )


def _require(condition: bool, name: str, mask: torch.Tensor, allowed: str) -> None:
    if condition:
        return
    hint = "a mask of shape [batch, key] is a key_padding_mask" if name == "attn_mask" else ""
    raise argument_error(f"{name} has shape {list(mask.shape)}", allowed=allowed, hint=hint)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return mask.to(torch.bool).to(dtype) * MASKED_LOGIT

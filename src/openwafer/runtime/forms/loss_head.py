"""The cross entropy of a linear layer's outputs, a block of classes at a time.

Decides how logits are turned into losses and gradients. The logits of a block are reduced while
they are in the cache; they stay in the dtype of the product, and only they and one number per row
are kept for the backward pass, where the gradient of no more than one block exists at a time. Eager
PyTorch under mixed precision holds the logits, their fp32 copy, its logarithmic softmax and its
gradient: 400 KB for each token of a vocabulary of 50,257, besides the logits.
Does not decide which part of a model is such a head (forms.py).
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["linear_cross_entropy"]

_BLOCK_LOGITS = 1 << 24
"""Logits at a time: 32 MiB in 16 bits. Matrix products of that size reach the rate of large square
ones on the CPUs measured, while those over a whole vocabulary stay a quarter below it."""

_LEAST_CLASSES = 1024


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    reduction: int,
    ignore_index: int,
) -> torch.Tensor:
    """What F.cross_entropy(F.linear(hidden, weight, bias).float(), labels) gives.

    Args:
        hidden: [row, feature].
        weight, bias: [class, feature], [class].
        labels: [row], int64.
        reduction: 0 none, 1 mean over the rows that count, 2 sum, as in ATen.
        ignore_index: the label of rows that do not count.
    """
    block = max(_LEAST_CLASSES, _BLOCK_LOGITS // max(1, hidden.shape[0]) // 64 * 64)
    losses: torch.Tensor = _Losses.apply(hidden, weight, bias, labels, ignore_index, block)
    if reduction == 0:
        return losses
    total = losses.sum()
    return total / (labels != ignore_index).sum().to(total.dtype) if reduction == 1 else total


class _Losses(torch.autograd.Function):
    """Cross entropy of each row, in fp32 (fp64 for fp64); 0 for rows that are ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
        block: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        column = labels[:, None]
        blocks: list[torch.Tensor] = []
        top = hidden.new_full((hidden.shape[0], 1), float("-inf"), dtype=wide)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)
        for classes in _blocks(weight.shape[0], block):
            part = None if bias is None else bias[classes]
            logits = torch.nn.functional.linear(hidden, weight[classes], part)
            blocks.append(logits)
            raised = torch.maximum(top, logits.to(wide).amax(1, keepdim=True))
            summed = torch.exp(logits.to(wide) - raised).sum(1, keepdim=True)
            total = total * torch.exp(top - raised) + summed
            top = raised
            here = (column >= classes.start) & (column < classes.stop)
            index = torch.where(here, column - classes.start, 0)
            picked = torch.where(here, torch.gather(logits, 1, index).to(wide), picked)
        logsumexp = top + total.log()
        ctx.save_for_backward(hidden, weight, bias, labels, logsumexp, *blocks)
        ctx.ignore_index, ctx.block = ignore_index, block
        return torch.where(labels != ignore_index, (logsumexp - picked).squeeze(1), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, labels, logsumexp, *blocks = ctx.saved_tensors
        scale = torch.where(labels != ctx.ignore_index, grads[0], 0.0)[:, None]
        grad_hidden = torch.zeros_like(hidden, dtype=logsumexp.dtype)
        grad_weight: list[torch.Tensor] = []
        grad_bias: list[torch.Tensor] = []
        for classes, logits in zip(_blocks(weight.shape[0], ctx.block), blocks, strict=True):
            chances = torch.exp(logits.to(logsumexp.dtype) - logsumexp)
            own = torch.arange(classes.start, classes.stop, device=labels.device)
            hit = (own[None, :] == labels[:, None]).to(chances.dtype)
            grad_logits = ((chances - hit) * scale).to(hidden.dtype)
            grad_hidden = grad_hidden + torch.mm(grad_logits, weight[classes]).to(chances.dtype)
            grad_weight.append(torch.mm(grad_logits.t(), hidden))
            if bias is not None:
                grad_bias.append(grad_logits.sum(0))
        return (
            grad_hidden.to(hidden.dtype),
            torch.cat(grad_weight),
            torch.cat(grad_bias) if bias is not None else None,
            None,
            None,
            None,
        )


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]

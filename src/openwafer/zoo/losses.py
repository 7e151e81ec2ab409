"""How the losses of many predictions become one number.

Decides what a weight of 0 leaves out, and the two documented divisors. Does not decide which
predictions count: the models' masks do. Losses are summed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["token_losses", "weighted_loss", "weighted_token_loss"]


def weighted_loss(
    losses: Tensor, weights: Tensor, scaling: str, loss_weight: float = 1.0
) -> Tensor:
    """Losses of the predictions that count, reduced to a scalar, float32.

    Args:
        losses, weights: of one shape, [batch, ...]; weight 0 leaves a prediction out.
        scaling: `num_tokens` divides the sum by the sum of the weights (the mean), anything else,
            such as `batch_size`, by the number of samples, as release 1.6 has it in PyTorch.
        loss_weight: a factor.
    """
    return _reduced(losses, weights, scaling, loss_weight, losses.shape[0])


def weighted_token_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    scaling: str,
    loss_weight: float = 1.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`weighted_loss` of the cross entropy of every token.

    Args:
        logits: [batch, seq, classes].
        labels: [batch, seq], whole numbers.
        weights: [batch, seq].
        label_smoothing: weight of the uniform distribution.
    """
    losses = _flat_losses(logits, labels, label_smoothing)
    return _reduced(losses, weights.flatten(), scaling, loss_weight, labels.shape[0])


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token, float32: [batch, seq, classes], [batch, seq] → [batch, seq]."""
    return _flat_losses(logits, labels, 0.0).to(torch.float32).reshape(labels.shape)


def _flat_losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten().long(),
        reduction="none",
        label_smoothing=label_smoothing,
    )


def _reduced(
    losses: Tensor, weights: Tensor, scaling: str, loss_weight: float, num_samples: int
) -> Tensor:
    counted = weights.to(torch.float32)
    total = (losses.to(torch.float32) * counted).sum()
    divisor = counted.sum().clamp(min=1.0) if scaling == "num_tokens" else float(num_samples)
    return total / divisor * loss_weight

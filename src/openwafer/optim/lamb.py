"""Lamb, which torch does not have.

Decides its update; does not decide its settings (config/optimizer.py).

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
(arXiv 1904.00962, version 3, without debiasing), with the weight norm limited to 10 as in the CS-2
software 1.6 documentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openwafer.optim.own_optimizer import OwnOptimizer

__all__ = ["Lamb"]

_MAX_WEIGHT_NORM = 10.0


class Lamb(OwnOptimizer):
    """Layer-wise adaptive moments.

        m = β1·m + (1-β1)·g;  v = β2·v + (1-β2)·g²
        u = m / (√v + eps) + weight_decay·w
        w = w - lr · min(|w|, 10) / |u| · u        (the ratio is 1 where a norm is 0)

    `adam=True` takes the ratio 1 everywhere. State per parameter: `exp_avg`, `exp_avg_sq`, made
    when the parameter is added.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adam: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adam": adam,
        }
        super().__init__(params, defaults)

    def initial_state(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = exp_avg / exp_avg_sq.sqrt().add_(group["eps"])
        if group["weight_decay"] != 0:
            update.add_(weight, alpha=group["weight_decay"])
        if not group["adam"]:
            # Stays a tensor: reading a norm on the host would wait for the device every time.
            weight_norm = torch.linalg.vector_norm(weight).clamp_(max=_MAX_WEIGHT_NORM)
            update_norm = torch.linalg.vector_norm(update)
            defined = (weight_norm > 0) & (update_norm > 0)
            ratio = torch.where(defined, weight_norm / update_norm, torch.ones_like(weight_norm))
            update.mul_(ratio)
        weight.add_(update, alpha=-group["lr"])

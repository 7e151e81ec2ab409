"""Adafactor with a given learning rate.

Decides its update; does not decide its settings (config/optimizer.py). torch.optim.Adafactor is
another variant: it clips the learning rate by 1/√t and factors fewer dimensions.

Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost"
(arXiv 1804.04235), without first moment and relative step, as in the CS-2 software 1.6
documentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openwafer.optim.own_optimizer import OwnOptimizer

__all__ = ["Adafactor"]


class Adafactor(OwnOptimizer):
    """Squared gradients kept as row and column means.

    With rms(x) = √mean(x²), at update t = 1, 2, …:

        β = 1 - t^decay_rate;  s = g² + eps1
        rank >= 2:  r = β·r + (1-β)·mean(s, -1);  c = β·c + (1-β)·mean(s, -2)
                    u = g / √(r/mean(r, -1) · c)
        else:       v = β·v + (1-β)·s;  u = g / √v
        α = lr · max(eps2, rms(w))      (lr alone without scale_parameter)
        w = w - weight_decay·α·w - α · u / max(1, rms(u) / clip_threshold)

    State per parameter: `step` (0-d float32 on the CPU) and `exp_avg_sq_row` `[..., rows]` with
    `exp_avg_sq_col` `[..., cols]`, or `exp_avg_sq`; made when the parameter is added.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
        }
        super().__init__(params, defaults)

    def initial_state(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32)
        if weight.dim() < 2:
            return {"step": step, "exp_avg_sq": torch.zeros_like(weight)}
        return {
            "step": step,
            "exp_avg_sq_row": weight.new_zeros(weight.shape[:-1]),
            "exp_avg_sq_col": weight.new_zeros((*weight.shape[:-2], weight.shape[-1])),
        }

    def update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        state["step"] += 1
        keep = 1.0 - float(state["step"]) ** group["decay_rate"]
        square = gradient.square().add_(group["eps"][0])
        if weight.dim() < 2:
            state["exp_avg_sq"].lerp_(square, 1.0 - keep)
            update = state["exp_avg_sq"].rsqrt().mul_(gradient)
        else:
            row = state["exp_avg_sq_row"].lerp_(square.mean(dim=-1), 1.0 - keep)
            column = state["exp_avg_sq_col"].lerp_(square.mean(dim=-2), 1.0 - keep)
            row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_()
            update = gradient * row_factor.unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
        # Stays a tensor: reading it on the host would wait for the device every time.
        rate = torch.full((), group["lr"], dtype=weight.dtype, device=weight.device)
        if group["scale_parameter"]:
            rate *= _rms(weight).clamp_(min=group["eps"][1])
        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(rate)
        if group["weight_decay"] > 0:
            weight.mul_(1.0 - group["weight_decay"] * rate)
        weight.sub_(update)


def _rms(tensor: Tensor) -> Tensor:
    """√mean(x²), 0-d; a norm, which does not allocate the squares."""
    return torch.linalg.vector_norm(tensor) / max(tensor.numel(), 1) ** 0.5

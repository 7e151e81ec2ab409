"""RMSprop in TensorFlow's form, which torch does not have.

Decides its update; does not decide its settings (config/hyperparameters.py), nor the form that
torch has itself (build.py).

Source: Tieleman and Hinton, "Lecture 6.5-rmsprop" (COURSERA: Neural Networks for Machine Learning,
2012), in the form of `tf.compat.v1.train.RMSPropOptimizer`: epsilon is under the root, the rate is
inside the momentum, and the running square begins at 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openwafer.optim.own_optimizer import OwnOptimizer

__all__ = ["TensorFlowRMSprop"]


class TensorFlowRMSprop(OwnOptimizer):
    """g = gradient + weight_decay·w
        s = α·s + (1-α)·g²;  a = α·a + (1-α)·g (0 if not centered)
        b = momentum·b + lr·g / √(s - a² + eps)
        w = w - b

    State per parameter, made when it is added: `square_avg` (s, of ones), `momentum_buffer` (b),
    and `grad_avg` (a) where `centered` is set.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float = 0.9,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults)

    def initial_state(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {
            "square_avg": torch.ones_like(weight),
            "momentum_buffer": torch.zeros_like(weight),
        }
        return {**state, "grad_avg": torch.zeros_like(weight)} if group["centered"] else state

    def update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        alpha = group["alpha"]
        if group["weight_decay"]:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        square = state["square_avg"].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
        if group["centered"]:
            average = state["grad_avg"].lerp_(gradient, 1 - alpha)
            square = square.addcmul(average, average, value=-1)
        root = square.add(group["eps"]).sqrt_()
        buffer = state["momentum_buffer"].mul_(group["momentum"])
        weight.sub_(buffer.addcdiv_(gradient, root, value=group["lr"]))

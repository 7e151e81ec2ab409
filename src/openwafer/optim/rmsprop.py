"""RMSprop in TensorFlow's form, which torch does not have.

Decides its update; does not decide its settings (config/hyperparameters.py), nor the form that
torch has itself (build.py).

Source: Tieleman and Hinton, "Lecture 6.5-rmsprop" (COURSERA: Neural Networks for Machine Learning,
2012), in the form of `tf.compat.v1.train.RMSPropOptimizer`: epsilon is under the root, the rate is
inside the momentum, and the running square begins at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["TensorFlowRMSprop"]


class TensorFlowRMSprop(Optimizer):
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make the state of its parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for weight in group["params"]:
            state = self.state[weight]
            state["square_avg"] = torch.ones_like(weight)
            state["momentum_buffer"] = torch.zeros_like(weight)
            if group["centered"]:
                state["grad_avg"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    _update(weight, weight.grad, self.state[weight], group)
        return loss


def _update(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
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

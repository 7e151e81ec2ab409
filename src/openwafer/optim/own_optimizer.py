"""What the optimizers that torch does not have share.

Decides that state is made when a parameter is added, so that it can be stored before the first
step, and that a step goes through the parameters that have a gradient. Does not decide any update.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OwnOptimizer"]


class OwnOptimizer(Optimizer):
    """An optimizer that updates one parameter at a time."""

    @abstractmethod
    def initial_state(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first update; `group`: its settings."""

    @abstractmethod
    def update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """Change a parameter and its state in place."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make the state of its parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for weight in group["params"]:
            self.state[weight] = self.initial_state(weight, group)

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
                    self.update(weight, weight.grad, self.state[weight], group)
        return loss

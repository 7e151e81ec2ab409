"""What happens to gradients between the backward pass and the optimizer.

Decides unscaling, the global norm, clipping, and whether an update is applied at all. One rule for
all executors, so that clipped and scaled runs agree in every mode. Does not decide when an update
runs: streaming may put it off, but never change its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.optim.clip import (
    clip_by_value_,
    clip_factor,
    global_norm,
    gradient_norms,
    scale_gradients_,
)
from openwafer.optim.loss_scale import build_loss_scaler

__all__ = ["Decision", "UpdateRule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to update, and the factor that clips every gradient (None: nothing to clip)."""

    apply: bool
    factor: torch.Tensor | None = None
    grad_norm: float | None = None


class UpdateRule:
    """Loss scaling and clipping over a run; the loss scale is its only state."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._max_norm = config.max_gradient_norm
        self._max_value = config.max_gradient_value
        self._scaler = build_loss_scaler(config)

    @property
    def loss_scale(self) -> float:
        return self._scaler.scale if self._scaler else 1.0

    @property
    def scales_loss(self) -> bool:
        return self._scaler is not None

    @property
    def needs_all_gradients(self) -> bool:
        """Whether no update may run before the whole backward pass is known."""
        return self._max_norm > 0 or (self._scaler is not None and self._scaler.dynamic)

    def unscale_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide out the loss scale, in place, as soon as a gradient is complete."""
        if self.loss_scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1.0 / self.loss_scale)

    def norms(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The norm of each unscaled gradient, where anything will ask for it."""
        if not self.needs_all_gradients or not gradients:
            return {}
        return dict(zip(gradients, gradient_norms(list(gradients.values())), strict=True))

    def decide(self, norms: Mapping[str, torch.Tensor], order: Sequence[str]) -> Decision:
        """Judge a whole backward pass by its norms, taken in the model's parameter order."""
        if not self.needs_all_gradients:
            return Decision(apply=True)
        found = [norms[name].cpu() for name in order if name in norms]
        norm = global_norm(torch.stack(found)) if found else torch.zeros(())
        finite = bool(torch.isfinite(norm))
        if self._scaler:
            self._scaler.update(overflowed=not finite)
        skip = self._scaler is not None and self._scaler.dynamic and not finite
        clipped = self._max_norm > 0 and not skip
        return Decision(
            apply=not skip,
            factor=clip_factor(norm, self._max_norm) if clipped else None,
            grad_norm=float(norm),
        )

    def clip_(self, gradients: Sequence[torch.Tensor], decision: Decision) -> None:
        """Clip unscaled gradients in place, by norm or by value, as configured."""
        if decision.factor is not None:
            scale_gradients_(gradients, decision.factor)
        if self._max_value > 0:
            clip_by_value_(gradients, self._max_value)

    def state(self) -> dict[str, float]:
        return self._scaler.state_dict() if self._scaler else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

"""The factor that keeps small gradients representable in 16 bits.

Decides how the factor changes after each step. Does not decide whether a step overflowed: the
caller looks at the global gradient norm, which it needs for clipping anyway.

Algorithm and constants: CS-2 software 1.6 documentation. Count steps and overflows since the last
change; if the share of overflows is above the tolerance, halve and start to count again; after
`steps_per_increase` steps, double; always within [min, max]. It works the same for every dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import CheckpointError

__all__ = ["LossScaler", "build_loss_scaler"]


class LossScaler:
    """The loss scale over a run; a constant one has `dynamic` False and never changes."""

    def __init__(
        self,
        *,
        initial_scale: float,
        dynamic: bool,
        steps_per_increase: int = 2000,
        min_scale: float = 2.0**-14,
        max_scale: float = 2.0**15,
        overflow_tolerance: float = 0.05,
    ) -> None:
        self.dynamic = dynamic
        self.steps_per_increase = steps_per_increase
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.overflow_tolerance = overflow_tolerance
        self._scale = self._within_limits(initial_scale) if dynamic else initial_scale
        self._num_steps = 0
        self._num_overflows = 0

    @property
    def scale(self) -> float:
        """What the loss is to be multiplied with, and the gradients divided by, in this step."""
        return self._scale

    def update(self, *, overflowed: bool) -> None:
        """Note the outcome of a step: whether a gradient was NaN or infinite.

        Such a step's update must not be applied.
        """
        if not self.dynamic:
            return
        self._num_steps += 1
        self._num_overflows += overflowed
        if overflowed and self._num_overflows > self.overflow_tolerance * self._num_steps:
            self._change_to(self._scale / 2)
        elif self._num_steps >= self.steps_per_increase:
            self._change_to(self._scale * 2)

    def state_dict(self) -> dict[str, float]:
        """Everything needed to go on: `scale`, `num_steps`, `num_overflows`."""
        return {
            "scale": self._scale,
            "num_steps": float(self._num_steps),
            "num_overflows": float(self._num_overflows),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state. A constant scale keeps its configured value.

        Raises:
            CheckpointError: a key is missing.
        """
        if not self.dynamic:
            return
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise CheckpointError(f"the loss scale state lacks {', '.join(missing)}")
        self._scale = self._within_limits(float(state["scale"]))
        self._num_steps = int(state["num_steps"])
        self._num_overflows = int(state["num_overflows"])

    def _change_to(self, scale: float) -> None:
        self._scale = self._within_limits(scale)
        self._num_steps = 0
        self._num_overflows = 0

    def _within_limits(self, scale: float) -> float:
        return min(max(scale, self.min_scale), self.max_scale)


def build_loss_scaler(config: OptimizerConfig) -> LossScaler | None:
    """The scaler that `loss_scaling_factor` asks for, or None where it is null."""
    factor = config.loss_scaling_factor
    if factor is None:
        return None
    return LossScaler(
        initial_scale=config.initial_loss_scale if factor == "dynamic" else float(factor),
        dynamic=factor == "dynamic",
        steps_per_increase=config.steps_per_increase,
        min_scale=config.min_loss_scale,
        max_scale=config.max_loss_scale,
        overflow_tolerance=config.overflow_tolerance,
    )

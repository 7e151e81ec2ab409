"""Scaling of the loss, so that small gradients are not lost in 16 bits.

Decides what TensorFlow itself does: how a dynamic scale changes, and that a step whose gradients
are not finite changes no weight. In a compiled run these optimizers only say what they are
(recording.py), and the runtime does the same (optim/loss_scale.py).

Names, constants and algorithm: sections 2.5 and 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.recording import recording_now

__all__ = ["CSDynamicLossScale", "LossScaleOptimizer", "wrap_optimizer"]

_precision: Any = tf.compat.v1.mixed_precision


class CSDynamicLossScale(_precision.DynamicLossScale):
    """A loss scale that is halved where too large a share of the steps overflows.

    Steps and overflows are counted since the last change. With a share of overflows above
    `overflow_tolerance` the scale is halved; after `increment_period` steps it is doubled; it
    stays within its limits.

    Args:
        multiplier: only 2.

    Raises:
        ConfigError: another multiplier, or limits that leave nothing.
    """

    def __init__(
        self: Any,
        initial_loss_scale: float = 2.0**15,
        increment_period: int = 2000,
        multiplier: float = 2.0,
        min_loss_scale: float = 2.0**-14,
        max_loss_scale: float = 2.0**15,
        overflow_tolerance: float = 0.05,
    ) -> None:
        if multiplier != 2:
            raise ConfigError(f"a loss scale with multiplier {multiplier:g}", allowed="2")
        if not 0 < min_loss_scale <= max_loss_scale:
            raise ConfigError(
                f"a loss scale between {min_loss_scale:g} and {max_loss_scale:g}",
                allowed="0 < min_loss_scale <= max_loss_scale",
            )
        # Past DynamicLossScale's own constructor, which makes other variables.
        _precision.LossScale.__init__(self)
        initial = min(max(float(initial_loss_scale), min_loss_scale), max_loss_scale)
        self._initial_loss_scale, self._increment_period = initial, int(increment_period)
        self._multiplier = 2.0
        self.min_loss_scale, self.max_loss_scale = float(min_loss_scale), float(max_loss_scale)
        self.overflow_tolerance = float(overflow_tolerance)
        self._current_loss_scale = self._add_weight("current_loss_scale", initial, tf.float32)
        self._num_good_steps = self._add_weight("good_steps", 0, tf.int64)
        self.overflow_steps = self._add_weight("overflow_steps", 0, tf.int64)

    def update(self: Any, grads: Any) -> tuple[Any, Any]:
        """The operation that notes a step with these unscaled gradients (or their global norm
        alone), and whether they are finite."""
        norm = tf.linalg.global_norm([g for g in tf.nest.flatten(grads) if g is not None])
        finite = tf.math.is_finite(norm)
        steps = self._num_good_steps + 1
        overflows = self.overflow_steps + tf.cast(tf.logical_not(finite), tf.int64)
        tolerated = self.overflow_tolerance * tf.cast(steps, tf.float32)
        halve = ~finite & (tf.cast(overflows, tf.float32) > tolerated)
        double = ~halve & (steps >= self._increment_period)
        factor = tf.where(halve, 0.5, tf.where(double, 2.0, 1.0))
        limits = (self.min_loss_scale, self.max_loss_scale)
        changed = halve | double
        scale = tf.clip_by_value(self._current_loss_scale * factor, *limits)
        zero = tf.constant(0, tf.int64)
        # All is computed before anything is assigned.
        with tf.control_dependencies([scale, changed, steps, overflows]):
            done = tf.group(
                self._current_loss_scale.assign(scale),
                self._num_good_steps.assign(tf.where(changed, zero, steps)),
                self.overflow_steps.assign(tf.where(changed, zero, overflows)),
            )
        return done, finite

    def get_config(self: Any) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "initial_loss_scale": self.initial_loss_scale,
            "increment_period": self.increment_period,
            "multiplier": self.multiplier,
            "min_loss_scale": self.min_loss_scale,
            "max_loss_scale": self.max_loss_scale,
            "overflow_tolerance": self.overflow_tolerance,
        }


class LossScaleOptimizer(_precision.MixedPrecisionLossScaleOptimizer):
    """An optimizer with a loss scale. A step that overflows changes no weight, and is counted by
    the global step: as in a compiled run, and so that a run of max_steps ends.

    Args:
        opt: an optimizer of tf.compat.v1.train.
        loss_scale: a LossScale, a number, or "dynamic" (TensorFlow's own rule).
    """

    @property
    def loss_scale(self: Any) -> Any:
        return self._loss_scale

    def apply_gradients(
        self: Any,
        grads_and_vars: Any,
        global_step: Any = None,
        name: Any = None,
        global_norm: Any = None,
    ) -> Any:
        """As every optimizer.

        Args:
            global_norm: of the gradients before clipping, where the caller has it.
        """
        if recording_now() is not None or not self._doing_dynamic_loss_scaling():
            return super().apply_gradients(grads_and_vars, global_step, name)
        pairs = tuple(grads_and_vars)
        found = [g for g, _ in pairs if g is not None] if global_norm is None else [global_norm]
        update, finite = self._loss_scale.update(found)

        def applied() -> Any:
            with tf.control_dependencies([self._optimizer.apply_gradients(pairs, global_step)]):
                return tf.constant(True)

        def skipped() -> Any:
            counted = [] if global_step is None else [global_step.assign_add(1).op]
            with tf.control_dependencies(counted):
                return tf.constant(False)

        return tf.group(tf.cond(finite, applied, skipped), update, name=name)

    # What the optimizer inside keeps.

    def get_slot(self: Any, var: Any, name: str) -> Any:
        return self._optimizer.get_slot(var, name)

    def get_slot_names(self: Any) -> list[str]:
        return self._optimizer.get_slot_names()

    def variables(self: Any) -> list[Any]:
        return self._optimizer.variables()


def wrap_optimizer(opt: Any, loss_scale: Any) -> Any:
    """`opt` with a loss scale: a CSDynamicLossScale or another LossScale, a number, or "dynamic"
    for TensorFlow's own rule. None or 1 leaves it as it is."""
    return opt if loss_scale in (None, 1) else LossScaleOptimizer(opt, loss_scale)

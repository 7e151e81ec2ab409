"""What stands around the optimizer of a train_op: a loss scale, and accumulation of gradients.

Decides what each becomes in the runtime's settings, and which variables hold the loss scale. Does
not decide how they work in TensorFlow itself (loss_scale.py, grad_accum.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openwafer.errors import CaptureError
from openwafer.frontends.tf.gradient_chain import gradient_rule
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.loss_scale import CSDynamicLossScale
from openwafer.frontends.tf.recording import Accumulated, ApplyCall, GradientCall, ScaledLoss

__all__ = ["LossScaling", "Wrappers", "around"]

_precision: Any = tf.compat.v1.mixed_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaling:
    """options: fields of the OptimizerConfig; empty for none. variables: an entry of the runtime's
    loss scale → the variable that holds it, by name."""

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    variables: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrappers:
    """num_batches: for an update."""

    scaling: LossScaling = LossScaling()
    num_batches: int = 1


def around(call: ApplyCall, source: GradientCall, graph: Any) -> Wrappers:
    """What an optimizer was called by.

    Raises:
        CaptureError: there are two of a kind, a loss scale of a rule that is not known, or
            gradients are changed before they are accumulated.
    """
    scales = [wrapper.scale for wrapper in call.wrappers if isinstance(wrapper, ScaledLoss)]
    sums = [wrapper for wrapper in call.wrappers if isinstance(wrapper, Accumulated)]
    if len(scales) > 1 or len(sums) > 1:
        what = "loss scale" if len(scales) > 1 else "GradAccumOptimizer"
        raise CaptureError(f"the train_op has more than one {what}", allowed="one of them")
    for accumulated in sums:
        _refuse_changed_before(accumulated, source, graph)
    return Wrappers(
        scaling=_scaling(scales[0]) if scales else LossScaling(),
        num_batches=sums[0].num_batches if sums else 1,
    )


def _refuse_changed_before(accumulated: Accumulated, source: GradientCall, graph: Any) -> None:
    rule = gradient_rule(graph, accumulated.given, source.gradients)
    if rule.max_norm or rule.max_value:
        raise CaptureError(
            "gradients are clipped batch by batch, before they are accumulated",
            allowed="clipping of their mean: between `accumulate` and `apply_mean` of "
            "GradAccumOptimizer",
            hint="openwafer.tf.Trainer with `grad_accum_steps` and `max_gradient_norm` does that",
        )


def _scaling(scale: Any) -> LossScaling:
    if isinstance(scale, _precision.FixedLossScale):
        return LossScaling(options={"loss_scaling_factor": float(scale._loss_scale_value)})
    if not isinstance(scale, _precision.DynamicLossScale) or scale.multiplier != 2:
        raise CaptureError(
            f"the loss scale is a {type(scale).__name__} that is not known",
            allowed="a number, CSDynamicLossScale, or DynamicLossScale with multiplier 2",
        )
    options = {
        "loss_scaling_factor": "dynamic",
        "initial_loss_scale": scale.initial_loss_scale,
        "steps_per_increase": scale.increment_period,
    }
    variables = {
        "scale": str(scale._current_loss_scale.op.name),
        "num_steps": str(scale._num_good_steps.op.name),
    }
    if isinstance(scale, CSDynamicLossScale):
        limits = ("min_loss_scale", "max_loss_scale", "overflow_tolerance")
        options |= {name: getattr(scale, name) for name in limits}
        variables["num_overflows"] = str(scale.overflow_steps.op.name)
    return LossScaling(options=options, variables=variables)

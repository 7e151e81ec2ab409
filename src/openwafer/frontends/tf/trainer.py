"""`Trainer`: the train_op of a model from the `optimizer` section of a parameter file.

Decides which of TensorFlow's optimizers a type is, and the order of loss scale, clipping and
update. Does not decide what a learning rate is at a step: the schedules are those of the PyTorch
models (config/schedule.py), so that one parameter file trains both alike.

Source of names and defaults: sections 2.5 and 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from openwafer.config.schedule import Constant, build_schedule
from openwafer.config.schema import KeyPath, Report, build, limits
from openwafer.errors import ConfigError
from openwafer.frontends.tf.adamw import AdamWOptimizer
from openwafer.frontends.tf.library import tf
from openwafer.optim.schedule import learning_rate_at

__all__ = ["Trainer", "TrainerOptions"]

_AT_LEAST_0 = limits(minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerOptions:
    """The `optimizer` section, but for `learning_rate`."""

    optimizer_type: Literal["sgd", "momentum", "adam", "adamw", "rmsprop"] = field(
        metadata=limits(ignore_case=True)
    )
    """Which optimizer."""
    momentum: float = field(default=0.9, metadata=_AT_LEAST_0)
    """Of momentum."""
    beta1: float = field(default=0.9, metadata=limits(minimum=0, below=1))
    """Of adam and adamw."""
    beta2: float = field(default=0.999, metadata=limits(minimum=0, below=1))
    """Of adam and adamw."""
    epsilon: float | None = field(default=None, metadata=_AT_LEAST_0)
    """Of adam, adamw and rmsprop; null: 1e-5 with mixed precision, else 1e-8."""
    use_bias_correction: bool = False
    """Of adamw."""
    weight_decay_rate: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Of adamw."""
    exclude_from_weight_decay: tuple[str, ...] = ("LayerNorm", "layer_norm", "bias", "Bias")
    """Parts of names that do not decay."""
    rmsprop_decay: float = field(default=0.9, metadata=_AT_LEAST_0)
    """Of rmsprop."""
    rmsprop_momentum: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Of rmsprop."""
    loss_scaling_factor: float = field(default=1.0, metadata=limits(above=0))
    """Factor of the loss before the backward pass; divided out again."""
    max_gradient_norm: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Clip gradients to this global norm; 0 is off."""
    max_gradient_value: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Clip every element to this magnitude; 0 is off."""
    grad_accum_steps: int = field(default=1, metadata=limits(minimum=1, maximum=1))
    """Batches for an update; only 1 for TensorFlow models."""
    disable_lr_steps_reset: bool = False
    """Show the global step to every schedule of a list."""
    log_summaries: bool = False
    """Write the learning rate and the norm of the gradients (TensorFlow itself)."""


class Trainer:
    """Makes train_ops.

    Args:
        params: the `optimizer` section.
        tf_summary: accepted; without effect here.
        mixed_precision: changes the default epsilon.

    Raises:
        ConfigError: a key or value is wrong; all of them are said.
    """

    def __init__(
        self, params: Mapping[str, Any], tf_summary: bool = False, mixed_precision: bool = False
    ) -> None:
        report = Report()
        options = build(
            TrainerOptions,
            params,
            path=("optimizer",),
            locate=_place,
            report=report,
            passed_over=("learning_rate", "log_grads", "log_hists", "ws_summary"),
        )
        schedule = build_schedule(
            params.get("learning_rate"),
            path=("optimizer", "learning_rate"),
            locate=_place,
            report=report,
            disable_lr_steps_reset=bool(params.get("disable_lr_steps_reset")),
        )
        report.raise_if_any()
        assert options is not None, "a section failed without a report"
        assert schedule is not None, "a schedule failed without a report"
        if options.max_gradient_norm and options.max_gradient_value:
            raise ConfigError(
                "`max_gradient_norm` and `max_gradient_value` exclude each other", where="optimizer"
            )
        self._options, self._schedule = options, schedule
        default = 1e-5 if mixed_precision else 1e-8
        self._epsilon = default if options.epsilon is None else options.epsilon
        self._optimizer: Any = None
        self._global_norm: Any = None

    @property
    def optimizer(self) -> Any:
        """The optimizer, made on first use."""
        if self._optimizer is None:
            self._optimizer = self.build_optimizer()
        return self._optimizer

    @property
    def gradient_global_norm(self) -> Any:
        """The norm before clipping; None where nothing clips by it."""
        return self._global_norm

    @property
    def loss_scale_value(self) -> float:
        return self._options.loss_scaling_factor

    @property
    def grad_accum_steps(self) -> int:
        return self._options.grad_accum_steps

    @property
    def log_summaries(self) -> bool:
        return self._options.log_summaries

    def is_grad_accum(self) -> bool:
        return self.grad_accum_steps > 1

    def uses_loss_scaling(self) -> bool:
        return self.loss_scale_value != 1

    def get_learning_rate(self) -> Any:
        """The rate at the global step: a number where it never changes, else a tensor."""
        if isinstance(self._schedule, Constant):
            return self._schedule.learning_rate

        def at(step: Any) -> Any:
            return np.float32(learning_rate_at(self._schedule, int(step)))

        step = tf.compat.v1.train.get_or_create_global_step()
        rate = tf.numpy_function(at, [step], tf.float32, stateful=False)
        rate.set_shape([])
        return rate

    def build_optimizer(self) -> Any:
        """The optimizer of `optimizer_type`."""
        options, rate, v1 = self._options, self.get_learning_rate(), tf.compat.v1.train
        kind = options.optimizer_type
        if kind == "sgd":
            return v1.GradientDescentOptimizer(rate)
        if kind == "momentum":
            return v1.MomentumOptimizer(rate, options.momentum)
        if kind == "adam":
            return v1.AdamOptimizer(rate, options.beta1, options.beta2, self._epsilon)
        if kind == "rmsprop":
            decay, momentum = options.rmsprop_decay, options.rmsprop_momentum
            return v1.RMSPropOptimizer(rate, decay, momentum, self._epsilon)
        return AdamWOptimizer(
            rate,
            options.weight_decay_rate,
            options.beta1,
            options.beta2,
            self._epsilon,
            options.use_bias_correction,
            options.exclude_from_weight_decay,
        )

    def clip_gradients(self, gradients: list[Any]) -> list[Any]:
        """Gradients, clipped as the section says."""
        options = self._options
        if options.max_gradient_norm:
            clipped, self._global_norm = tf.clip_by_global_norm(
                gradients, options.max_gradient_norm
            )
            return list(clipped)
        if options.max_gradient_value:
            bound = options.max_gradient_value
            return [tf.clip_by_value(gradient, -bound, bound) for gradient in gradients]
        return gradients

    def build_train_ops(self, loss: Any) -> Any:
        """The train_op: gradients of the scaled loss, unscaled, clipped and applied, after the
        updates of batch statistics."""
        scale = self.loss_scale_value
        pairs = self.optimizer.compute_gradients(loss * scale if scale != 1 else loss)
        pairs = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
        # The rows of an embedding are summed first, so that a norm is that of the whole gradient.
        gradients = [tf.convert_to_tensor(gradient) for gradient, _ in pairs]
        if scale != 1:
            gradients = [gradient / scale for gradient in gradients]
        gradients = self.clip_gradients(gradients)
        step = tf.compat.v1.train.get_or_create_global_step()
        updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
        if self.log_summaries:
            tf.compat.v1.summary.scalar("train/lr", self.get_learning_rate())
            if self._global_norm is not None:
                tf.compat.v1.summary.scalar("train/unclipped_grad_norm", self._global_norm)
        with tf.control_dependencies(updates):
            applied = zip(gradients, (variable for _, variable in pairs), strict=True)
            return self.optimizer.apply_gradients(applied, global_step=step)


def _place(path: KeyPath) -> str:
    return ".".join(map(str, path))

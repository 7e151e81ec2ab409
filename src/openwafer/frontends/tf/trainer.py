"""`Trainer`: the train_op of a model from the `optimizer` section of a parameter file.

Decides which of TensorFlow's optimizers a type is, and the order of loss scale, accumulation,
clipping and update. Does not decide what a learning rate is at a step: the schedules are those of
the PyTorch models (config/schedule.py), so that one parameter file trains both alike; nor which
keys there are (trainer_options.py).

Source of names and defaults: sections 2.5 and 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from openwafer.config.schedule import Constant
from openwafer.frontends.tf.adamw import AdamWOptimizer
from openwafer.frontends.tf.grad_accum import GradAccumOptimizer
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.loss_scale import CSDynamicLossScale, wrap_optimizer
from openwafer.frontends.tf.trainer_options import read_options
from openwafer.optim.schedule import learning_rate_at

__all__ = ["Trainer"]


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
        options, schedule = read_options(params)
        self._options, self._schedule = options, schedule
        default = 1e-5 if mixed_precision else 1e-8
        self._epsilon = default if options.epsilon is None else options.epsilon
        self._optimizer: Any = None
        self._loss_scale: Any = None
        self._rate: Any = None
        self._global_norm: Any = None

    @property
    def optimizer(self) -> Any:
        """The optimizer, made on first use."""
        if self._optimizer is None:
            self._optimizer = self.build_optimizer()
        return self._optimizer

    @property
    def gradient_global_norm(self) -> Any:
        """The norm before clipping; None where nothing asks for it, or before `build_train_ops`."""
        return self._global_norm

    @property
    def loss_scale_value(self) -> Any:
        """The loss scale: a number, or a tensor where it is dynamic."""
        if not self._is_dynamic:
            return self._options.loss_scaling_factor
        return self._scale_of_the_run()()

    @property
    def grad_accum_steps(self) -> int:
        return self._options.grad_accum_steps

    @property
    def log_summaries(self) -> bool:
        return self._options.log_summaries

    def is_grad_accum(self) -> bool:
        return self.grad_accum_steps > 1

    def uses_loss_scaling(self) -> bool:
        return self._options.loss_scaling_factor != 1

    @property
    def _is_dynamic(self) -> bool:
        return isinstance(self._options.loss_scaling_factor, str)

    def _scale_of_the_run(self) -> Any:
        """A number, or a LossScale, made on first use: its variables are made with it."""
        if self._loss_scale is None:
            self._loss_scale = self._make_loss_scale()
        return self._loss_scale

    def _make_loss_scale(self) -> Any:
        options = self._options
        if options.loss_scaling_factor == "tf_dynamic":
            return tf.compat.v1.mixed_precision.DynamicLossScale(
                options.initial_loss_scale, options.steps_per_increase
            )
        if options.loss_scaling_factor == "dynamic":
            return CSDynamicLossScale(
                options.initial_loss_scale,
                options.steps_per_increase,
                2.0,
                options.min_loss_scale,
                options.max_loss_scale,
                options.overflow_tolerance,
            )
        return options.loss_scaling_factor

    def get_learning_rate(self) -> Any:
        """The rate at the global step: a number where it never changes, else a tensor, the same one
        each time: two would read the global step at two moments."""
        if self._rate is None:
            self._rate = self._make_rate()
        return self._rate

    def _make_rate(self) -> Any:
        if isinstance(self._schedule, Constant):
            return self._schedule.learning_rate

        def at(step: Any) -> Any:
            return np.float32(learning_rate_at(self._schedule, int(step)))

        step = tf.compat.v1.train.get_or_create_global_step()
        rate = tf.numpy_function(at, [step], tf.float32, stateful=False)
        rate.set_shape([])
        return rate

    def build_optimizer(self) -> Any:
        """The optimizer of `optimizer_type`, with the loss scale and the accumulation asked for."""
        optimizer = wrap_optimizer(self._plain_optimizer(), self._scale_of_the_run())
        if self.is_grad_accum():
            return GradAccumOptimizer(optimizer, self.grad_accum_steps)
        return optimizer

    def _plain_optimizer(self) -> Any:
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
            clipped, _ = tf.clip_by_global_norm(
                gradients, options.max_gradient_norm, self._global_norm
            )
            return list(clipped)
        if options.max_gradient_value:
            bound = options.max_gradient_value
            return [tf.clip_by_value(gradient, -bound, bound) for gradient in gradients]
        return gradients

    def build_train_ops(self, loss: Any) -> Any:
        """The train_op: gradients of the scaled loss, unscaled, averaged over the batches of a
        step, clipped and applied, after the updates of batch statistics."""
        optimizer, arguments = self.optimizer, {}
        pairs = [(g, v) for g, v in optimizer.compute_gradients(loss) if g is not None]
        # The rows of an embedding are summed first, so that a norm is that of the whole gradient.
        pairs = [(tf.convert_to_tensor(gradient), variable) for gradient, variable in pairs]
        if self.is_grad_accum():
            pairs = optimizer.accumulate(pairs)
        gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
        if self._options.max_gradient_norm or self._is_dynamic or self.log_summaries:
            self._global_norm = tf.linalg.global_norm(gradients)
        if self._is_dynamic:
            arguments["global_norm"] = self._global_norm
        pairs = list(zip(self.clip_gradients(gradients), variables, strict=True))
        shown = self._summaries(gradients, variables)
        for tag, value in shown.items():
            tf.compat.v1.summary.scalar(tag, value)
        apply = optimizer.apply_mean if self.is_grad_accum() else optimizer.apply_gradients
        step = tf.compat.v1.train.get_or_create_global_step()
        updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
        # What is shown is read before anything changes.
        with tf.control_dependencies([*updates, *shown.values()]):
            return apply(pairs, global_step=step, **arguments)

    def _summaries(self, gradients: list[Any], variables: list[Any]) -> dict[str, Any]:
        """The documented tags, for TensorFlow itself."""
        shown: dict[str, Any] = {}
        if self.log_summaries:
            shown["train/lr"] = tf.convert_to_tensor(self.get_learning_rate())
            shown["train/unclipped_grad_norm"] = self._global_norm
            if self.uses_loss_scaling():
                shown["train/loss_scale"] = tf.convert_to_tensor(self.loss_scale_value)
        if self._options.ws_summary:
            zeros = [tf.size(g) - tf.math.count_nonzero(g, dtype=tf.int32) for g in gradients]
            shown["train/grad_num_zeros"] = tf.add_n(zeros)
            shown["train/params_norm"] = tf.linalg.global_norm(variables)
        return shown

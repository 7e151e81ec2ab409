"""Adam with decoupled weight decay, for `tf.compat.v1.train`.

Decides the update that TensorFlow itself makes; the runtime has the same (known_optimizers.py).

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), in the
form without bias correction of BERT, with the arguments of section 4.4 of the fact sheet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from openwafer.frontends.tf.library import tf

__all__ = ["AdamWOptimizer"]


class AdamWOptimizer(tf.compat.v1.train.Optimizer):
    """w ← w - rate · (m / (√v + epsilon) + weight_decay_rate · w).

    Args:
        learning_rate: a number, or a tensor of the global step.
        exclude_from_weight_decay: regular expressions; a variable in whose name one is found does
            not decay.
        use_bias_correction: divide m by 1 - beta1^t and v by 1 - beta2^t, t being the number of
            updates, this one included, which a variable counts: a step that a loss scale skips is
            none. epsilon is beside the √v that is corrected, as in PyTorch's AdamW.
    """

    def __init__(
        self,
        learning_rate: Any,
        weight_decay_rate: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        use_bias_correction: bool = False,
        exclude_from_weight_decay: Sequence[str] | None = None,
        use_locking: bool = False,
        name: str = "AdamW",
    ) -> None:
        super().__init__(use_locking, name)
        self.learning_rate = learning_rate
        self.weight_decay_rate = weight_decay_rate
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.use_bias_correction = use_bias_correction
        self.exclude_from_weight_decay = tuple(exclude_from_weight_decay or ())
        self._rate: Any = None
        self._mean_share: Any = None
        self._square_share: Any = None
        self.counter: Any = None
        """The variable that counts the updates, int64; made with them, for bias correction."""

    def decays(self, name: str) -> bool:
        """Whether the variable of that name decays."""
        excluded = any(re.search(pattern, name) for pattern in self.exclude_from_weight_decay)
        return bool(self.weight_decay_rate) and not excluded

    def _create_slots(self: Any, var_list: Any) -> None:
        for variable in var_list:
            self._zeros_slot(variable, "m", self._name)
            self._zeros_slot(variable, "v", self._name)
        if self.use_bias_correction:
            first = min(var_list, key=lambda variable: variable.name)
            self.counter = self._create_non_slot_variable(np.int64(0), "num_updates", first)

    def _prepare(self: Any) -> None:
        """The numbers that all variables of an update share."""
        rate = self.learning_rate() if callable(self.learning_rate) else self.learning_rate
        self._rate = tf.cast(rate, tf.float32)
        self._mean_share, self._square_share = self._share(self.beta1), self._share(self.beta2)

    def _share(self: Any, beta: float) -> Any:
        """1 - beta^t: how much of an average that began with 0 is of gradients. In float64:
        1 - 0.999 has only four digits in float32."""
        if not self.use_bias_correction:
            return 1.0
        count = tf.cast(self.counter, tf.float64) + 1.0
        return tf.cast(1.0 - tf.constant(beta, tf.float64) ** count, tf.float32)

    def _finish(self: Any, update_ops: Any, name_scope: Any) -> Any:
        if not self.use_bias_correction:
            return super()._finish(update_ops, name_scope)
        with tf.control_dependencies(update_ops):
            counted = self.counter.assign_add(1).op
        return tf.group(*update_ops, counted, name=name_scope)

    def _resource_apply_dense(self: Any, grad: Any, handle: Any) -> Any:
        return self._update(grad, handle)

    def _apply_dense(self: Any, grad: Any, var: Any) -> Any:
        return self._update(grad, var)

    def _resource_apply_sparse(self: Any, grad: Any, handle: Any, indices: Any) -> Any:
        shape = tf.shape(handle, out_type=indices.dtype)
        dense = tf.scatter_nd(tf.expand_dims(indices, 1), grad, shape)
        return self._update(dense, handle)

    def _update(self: Any, grad: Any, var: Any) -> Any:
        m, v = self.get_slot(var, "m"), self.get_slot(var, "v")
        new_m = m.assign(self.beta1 * m + (1.0 - self.beta1) * grad)
        new_v = v.assign(self.beta2 * v + (1.0 - self.beta2) * tf.square(grad))
        mean, square = new_m / self._mean_share, new_v / self._square_share
        step = self._rate * mean / (tf.sqrt(square) + self.epsilon)
        if self.decays(var.op.name):
            step = step + self._rate * self.weight_decay_rate * var
        return tf.group(var.assign_sub(step), new_m, new_v)

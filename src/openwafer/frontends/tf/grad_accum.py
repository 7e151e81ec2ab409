"""An update from the gradients of several batches.

Decides what TensorFlow itself does: sums of gradients, which no checkpoint holds, and an update
with their mean at each n-th batch, at which alone the global step counts. In a compiled run it only
says that it accumulates (recording.py), and the runtime does the same.

Names: section 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openwafer.errors import CaptureError, ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.recording import Accumulated, ScaledLoss, recording_now

__all__ = ["GradAccumOptimizer"]

Pairs = list[tuple[Any, Any]]


class GradAccumOptimizer(tf.compat.v1.train.Optimizer):
    """Updates with the mean of the gradients of `grad_accum_steps` batches.

    Clipping belongs between the two halves of `apply_gradients`: `accumulate`, whose result at the
    last batch is the mean, and `apply_mean`.

    Args:
        optimizer: what updates; with a loss scale it stands in here.
        grad_accum_steps: batches for an update, at least 1.

    Raises:
        ConfigError: fewer than 1.
    """

    def __init__(
        self, optimizer: Any, grad_accum_steps: int, name: str = "GradAccumOptimizer"
    ) -> None:
        super().__init__(False, name)
        if grad_accum_steps < 1:
            raise ConfigError(f"grad_accum_steps is {grad_accum_steps}", allowed="at least 1")
        self._optimizer, self._num_batches = optimizer, int(grad_accum_steps)
        self._sums: list[Any] = []
        self._given: tuple[Any, ...] = ()

    @property
    def grad_accum_steps(self) -> int:
        return self._num_batches

    def compute_gradients(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Of one batch."""
        return self._optimizer.compute_gradients(*args, **kwargs)

    def apply_gradients(
        self: Any, grads_and_vars: Any, global_step: Any = None, name: Any = None
    ) -> Any:
        """Accumulate, and update if this is the last batch of a step."""
        return self.apply_mean(self.accumulate(grads_and_vars), global_step, name)

    def accumulate(self: Any, grads_and_vars: Iterable[tuple[Any, Any]]) -> Pairs:
        """Add the gradients of a batch: (the sums so far divided by grad_accum_steps, variable)."""
        pairs = [(g, v) for g, v in grads_and_vars if g is not None]
        self._given = tuple(gradient for gradient, _ in pairs)
        if recording_now() is not None:
            return pairs
        pairs = [(tf.convert_to_tensor(gradient), variable) for gradient, variable in pairs]
        self._sums = [_local_zeros(f"{v.op.name}/GradAccum", g.shape, g.dtype) for g, v in pairs]
        return [
            (total.assign_add(gradient) / self._num_batches, variable)
            for total, (gradient, variable) in zip(self._sums, pairs, strict=True)
        ]

    def apply_mean(
        self: Any, grads_and_vars: Pairs, global_step: Any = None, name: Any = None, **kwargs: Any
    ) -> Any:
        """Update with what `accumulate` gave, perhaps clipped, if this is the last batch of a step.

        kwargs are the inner optimizer's.
        """
        watched = recording_now()
        if watched is not None:
            _refuse_scale_outside(watched.wrappers)
            with watched.within(Accumulated(num_batches=self._num_batches, given=self._given)):
                return self._optimizer.apply_gradients(grads_and_vars, global_step)
        batches = _local_zeros("grad_accum_batches", [], tf.int64).assign_add(1)

        def update() -> Any:
            done = self._optimizer.apply_gradients(grads_and_vars, global_step, **kwargs)
            with tf.control_dependencies([done]):
                cleared = [total.assign(tf.zeros_like(total)).op for total in self._sums]
            with tf.control_dependencies(cleared):
                return tf.constant(True)

        with tf.control_dependencies([gradient for gradient, _ in grads_and_vars]):
            last = tf.equal(batches % self._num_batches, 0)
        return tf.group(tf.cond(last, update, lambda: tf.constant(False)), name=name)

    # What the optimizer inside keeps.

    def get_slot(self: Any, var: Any, name: str) -> Any:
        return self._optimizer.get_slot(var, name)

    def get_slot_names(self: Any) -> list[str]:
        return self._optimizer.get_slot_names()

    def variables(self: Any) -> list[Any]:
        return self._optimizer.variables()


def _local_zeros(name: str, shape: Any, dtype: Any) -> Any:
    """A variable of this session, which no checkpoint holds. It is initialized before there are
    batches, whatever the optimizer is called under the control of."""
    with tf.name_scope(""), tf.control_dependencies(None):
        return tf.compat.v1.Variable(
            lambda: tf.zeros(shape, dtype),
            trainable=False,
            collections=[tf.compat.v1.GraphKeys.LOCAL_VARIABLES],
            name=name,
            use_resource=True,
        )


def _refuse_scale_outside(wrappers: tuple[Any, ...]) -> None:
    if any(isinstance(wrapper, ScaledLoss) for wrapper in wrappers):
        raise CaptureError(
            "a loss scale stands around GradAccumOptimizer, and would skip single batches",
            allowed="GradAccumOptimizer(wrap_optimizer(optimizer, loss_scale), grad_accum_steps)",
        )

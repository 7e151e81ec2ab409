"""The learning rate of a train_op as a function of the global step.

Decides that the expression is computed by TensorFlow itself, at the step that is asked for: every
decay there is, and any that a user writes, is exact that way. Does not decide when a rate is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openwafer.errors import CaptureError
from openwafer.frontends.tf.importing import ancestors, handle_names
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.places import user_line

__all__ = ["function_of_step"]


def function_of_step(graph: Any, global_step: Any, value: Any) -> Callable[[int], float]:
    """`value` at a global step: a number, a tensor of the graph, or a function that gives either.

    Raises:
        CaptureError: it depends on more than the global step.
    """
    if not tf.is_tensor(value) and callable(value):
        with graph.as_default():
            made: Any = value()
        return function_of_step(graph, global_step, made)
    if not tf.is_tensor(value):
        number = float(value)
        return lambda step: number
    static = tf.get_static_value(value)
    if static is not None:
        known = float(static)
        return lambda step: known
    _require_step_only(graph, global_step, value)
    return _Evaluated(graph, global_step, value)


def _require_step_only(graph: Any, global_step: Any, value: Any) -> None:
    handles = handle_names(graph)
    for operation in ancestors([value]):
        variable: Any = handles.get(operation.outputs[0].name) if operation.outputs else None
        reads_batch = operation.type in ("Placeholder", "IteratorGetNext")
        if reads_batch or (variable is not None and variable is not global_step):
            file, line = user_line(value.op)
            what = "the batch" if variable is None else f"the variable {variable.op.name}"
            raise CaptureError(
                f"the learning rate depends on {what}",
                where=f"{file}:{line}" if file else "",
                allowed="an expression of the global step and of numbers",
            )


class _Evaluated:
    """A tensor that depends on the global step alone, computed in a session when it is asked for.
    The last values are kept: the loop asks for a step's rate more than once."""

    def __init__(self, graph: Any, global_step: Any, value: Any) -> None:
        self._step, self._value = global_step, value
        on_cpu = tf.compat.v1.ConfigProto(
            device_count={"GPU": 0},
            intra_op_parallelism_threads=1,
            inter_op_parallelism_threads=1,
        )
        self._session = tf.compat.v1.Session(graph=graph, config=on_cpu)
        self._known: dict[int, float] = {}

    def __call__(self, step: int) -> float:
        if step not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            initial = self._step.initializer.inputs[1]
            self._session.run(self._step.initializer, feed_dict={initial: step})
            self._known[step] = float(self._session.run(self._value))
        return self._known[step]

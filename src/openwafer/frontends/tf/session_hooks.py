"""Hooks of TensorFlow in a compiled run: those of `train(hooks=…)` and of a spec's training_hooks.

Decides when each of their methods is called, and what they are given in the place of a session: it
knows the loss, the global step, and what follows from the step alone. A hook that asks for more is
named once, and not called again. Does not decide when a step is made (train/loop.py).

A CheckpointSaverHook says how often checkpoints are written, as it does to an Estimator; what it
would write is written by the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from openwafer.errors import CaptureError, ConfigError
from openwafer.frontends.tf.grad_accum_hooks import is_for_tensorflow_alone
from openwafer.frontends.tf.learning_rate import function_of_step
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import ModelGraph
from openwafer.runtime.executor import Batch
from openwafer.train.hooks import Hooks
from openwafer.train.signals import StopRequest

__all__ = ["SessionHooks", "check_hooks", "checkpoint_steps", "hooks_of", "say_left_out"]

_log = logging.getLogger("openwafer")


def check_hooks(hooks: Sequence[Any] | None) -> None:
    """Raises: ConfigError: something among them is no hook."""
    for hook in hooks or ():
        if not isinstance(hook, tf.estimator.SessionRunHook):
            raise ConfigError(
                f"train was given a hook of type {type(hook).__name__}",
                allowed="objects of tf.estimator.SessionRunHook",
            )


def say_left_out(hooks: Sequence[Any] | None) -> None:
    """Name the hooks of an evaluation or a prediction: no step of theirs is called."""
    for hook in hooks or ():
        _log.warning(
            "%s is not called: a compiled run calls hooks in training alone; use_cs=False calls it",
            type(hook).__name__,
        )


def hooks_of(spec: Any, given: Sequence[Any] | None) -> list[Any]:
    """All hooks of a training run, but for those that a compiled run loses nothing without."""
    found = [*(given or ()), *(spec.training_hooks or ()), *(spec.training_chief_hooks or ())]
    return [hook for hook in found if not is_for_tensorflow_alone(hook)]


def checkpoint_steps(hooks: Sequence[Any], model_dir: Path, configured: int) -> int:
    """Steps between two checkpoints: those of a CheckpointSaverHook, if there is one."""
    for hook in hooks:
        if not isinstance(hook, tf.estimator.CheckpointSaverHook):
            continue
        steps = hook._timer._every_steps
        if steps is not None and Path(hook._checkpoint_dir).resolve() == model_dir.resolve():
            configured = steps
        else:
            _leave_out(hook, "checkpoints by the clock or elsewhere than in model_dir")
        if hook._listeners:
            _leave_out(hook._listeners[0], "a session when a checkpoint is written")
    return configured


def _leave_out(what: Any, needs: str) -> None:
    _log.warning(
        "%s asks for %s, which a compiled run does not have: it is not called. There are the loss, "
        "the global step and what follows from it; a host_call is given any tensor",
        type(what).__name__,
        needs,
    )


class _UnknownError(Exception):
    """A hook asks for this."""


class _Known:
    """In the place of a session.

    step: the global step. loss: of the step before; None ahead of the first.
    """

    def __init__(self, model: ModelGraph, step: int) -> None:
        self.graph = model.graph
        self.step = step
        self.loss: float | None = None
        self._model = model
        self._functions: dict[str, Callable[[int], float]] = {}

    def run(
        self, fetches: Any, feed_dict: Any = None, options: Any = None, run_metadata: Any = None
    ) -> Any:
        """The values of a structure of tensors, by tensor, name or variable.

        Raises:
            _UnknownError: there is one that depends on more than loss and step.
        """
        if feed_dict:
            raise _UnknownError("other values for tensors")
        return tf.nest.map_structure(self._value, fetches)

    def __getattr__(self, name: str) -> Any:
        raise _UnknownError(f"`{name}` of a session")

    def _value(self, fetch: Any) -> Any:
        element = self.graph.as_graph_element(fetch)
        if isinstance(element, tf.Operation):
            if element is self._model.spec.train_op:
                return None
            raise _UnknownError(f"the operation {element.name}")
        if element.name == self._model.spec.loss.name and self.loss is not None:
            return element.dtype.as_numpy_dtype(self.loss)
        if element.name not in self._functions:
            self._functions[element.name] = self._function(element)
        return element.dtype.as_numpy_dtype(self._functions[element.name](self.step))

    def _function(self, tensor: Any) -> Callable[[int], float]:
        model = self._model
        if tensor.shape.rank != 0 or not (tensor.dtype.is_floating or tensor.dtype.is_integer):
            raise _UnknownError(tensor.name)
        try:
            return function_of_step(model.graph, model.global_step, tensor)
        except CaptureError as error:
            raise _UnknownError(tensor.name) from error


class SessionHooks(Hooks):
    """Calls hooks of TensorFlow in the loop.

    Args:
        stop: is asked where a hook requests a stop.
        step: the global step to go on from.
    """

    def __init__(
        self, hooks: Sequence[Any], model: ModelGraph, stop: StopRequest, *, step: int
    ) -> None:
        self._stop, self._model = stop, model
        # What these do, the run does.
        self._called = [h for h in hooks if not isinstance(h, tf.estimator.CheckpointSaverHook)]
        self._session: Any = _Known(model, step)
        self._asked: list[tuple[Any, Any]] | None = None
        self._context: Any = None

    def on_train_start(self) -> None:
        losses = tf.compat.v1.GraphKeys.LOSSES
        with self._model.graph.as_default():
            if self._model.spec.loss not in self._model.graph.get_collection(losses):
                self._model.graph.add_to_collection(losses, self._model.spec.loss)
            for hook in self._called:
                hook.begin()
        coordinator = tf.train.Coordinator()
        self._each(lambda hook: hook.after_create_session(self._session, coordinator))

    def on_train_batch_start(self, data: Batch) -> Batch:
        """Ahead of the first microbatch of a step."""
        if self._asked is None and self._called:
            train_op = tf.estimator.SessionRunArgs(self._model.spec.train_op)
            self._context = tf.estimator.SessionRunContext(train_op, self._session)
            self._asked = self._each(lambda hook: hook.before_run(self._context))
        return data

    def on_train_batch_end(self, loss: torch.Tensor, epoch: int, step: int) -> None:
        asked, self._asked = dict(self._asked or ()), None
        if not asked:
            return
        self._session.loss, self._session.step = float(loss), step
        self._each(lambda hook: self._after_run(hook, asked[hook]))
        if self._context.stop_requested:
            _log.info("a hook asks for the end of training at global step %d", step)
            self._stop.request()

    def _after_run(self, hook: Any, arguments: Any) -> None:
        results = None
        if arguments is not None:
            results = self._session.run(arguments.fetches, arguments.feed_dict)
        values = tf.estimator.SessionRunValues(results, None, None)
        hook.after_run(self._context, values)

    def on_train_end(self, early_exit: bool) -> None:
        self._each(lambda hook: hook.end(self._session))

    def _each(self, call: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
        """What the hooks gave; one that asks for what is not known is not called again."""
        given: list[tuple[Any, Any]] = []
        with self._model.graph.as_default():
            for hook in list(self._called):
                try:
                    given.append((hook, call(hook)))
                except _UnknownError as error:
                    self._called.remove(hook)
                    _leave_out(hook, str(error))
        return given

"""Hooks for a run of TensorFlow itself that accumulates gradients.

Decides what is written and logged where several batches make one step: values are means over the
batches of a step, and a step is due when the global step says so. TensorFlow's own hooks look at
single batches. A compiled run logs steps by itself and calls none of these.

Names: section 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = [
    "GradAccumLoggingTensorHook",
    "GradAccumStepCounterHook",
    "GradAccumSummarySaverHook",
    "get_grad_accum_hooks",
    "is_for_tensorflow_alone",
]

_log = logging.getLogger("openwafer")


class _EachStep(tf.estimator.SessionRunHook):
    """Calls `on_step` after the last batch of each global step.

    Args:
        tensors: scalars, by name; their means over the batches of a step are passed on.
        every_n_steps: global steps between two calls.
    """

    def __init__(self, tensors: Mapping[str, Any], every_n_steps: int) -> None:
        self._tensors, self._every = dict(tensors), max(1, every_n_steps)
        self._sums: dict[str, float] = {}
        self._num_batches = 0
        self._step = 0

    def on_step(self, step: int, means: dict[str, float]) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        self._global_step = tf.compat.v1.train.get_or_create_global_step()

    def after_create_session(self, session: Any, coord: Any) -> None:
        self._step = int(session.run(self._global_step))
        self._forget()

    def before_run(self, run_context: Any) -> Any:
        return tf.estimator.SessionRunArgs(self._tensors)

    def after_run(self, run_context: Any, run_values: Any) -> None:
        for name, value in run_values.results.items():
            self._sums[name] += float(value)
        self._num_batches += 1
        # Read by itself: within the run it may be seen before or after the update.
        step = int(run_context.session.run(self._global_step))
        if step == self._step:
            return
        self._step = step
        if step % self._every == 0:
            means = {name: total / self._num_batches for name, total in self._sums.items()}
            self.on_step(step, means)
        self._forget()

    def _forget(self) -> None:
        self._sums, self._num_batches = dict.fromkeys(self._tensors, 0.0), 0


class GradAccumSummarySaverHook(_EachStep):
    """Writes scalars to `output_dir` for TensorBoard, one value for a step."""

    def __init__(
        self, summary_dict: Mapping[str, Any], save_summary_steps: int, output_dir: str
    ) -> None:
        super().__init__(summary_dict, save_summary_steps)
        self._output_dir = output_dir

    def on_step(self, step: int, means: dict[str, float]) -> None:
        values = [
            tf.compat.v1.Summary.Value(tag=name, simple_value=mean) for name, mean in means.items()
        ]
        writer = tf.compat.v1.summary.FileWriterCache.get(self._output_dir)
        writer.add_summary(tf.compat.v1.Summary(value=values), step)

    def end(self, session: Any) -> None:
        tf.compat.v1.summary.FileWriterCache.get(self._output_dir).flush()


class GradAccumStepCounterHook(_EachStep):
    """Logs how many global steps a second were done."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__({}, every_n_steps)
        self._before = (0, 0.0)

    def after_create_session(self, session: Any, coord: Any) -> None:
        super().after_create_session(session, coord)
        self._before = (self._step, time.monotonic())

    def on_step(self, step: int, means: dict[str, float]) -> None:
        before, since = self._before
        self._before = (step, time.monotonic())
        seconds = max(self._before[1] - since, 1e-9)
        _log.info("global_step/sec: %g", (step - before) / seconds)


class GradAccumLoggingTensorHook(_EachStep):
    """Logs scalars, one value for a step."""

    def __init__(self, logging_dict: Mapping[str, Any], every_n_steps: int) -> None:
        super().__init__(logging_dict, every_n_steps)

    def on_step(self, step: int, means: dict[str, float]) -> None:
        shown = ", ".join(f"{name} = {mean:g}" for name, mean in means.items())
        _log.info("global step %d: %s", step, shown)


def get_grad_accum_hooks(
    trainer: Any,
    runconfig_params: Mapping[str, Any],
    summary_dict: Mapping[str, Any] | None = None,
    logging_dict: Mapping[str, Any] | None = None,
) -> list[Any]:
    """The hooks of a training spec, `CSEstimatorSpec(…, training_hooks=hooks)`; [] for a trainer
    that does not accumulate.

    Args:
        trainer: whose train_op it is.
        runconfig_params: the `runconfig` section: model_dir, save_summary_steps,
            log_step_count_steps.
        summary_dict, logging_dict: scalars of a batch by name, such as {"loss": total_loss}.
    """
    if not trainer.is_grad_accum():
        return []
    to_save = int(runconfig_params.get("save_summary_steps") or 100)
    to_log = int(runconfig_params.get("log_step_count_steps") or to_save)
    hooks: list[Any] = [GradAccumStepCounterHook(to_log)]
    if summary_dict:
        folder = str(runconfig_params["model_dir"])
        hooks.append(GradAccumSummarySaverHook(summary_dict, to_save, folder))
    if logging_dict:
        hooks.append(GradAccumLoggingTensorHook(logging_dict, to_log))
    return hooks


def is_for_tensorflow_alone(hook: Any) -> bool:
    """Whether a compiled run loses nothing without this hook."""
    return isinstance(hook, _EachStep)

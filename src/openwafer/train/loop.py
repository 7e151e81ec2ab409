"""The training loop.

Decides what happens when: which step is logged, checked, saved, when an evaluation runs, and how a
run ends. Does not decide how a step is executed (runtime/), what a checkpoint holds
(checkpoint.py) or where a run starts (job.py).

Rules of release 1.6 that are kept: a step is logged every `log_steps` and at the end, saved every
`checkpoint_steps` and at the end. Two are made stricter. A loss that is not finite stops the run at
the step at which it was applied to the weights, not only at the next logged one: nothing that a
checkpoint takes is ever beyond it, and the layer can still be told. One whose update the loss
scaler skipped is only looked at where 1.6 looks, at logged steps, and before a checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals

import torch

from openwafer.config.runconfig import RunConfig
from openwafer.errors import DataError, NumericsError, StreamingError
from openwafer.runtime.executor import Batch, Executor, StepResult
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder
from openwafer.streaming.source import BatchSource
from openwafer.train.evaluation import EvalResult, EvalTools, evaluate, open_epoch, samples_in
from openwafer.train.performance import Meter, Performance
from openwafer.train.position import Budget, Progress, training_budget
from openwafer.train.summaries import EvalRecorder, TrainRecorder

__all__ = ["TrainResult", "TrainTools", "train"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTools(EvalTools):
    """What training talks to besides the executor and the data. `save` writes a checkpoint of the
    executor at a place; `eval_recorder` is needed with an evaluation source; `timeline` is told
    where a step begins and ends, and of the wait for its batches."""

    recorder: TrainRecorder
    save: Callable[[Progress], Path]
    eval_recorder: EvalRecorder | None = None
    timeline: Recorder = NO_RECORDER


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How training ended.

    last_loss: of the last step, None if there was none. stopped_by: the signal that ended it early.
    checkpoint: the last one written by this run. evaluation: the last one made.
    """

    progress: Progress
    performance: Performance
    last_loss: float | None = None
    stopped_by: Signals | None = None
    checkpoint: Path | None = None
    evaluation: EvalResult | None = None


def train(
    executor: Executor,
    source: BatchSource,
    eval_source: BatchSource | None = None,
    *,
    run: RunConfig,
    learning_rate_at: Callable[[int], float],
    tools: TrainTools,
    grad_accum_steps: int = 1,
    start: Progress | None = None,
) -> TrainResult:
    """Train from `start` to the end that `run` sets. With `eval_source`, evaluate after each epoch
    (`steps_per_epoch` makes shorter ones) and at the end.

    The executor already holds the state that belongs to `start`.

    Raises:
        ConfigError, DataError: see `training_budget` and `evaluate`.
        NumericsError: a loss is not finite, where `check_loss_values` is on.
        CheckpointError: a checkpoint could not be written.
        StreamingError: the data ended with an error; a checkpoint has been saved.
    """
    start = start or Progress()
    budget = training_budget(
        run, num_batches=source.num_batches, grad_accum_steps=grad_accum_steps, start=start
    )
    loop = _Loop(executor, source, eval_source, run, learning_rate_at, tools, budget, start)
    return loop.run()


class _Loop:
    """One call of `train`: the fixed parts, and where it stands."""

    def __init__(
        self,
        executor: Executor,
        source: BatchSource,
        eval_source: BatchSource | None,
        run: RunConfig,
        learning_rate_at: Callable[[int], float],
        tools: TrainTools,
        budget: Budget,
        start: Progress,
    ) -> None:
        self._executor, self._source, self._eval_source = executor, source, eval_source
        self._run, self._learning_rate_at, self._tools = run, learning_rate_at, tools
        self._budget = budget
        self._progress = start
        self._last: StepResult | None = None
        self._logged_step = start.global_step
        self._saved_step: int | None = None
        self._checkpoint: Path | None = None
        self._evaluation: EvalResult | None = None
        self._evaluated_step: int | None = None

    def run(self) -> TrainResult:
        tools = self._tools
        tools.reporter.train_started(
            step=self._progress.global_step, final_step=self._budget.final_step(self._progress)
        )
        tools.metrics.reset()
        tools.hooks.on_train_start()
        if self._run.save_initial_checkpoint:
            self._save()
        try:
            while not self._budget.over(self._progress) and not self._stopping:
                self._epoch()
        except StreamingError:
            # The data are gone; the last whole step is worth a checkpoint all the same.
            if self._last is not None:
                self._save()
            raise
        tools.meter.stop()
        self._finish()
        stopped = None if self._budget.over(self._progress) else tools.stop.requested
        tools.hooks.on_train_end(stopped is not None)
        return TrainResult(
            progress=self._progress,
            performance=tools.meter.result(),
            last_loss=None if self._last is None else float(self._last.loss),
            stopped_by=stopped,
            checkpoint=self._checkpoint,
            evaluation=self._evaluation,
        )

    @property
    def _stopping(self) -> bool:
        return self._tools.stop.requested is not None

    def _epoch(self) -> None:
        """From where the run stands to the end of the epoch, of training, or to a stop."""
        self._tools.hooks.on_train_epoch_start()
        first = self._progress
        with open_epoch(self._source, epoch=first.epoch, start=first.batch) as batches:
            for group in self._groups(batches):
                self._step(group)
                if self._stopping or self._budget.over(self._progress):
                    break
        early_exit = self._stopping and not self._budget.over(self._progress)
        self._tools.hooks.on_train_epoch_end(early_exit)
        if early_exit:
            return
        if first.batch == 0 and self._progress == first:
            raise DataError(
                f"epoch {first.epoch} gave too few batches for one step",
                where="train_input",
                allowed=f"at least {self._budget.batches_per_step} (`grad_accum_steps`)",
                hint="with `drop_last`, the batch size must not be larger than the data set",
            )
        self._evaluate()
        if not self._budget.over(self._progress) and not self._stopping:
            self._progress = self._progress.next_epoch()

    def _groups(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        """The microbatches of one step after another, while the epoch has whole steps."""
        size = self._budget.batches_per_step
        while not self._budget.epoch_over(self._progress):
            group: list[Batch] = []
            timeline = self._tools.timeline
            timeline.begin_step(self._progress.global_step)
            with self._tools.meter.waiting(), timeline.span("input", "batches"):
                for batch in batches:
                    group.append(batch)
                    if len(group) == size:
                        break
            if len(group) < size:
                timeline.abandon_step()
                return
            yield group

    def _step(self, group: list[Batch]) -> None:
        tools, before = self._tools, self._progress
        group = [tools.hooks.on_train_batch_start(batch) for batch in group]
        result = self._executor.train_step(group, step=before.global_step)
        self._progress = before.after_step(len(group))
        self._last = result
        step, final = self._progress.global_step, self._budget.over(self._progress)
        tools.meter.count(sum(samples_in(batch) for batch in group))
        to_log = final or _due(step, self._run.log_steps)
        to_save = _due(step, self._run.checkpoint_steps) or (
            final and self._run.checkpoint_steps > 0
        )
        if self._run.check_loss_values:
            # The executors make no update for such a loss, so the weights are still good.
            self._require_finite(result.loss, group, step=before.global_step)
        if result.metrics:
            tools.metrics.update(result.metrics)
        tools.hooks.on_train_batch_end(result.loss, before.epoch, step)
        tools.reporter.step_done(step)
        if to_log:
            self._log_step(result)
        tools.timeline.end_step()
        if to_save:
            self._save()

    def _require_finite(self, loss: torch.Tensor, group: list[Batch], *, step: int) -> None:
        value = float(loss)
        if math.isfinite(value):
            return
        saved = f"go on from {self._checkpoint.name} with" if self._checkpoint else "use"
        raise NumericsError(
            f"the loss is {value} at global step {step + 1}",
            where=self._executor.explain_nonfinite(group, step=step),
            allowed="a finite loss",
            hint=f"{saved} a lower learning rate or gradient clipping; "
            "`runconfig.check_loss_values: False` trains on all the same",
        )

    def _log_step(self, result: StepResult) -> None:
        tools, step = self._tools, self._progress.global_step
        rate = tools.meter.rate_since_last()
        loss = float(result.loss)
        tools.reporter.log_step(
            step, loss=loss, rate=rate, global_rate=tools.meter.result().samples_per_sec
        )
        values = tools.metrics.compute() if result.metrics else {}
        tools.metrics.reset()
        tools.recorder.log_step(
            step,
            loss=loss,
            learning_rate=self._learning_rate_at(step - 1),
            samples_per_sec=rate,
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            metrics=values,
        )
        self._logged_step = step

    def _save(self) -> None:
        step = self._progress.global_step
        if self._saved_step == step:
            return
        self._checkpoint = self._tools.save(self._progress)
        self._saved_step = step
        self._tools.reporter.checkpoint_saved(step)

    def _evaluate(self) -> None:
        step = self._progress.global_step
        if self._eval_source is None or self._stopping or self._evaluated_step == step:
            return
        # Its batches are neither samples trained on nor time spent training.
        tools: EvalTools = replace(self._tools, meter=Meter())
        with self._tools.meter.paused():
            result = evaluate(
                self._executor, self._eval_source, run=self._run, step=step, tools=tools
            )
            if not result.complete:
                return
            self._evaluation, self._evaluated_step = result, step
            tools.reporter.evaluated(avg_loss=result.avg_loss, metrics=result.metrics)
            if self._tools.eval_recorder is not None:
                self._tools.eval_recorder.log_evaluation(
                    step, avg_eval_loss=result.avg_loss, metrics=result.metrics
                )

    def _finish(self) -> None:
        """What the last step could not know to be due: the data or a signal ended the run. And
        the evaluation of a run that was killed between its last step and its end."""
        stopped_early = self._stopping and not self._budget.over(self._progress)
        if self._last is not None and self._logged_step != self._progress.global_step:
            self._log_step(self._last)
        if stopped_early or (self._last is not None and self._run.checkpoint_steps > 0):
            self._save()
        self._evaluate()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

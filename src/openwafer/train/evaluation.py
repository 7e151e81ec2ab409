"""One evaluation: forward passes over the evaluation data, averaged.

Decides how many batches it takes and what it averages: the loss is the plain mean over batches, as
documented for `avg_eval_loss`; the metrics keep their own counts. Does not decide when a training
run evaluates (loop.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from openwafer.config.runconfig import RunConfig
from openwafer.errors import ConfigError, DataError, NumericsError
from openwafer.runtime.executor import Batch, Executor
from openwafer.streaming.source import BatchSource
from openwafer.train.hooks import Hooks, MetricFunctions
from openwafer.train.performance import Meter
from openwafer.train.progress import Reporter
from openwafer.train.signals import StopRequest

__all__ = [
    "EvalResult",
    "EvalTools",
    "evaluate",
    "num_eval_batches",
    "open_epoch",
    "samples_in",
    "timed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """complete: False where a stop was asked for before the last batch."""

    avg_loss: float
    metrics: Mapping[str, float]
    num_batches: int
    num_samples: int
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalTools:
    """What an evaluation talks to besides the executor and the data."""

    reporter: Reporter
    meter: Meter
    hooks: Hooks
    metrics: MetricFunctions
    stop: StopRequest


def evaluate(
    executor: Executor, source: BatchSource, *, run: RunConfig, step: int, tools: EvalTools
) -> EvalResult:
    """Evaluate the executor's weights, which are those after `step` optimizer steps.

    Raises:
        ConfigError: the source has no length and `eval_steps` is not given.
        DataError: there was no batch.
        NumericsError: a loss is not finite, where `check_loss_values` is on.
    """
    limit = num_eval_batches(run, source)
    tools.metrics.reset()
    tools.hooks.on_eval_start()
    total, num_batches, num_samples = 0.0, 0, 0
    with open_epoch(source, epoch=0, start=0) as batches:
        for batch in itertools.islice(timed(batches, tools.meter), limit):
            total += _evaluate_batch(executor, batch, run=run, step=step, tools=tools)
            num_batches += 1
            num_samples += samples_in(batch)
            if run.log_steps and num_batches % run.log_steps == 0:
                _log_batch(tools, num_batches, total / num_batches)
            if tools.stop.requested is not None and num_batches < limit:
                break
    if num_batches == 0:
        raise DataError(
            "the evaluation data gave no batch",
            where="eval_input",
            hint="with `drop_last`, the batch size must not be larger than the data set",
        )
    complete = tools.stop.requested is None or num_batches == limit
    result = EvalResult(
        avg_loss=total / num_batches,
        metrics=tools.metrics.compute(),
        num_batches=num_batches,
        num_samples=num_samples,
        complete=complete,
    )
    tools.metrics.reset()
    tools.hooks.on_eval_end(not complete)
    return result


def num_eval_batches(run: RunConfig, source: BatchSource) -> int:
    """How many batches one evaluation takes: `eval_steps`, at most those that there are.

    Raises:
        ConfigError: the source has no length and `eval_steps` is not given.
    """
    limits = [limit for limit in (run.eval_steps, source.num_batches) if limit is not None]
    if not limits:
        raise ConfigError(
            "the evaluation data loader has no length",
            where="runconfig.eval_steps",
            allowed="a number of batches",
            hint="add `eval_steps: 100` to `runconfig`",
        )
    return min(limits)


def samples_in(batch: Batch) -> int:
    """Samples in a batch: the first dimension of its first tensor; 1 if it has no dimension."""
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    items: Any = ()
    if isinstance(batch, Mapping):
        items = cast("Mapping[object, object]", batch).values()
    elif isinstance(batch, (list, tuple)):
        items = cast("list[object]", batch)
    return next((count for item in items if (count := samples_in(item))), 0)


@contextmanager
def open_epoch(
    source: BatchSource, *, epoch: int, start: int
) -> Generator[Iterator[Batch], None, None]:
    """The batches of an epoch, closed at the end even where they were not all taken: a source may
    hold worker processes and sockets until then."""
    batches = source.epoch(epoch, start)
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def timed(batches: Iterator[Batch], meter: Meter) -> Iterator[Batch]:
    """The batches; the time spent waiting for them goes to the meter."""
    while True:
        with meter.waiting():
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


_END = object()


def _evaluate_batch(
    executor: Executor, batch: Batch, *, run: RunConfig, step: int, tools: EvalTools
) -> float:
    batch = tools.hooks.on_eval_batch_start(batch)
    result = executor.eval_step(batch, step=step)
    loss = float(result.loss)
    if run.check_loss_values and not math.isfinite(loss):
        raise NumericsError(
            f"the evaluation loss is {loss} at global step {step}",
            where=executor.explain_nonfinite([batch], step=step),
            hint="set `runconfig.check_loss_values: False` to evaluate all the same",
        )
    tools.metrics.update(result.metrics)
    tools.meter.count(samples_in(batch))
    tools.hooks.on_eval_batch_end(result.loss, step)
    return loss


def _log_batch(tools: EvalTools, num_batches: int, mean_loss: float) -> None:
    rate = tools.meter.rate_since_last()
    global_rate = tools.meter.result().samples_per_sec
    tools.reporter.log_eval_step(num_batches, loss=mean_loss, rate=rate, global_rate=global_rate)

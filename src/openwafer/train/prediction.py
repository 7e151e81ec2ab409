"""One prediction run: forward passes over the data, and what the model says of each sample.

Decides how many batches it takes. Does not decide what is predicted (the model does) nor how it is
written (the model's metrics take it off the device; `MetricFunctions.compute` finishes them).
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

from openwafer.config.runconfig import RunConfig
from openwafer.errors import DataError
from openwafer.runtime.executor import Executor
from openwafer.streaming.source import BatchSource
from openwafer.train.evaluation import (
    EvalTools,
    num_eval_batches,
    open_epoch,
    samples_in,
    timed,
)

__all__ = ["PredictionResult", "predict"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionResult:
    """num_samples counts rows that only fill a batch too. complete: False where a stop was asked
    for before the last batch; nothing is written then."""

    num_batches: int
    num_samples: int
    complete: bool = True


def predict(
    executor: Executor, source: BatchSource, *, run: RunConfig, step: int, tools: EvalTools
) -> PredictionResult:
    """Run the model in its evaluation form over the data, once.

    Raises:
        ConfigError: the source has no length and `eval_steps` is not given.
        DataError: there was no batch.
    """
    limit = num_eval_batches(run, source)
    tools.metrics.reset()
    tools.hooks.on_eval_start()
    num_batches, num_samples = 0, 0
    with open_epoch(source, epoch=0, start=0) as batches:
        for batch in itertools.islice(timed(batches, tools.meter), limit):
            batch = tools.hooks.on_eval_batch_start(batch)
            result = executor.eval_step(batch, step=step)
            tools.metrics.update(result.metrics)
            num_batches += 1
            num_samples += samples_in(batch)
            tools.meter.count(samples_in(batch))
            tools.hooks.on_eval_batch_end(result.loss, step)
            if run.log_steps and num_batches % run.log_steps == 0:
                _log.info("| Predict Batch=%d of %d", num_batches, limit)
            if tools.stop.requested is not None and num_batches < limit:
                break
    if num_batches == 0:
        raise DataError("the data to predict gave no batch", where="predict_input")
    complete = tools.stop.requested is None or num_batches == limit
    if complete:
        tools.metrics.compute()
    tools.metrics.reset()
    tools.hooks.on_eval_end(not complete)
    return PredictionResult(num_batches=num_batches, num_samples=num_samples, complete=complete)

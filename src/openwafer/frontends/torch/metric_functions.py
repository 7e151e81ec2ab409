"""The host side of a run's metrics, as the loop calls it.

Decides what happens to them after each step and at the end, by mode: values are computed, or
predictions are written. Does not decide what a metric is (metrics/).
"""

from __future__ import annotations

import logging

from openwafer.frontends.torch.metrics import (
    PredictionWriter,
    compute_all_metrics,
    get_all_metrics,
    reset_all_metrics,
)
from openwafer.train.hooks import MetricFunctions, StepMetrics

__all__ = ["metric_functions"]

_log = logging.getLogger("openwafer")


def metric_functions(mode: str) -> MetricFunctions:
    """Those of a run in `mode`."""
    compute = _write_predictions if mode == "predict" else compute_all_metrics
    return MetricFunctions(update=_update, compute=compute, reset=reset_all_metrics)


def _update(updates: StepMetrics) -> None:
    metrics = get_all_metrics()
    for name, calls in updates.items():
        for tensors in calls:
            metrics[name].update_from_device(tensors)


def _write_predictions() -> dict[str, float]:
    """Close every PredictionWriter of the model: their files appear."""
    writers = [m for m in get_all_metrics().values() if isinstance(m, PredictionWriter)]
    if not any(writer.num_updates for writer in writers):
        _log.warning("the model called no PredictionWriter in its forward pass: nothing is written")
        return {}
    for writer in writers:
        count = int(writer.compute())
        _log.info("%d predictions in %s", count, writer.close())
    return {}

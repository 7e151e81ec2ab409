"""The places where a user's code may take part in the loop, and the metrics it keeps.

Decides their names (those documented for the runners of release 1.6) and that they do nothing by
default. Does not decide when they are called (loop.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from openwafer.runtime.executor import Batch

__all__ = ["Hooks", "MetricFunctions", "StepMetrics"]

StepMetrics = Mapping[str, Sequence[tuple[torch.Tensor, ...]]]


class Hooks:
    """Override what you need. `early_exit` is True where the run ended before its last step."""

    def on_train_start(self) -> None:
        return None

    def on_train_end(self, early_exit: bool) -> None:
        return None

    def on_train_epoch_start(self) -> None:
        return None

    def on_train_epoch_end(self, early_exit: bool) -> None:
        return None

    def on_train_batch_start(self, data: Batch) -> Batch:
        """Each microbatch before it is used; what is returned is used in its place."""
        return data

    def on_train_batch_end(self, loss: torch.Tensor, epoch: int, step: int) -> None:
        """After each optimizer step; `loss` is 0-d on the host, `step` the global step reached."""
        return

    def on_eval_start(self) -> None:
        return None

    def on_eval_end(self, early_exit: bool) -> None:
        return None

    def on_eval_batch_start(self, data: Batch) -> Batch:
        return data

    def on_eval_batch_end(self, loss: torch.Tensor, step: int) -> None:
        return None


def _no_update(metrics: StepMetrics) -> None:
    return None


def _no_values() -> dict[str, float]:
    return {}


def _no_reset() -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFunctions:
    """The host side of the metrics: `update` after each step with what the executor gave,
    `compute` for the values since the last `reset`."""

    update: Callable[[StepMetrics], None] = _no_update
    compute: Callable[[], dict[str, float]] = _no_values
    reset: Callable[[], None] = _no_reset

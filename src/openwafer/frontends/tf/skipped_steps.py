"""Steps that a loss scale skipped, which Adam's bias correction does not count.

Decides how far the optimizer's own steps are behind the global step while a run goes on. Does not
decide which step is skipped (runtime/update.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openwafer.runtime.executor import Batch, Executor, ExecutorAround, StepResult

__all__ = ["SkippedSteps", "StepsBehind"]


@dataclass(slots=True)
class StepsBehind:
    """How many global steps the optimizer has not seen, so far and in the runs before."""

    num_steps: int = 0


class SkippedSteps(ExecutorAround):
    """An executor that counts its steps without an update."""

    def __init__(self, executor: Executor, behind: StepsBehind) -> None:
        super().__init__(executor)
        self._behind = behind

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        result = super().train_step(microbatches, step=step)
        self._behind.num_steps += not result.applied
        return result

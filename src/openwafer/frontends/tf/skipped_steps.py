"""Steps that a loss scale skipped, which Adam's bias correction does not count.

Decides how far the optimizer's own steps are behind the global step while a run goes on. Does not
decide which step is skipped (runtime/update.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult

__all__ = ["SkippedSteps", "StepsBehind"]


@dataclass(slots=True)
class StepsBehind:
    """How many global steps the optimizer has not seen, so far and in the runs before."""

    num_steps: int = 0


class SkippedSteps(Executor):
    """An executor that counts its steps without an update."""

    def __init__(self, executor: Executor, behind: StepsBehind) -> None:
        self._executor, self._behind = executor, behind

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        result = self._executor.train_step(microbatches, step=step)
        self._behind.num_steps += not result.applied
        return result

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        return self._executor.eval_step(batch, step=step)

    def state(self) -> ModelState:
        return self._executor.state()

    def borrowed_state(self) -> ModelState:
        return self._executor.borrowed_state()

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self._executor.load_state(state, weights_only=weights_only)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        return self._executor.explain_nonfinite(microbatches, step=step)

    def counters(self) -> Mapping[str, int]:
        return self._executor.counters()

    def close(self) -> None:
        self._executor.close()

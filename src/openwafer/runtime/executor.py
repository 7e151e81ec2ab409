"""The seam between the training loop and whatever runs a step.

Decides what a step takes and gives. Does not decide how it is run: `layer_pipelined.py` and
`weight_streaming.py` here, and the plain PyTorch loop in `frontends/torch/plain.py`, are the
three implementations, and numerics must not tell them apart (design decision 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Batch", "Executor", "ExecutorAround", "ModelState", "StepResult"]

Batch = Any
"""What the user's data loader yields: a tensor, or a tuple, list or dict of them, nested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step (or one evaluation batch) gives.

    loss: mean over the microbatches, unscaled, 0-d on the host.
    applied: False where the update was skipped (an overflow under dynamic loss scaling).
    grad_norm: global norm before clipping, where clipping by norm is on.
    loss_scale: the scale in force during this step, where loss scaling is on.
    metrics: per metric name, the argument tuples for its host update, one per microbatch.
    """

    loss: torch.Tensor
    applied: bool = True
    grad_norm: float | None = None
    loss_scale: float | None = None
    metrics: Mapping[str, Sequence[tuple[torch.Tensor, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Everything an executor must save to go on bit for bit.

    model: the user's state_dict (tied names included), on the CPU.
    optimizer: per parameter name, its optimizer state (tensors and numbers), on the CPU.
    loss_scale: state of the loss scaler, empty where there is none.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, Any]]
    loss_scale: dict[str, float]

    def copied(self) -> ModelState:
        """The same in memory of its own; tied weights stay one tensor."""
        copies = {id(value): value.clone() for value in self.model.values()}
        return ModelState(
            model={name: copies[id(value)] for name, value in self.model.items()},
            optimizer={
                name: {
                    key: value.clone() if isinstance(value, torch.Tensor) else value
                    for key, value in entries.items()
                }
                for name, entries in self.optimizer.items()
            },
            loss_scale=dict(self.loss_scale),
        )


class Executor(ABC):
    """Runs steps of one model. `step` is the global step before the update, from 0."""

    @abstractmethod
    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        """Forward, backward and update on all microbatches (gradient accumulation)."""

    @abstractmethod
    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        """Forward only, in evaluation mode; nothing is updated."""

    @abstractmethod
    def state(self) -> ModelState:
        """A copy of the state after the last step, with every pending update applied."""

    def borrowed_state(self) -> ModelState:
        """`state` without a copy of the model where that can be: not to be written to, and valid
        until the next step. It may be the executor's own tensors, or views of a file."""
        return self.state()

    @abstractmethod
    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        """Take over a state. With `weights_only`, matching weights alone (fine-tuning)."""

    @abstractmethod
    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        """Run the same microbatches again, without an update, and name the first layer whose
        output is not finite. Called only after a loss that is NaN or infinite."""

    def counters(self) -> Mapping[str, int]:
        """What was counted since the start, by name with its unit; for `show_debug_metrics`."""
        return {}

    def close(self) -> None:
        """Free threads and files."""
        return


class ExecutorAround(Executor):
    """Another executor, passed through; what is different is overridden."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        return self._executor.train_step(microbatches, step=step)

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

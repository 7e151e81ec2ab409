"""A batch as several microbatches.

Decides how a batch is split: every tensor whose first dimension counts the samples is cut into
equal parts along it, anything else goes to each part whole. Each part then is a microbatch as
gradient accumulation has them: the loss is the mean over parts, and random draws are keyed by the
part's number. Does not decide into how many (pipeline_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from openwafer.runtime.executor import Batch, Executor, ExecutorAround, StepResult

__all__ = ["SplitBatches", "split_batch"]


def split_batch(batch: Batch, num_parts: int) -> list[Batch]:
    """Equal parts of a batch, in order; views of its tensors. `num_parts` divides its samples."""
    if num_parts == 1:
        return [batch]
    leaves, structure = pytree.tree_flatten(batch)
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    num_samples = sizes[0] if sizes else 0
    assert num_samples % num_parts == 0, f"{num_samples} samples in {num_parts} parts"
    per_part = num_samples // num_parts

    def part(leaf: object, index: int) -> object:
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == num_samples:
            return leaf[index * per_part : (index + 1) * per_part]
        return leaf

    return [
        pytree.tree_unflatten([part(leaf, index) for leaf in leaves], structure)
        for index in range(num_parts)
    ]


class SplitBatches(ExecutorAround):
    """An executor whose training batches are split before it takes them; evaluation's are not."""

    def __init__(self, executor: Executor, num_parts: int) -> None:
        super().__init__(executor)
        self._num_parts = num_parts
        self._trained_last = True

    def _split(self, batches: Sequence[Batch]) -> list[Batch]:
        return [part for batch in batches for part in split_batch(batch, self._num_parts)]

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        self._trained_last = True
        return super().train_step(self._split(microbatches), step=step)

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        self._trained_last = False
        return super().eval_step(batch, step=step)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        given = self._split(microbatches) if self._trained_last else microbatches
        return super().explain_nonfinite(given, step=step)

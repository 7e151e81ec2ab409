"""A process's part of a step of weight streaming.

Decides which microbatches of a step are its own, and how losses and norms of all become known to
all, so that every process takes the same decision. Does not decide how weights and gradients travel
(shared_store.py) or who tells a process to take a step (replicas.py).

Replica r of R takes the r-th of R equal stretches of a step's microbatches, and draws random
numbers as these microbatches' numbers say: R replicas do what one process does that accumulates
gradients over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stores.shared_store import SharedStore
from openwafer.runtime.update import UpdateRule

__all__ = ["GroupReplica", "Replica"]


class Replica:
    """A process that takes its steps alone."""

    rank = 0
    size = 1

    def first(self, num_own: int) -> int:
        """The number, in the step, of the first of this process's microbatches."""
        return self.rank * num_own

    def total(self, num_own: int) -> int:
        """How many microbatches the step has."""
        return self.size * num_own

    def all_losses(self, losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of every microbatch of the step, in order, from those of this process."""
        return list(losses)

    def norms(
        self, rule: UpdateRule, gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Norms that are known as soon as this process has summed some gradients."""
        return rule.norms(gradients)

    def all_norms(
        self, norms: dict[str, torch.Tensor], wait_for_returns: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """The norm of every weight's gradient, all being returned or on their way."""
        return norms


class GroupReplica(Replica):
    """One of several processes that share a store.

    Args:
        names: of the trained weights, in the model's order.
    """

    def __init__(self, group: ComputeGroup, store: SharedStore, names: Sequence[str]) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._store, self._names = group, store, tuple(names)

    def all_losses(self, losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = torch.zeros(self.total(len(losses)), dtype=torch.float64)
        first = self.first(len(losses))
        for index, loss in enumerate(losses):
            found[first + index] = loss.detach().double().cpu()
        with self._group.watching():
            dist.all_reduce(found)
        return list(found.float())

    def norms(
        self, rule: UpdateRule, gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """None yet: these gradients are this process's alone."""
        return {}

    def all_norms(
        self, norms: dict[str, torch.Tensor], wait_for_returns: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        wait_for_returns()
        place = {name: index for index, name in enumerate(self._names)}
        told = torch.zeros(2, len(place))
        for name, norm in self._store.take_norms().items():
            told[0, place[name]] = norm
            told[1, place[name]] = 1
        with self._group.watching():
            dist.all_reduce(told)
        return {name: told[0, i] for name, i in place.items() if told[1, i]}

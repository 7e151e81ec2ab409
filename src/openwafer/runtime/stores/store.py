"""The weight store: where weights and optimizer state live while they are not on the device.

Decides the seam (fetch, release, park, update, save, load), how weights are grouped into shards
(one for each layer that is the first to read a weight), and the store in host memory. Does not
decide when anything is fetched or updated (weight_traffic.py).

The optimizer runs here, one shard at a time, on the host; its state never sits on the device. Where
layers take 16-bit weights, the store keeps the copies, made once per update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state, optimizer_state
from openwafer.plan.layers import Layer
from openwafer.runtime.compiled import CompiledModel, StreamedWeight
from openwafer.runtime.stores.pinned_memory import PinnedTensors

__all__ = [
    "Copies",
    "Fetched",
    "Prepare",
    "RamStore",
    "Shard",
    "WeightStore",
    "copies_wanted",
    "make_shards",
]

Copies = Mapping[str, Collection[torch.dtype]]
"""Weight name → the other dtypes that layers take it in."""

Prepare = Callable[[Sequence[torch.Tensor]], None]
"""Changes gradients in place, element by element, just before the optimizer (clipping)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The weights that are updated together. `trained` are those that get gradients."""

    index: int
    names: tuple[str, ...]
    trained: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Weights on the host in the dtypes that were asked for, to be read only; valid until they are
    released or updated. `buffer` is the store's own, where they were copied to."""

    tensors: list[torch.Tensor]
    buffer: torch.Tensor | None = None


def make_shards(
    layers: Sequence[Layer], names: Sequence[str], trained: Sequence[str]
) -> tuple[Shard, ...]:
    """One shard per layer, by first reader; weights that no layer reads join the first shard."""
    owner = {name: i for i in range(len(layers) - 1, -1, -1) for name in layers[i].parameters}
    wanted = set(trained)
    shards: list[Shard] = []
    for index in range(max(len(layers), 1)):
        held = tuple(name for name in names if owner.get(name, 0) == index)
        shards.append(Shard(index=index, names=held, trained=tuple(n for n in held if n in wanted)))
    return tuple(shards)


def copies_wanted(models: Sequence[CompiledModel | None], weights: Mapping[str, Any]) -> Copies:
    """The dtypes, other than their own, in which the layers of some models take weights."""
    wanted: dict[str, set[torch.dtype]] = {}
    for model in models:
        for compiled in model.layers if model is not None else ():
            for streamed in compiled.streamed:
                if streamed.dtype != weights[streamed.name].dtype:
                    wanted.setdefault(streamed.name, set()).add(streamed.dtype)
    return wanted


class WeightStore(ABC):
    """Holds weights and optimizer state by shard. Calls come from one thread at a time, but for
    `fetches_beside_updates`.

    staging_bytes: the most host memory that the store takes for an update, besides what it keeps.
    fetches_beside_updates: whether a thread may fetch weights while another updates other shards.
    waits: whether it waits for something (a disk, other processes), which layers can hide.
    """

    staging_bytes: int = 0
    waits: bool = True
    fetches_beside_updates: bool = False

    @abstractmethod
    def fetch(self, wanted: Sequence[StreamedWeight]) -> Fetched:
        """Weights on the host, in the dtypes asked for."""

    def release(self, fetched: Fetched) -> None:
        """Nobody reads these weights any more."""
        return

    @abstractmethod
    def park(self, shard: Shard, gradients: Mapping[str, torch.Tensor]) -> None:
        """Keep gradients until the next update of the shard, which takes them with `None`."""

    @abstractmethod
    def update(
        self,
        shard: Shard,
        gradients: Mapping[str, torch.Tensor] | None,
        learning_rate: float,
        prepare: Prepare | None = None,
    ) -> None:
        """One optimizer step on a shard; gradients are on the host, None for the parked ones. The
        store may change them."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, by name: not to be written to, valid until the next update."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer state of all trained weights, by name; as valid as `weights`."""

    @abstractmethod
    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Take over weights, and optimizer state where it is given."""

    def close(self) -> None:
        return None


class RamStore(WeightStore):
    """Everything in host memory. On a CPU device nothing is copied: `fetch` gives the weights.

    Args:
        weights: trained in place.
        pin: put what is fetched into pinned memory, for a GPU to read: the 16-bit copies, and
            the weights that have none. Weights that have one, and all optimizer state, stay in
            ordinary memory; one that a further layer takes as it is, is read there more slowly.

    It waits for nothing: beside layers on the same cores an update only slows their products, by
    more than the update takes alone.
    """

    waits = False

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shards: Sequence[Shard],
        config: OptimizerConfig | None,
        *,
        copies: Copies | None = None,
        pin: bool = False,
    ) -> None:
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._copies: dict[str, dict[torch.dtype, torch.Tensor]] = {
            name: {dtype: self._weights[name].to(dtype) for dtype in dtypes}
            for name, dtypes in (copies or {}).items()
        }
        self._shards = tuple(shards)
        self._pinned = PinnedTensors()
        if pin:
            for shard in self._shards:
                self._pin(shard)
        self._parked: dict[int, Mapping[str, torch.Tensor]] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        if config is not None:
            for shard in shards:
                if shard.trained:
                    trained = {name: self._weights[name] for name in shard.trained}
                    self._optimizers[shard.index] = build_optimizer(config, trained)

    def _pin(self, shard: Shard) -> None:
        """Move what is fetched of a shard; what it was in before goes shard by shard."""
        copies = [(name, dtype) for name in shard.names for dtype in self._copies.get(name, ())]
        bare = [name for name in shard.names if not self._copies.get(name)]
        held = [self._copies[name][dtype] for name, dtype in copies]
        moved = self._pinned.copies_of(held + [self._weights[name] for name in bare])
        for (name, dtype), tensor in zip(copies, moved, strict=False):
            self._copies[name][dtype] = tensor
        self._weights.update(zip(bare, moved[len(copies) :], strict=True))

    def fetch(self, wanted: Sequence[StreamedWeight]) -> Fetched:
        return Fetched(tensors=[self._in_dtype(weight) for weight in wanted])

    def _in_dtype(self, wanted: StreamedWeight) -> torch.Tensor:
        weight = self._weights[wanted.name]
        if wanted.dtype == weight.dtype:
            return weight
        return self._copies[wanted.name][wanted.dtype]

    def park(self, shard: Shard, gradients: Mapping[str, torch.Tensor]) -> None:
        self._parked[shard.index] = gradients

    def update(
        self,
        shard: Shard,
        gradients: Mapping[str, torch.Tensor] | None,
        learning_rate: float,
        prepare: Prepare | None = None,
    ) -> None:
        optimizer = self._optimizers[shard.index]
        given = self._parked.pop(shard.index) if gradients is None else gradients
        if prepare is not None:
            prepare(list(given.values()))
        for name in shard.trained:
            self._weights[name].grad = given.get(name)
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        for name in shard.trained:
            self._weights[name].grad = None
        self._renew_copies(shard.trained)

    def _renew_copies(self, names: Sequence[str]) -> None:
        with torch.no_grad():
            for name in names:
                for copy in self._copies.get(name, {}).values():
                    copy.copy_(self._weights[name])

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach() for name, weight in self._weights.items()}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = {}
        for shard in self._shards:
            if shard.index in self._optimizers:
                optimizer = self._optimizers[shard.index]
                state.update(optimizer_state(optimizer, list(shard.trained)))
        return state

    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self._weights[name].copy_(value)
        self._renew_copies(list(self._copies))
        for shard in self._shards:
            if state and shard.index in self._optimizers:
                load_optimizer_state(self._optimizers[shard.index], list(shard.trained), state)

    def close(self) -> None:
        self._pinned.close()

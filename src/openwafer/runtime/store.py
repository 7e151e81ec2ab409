"""The weight store: where weights and optimizer state live while they are not on the device.

Decides the seam (fetch, update, save, load) and how weights are grouped into shards: one for each
layer that is the first to read a weight. Does not decide when anything is fetched or updated
(weight_streaming.py).

The optimizer runs here, one shard at a time, on the host; its state never sits on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state, optimizer_state
from openwafer.plan.layers import Layer

__all__ = ["RamStore", "Shard", "WeightStore", "make_shards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The weights that are updated together. `trained` are those that get gradients."""

    index: int
    names: tuple[str, ...]
    trained: tuple[str, ...]


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


class WeightStore(ABC):
    """Holds fp32 weights and optimizer state by shard. Calls come from one thread at a time."""

    @abstractmethod
    def fetch(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The weights on the host, to be read only, valid until their next update."""

    @abstractmethod
    def update(
        self, shard: Shard, gradients: Mapping[str, torch.Tensor], learning_rate: float
    ) -> None:
        """One optimizer step on a shard; `gradients` are fp32 on the host, ready to be applied."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of all weights, by name."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """A copy of the optimizer state of all trained weights, by name."""

    @abstractmethod
    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Take over weights, and optimizer state where it is given."""

    def close(self) -> None:
        return None


class RamStore(WeightStore):
    """Everything in host memory. On a CPU device nothing is copied: `fetch` gives the weights."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shards: Sequence[Shard],
        config: OptimizerConfig | None,
    ) -> None:
        self._weights = dict(weights)
        self._shards = tuple(shards)
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        if config is not None:
            for shard in shards:
                if shard.trained:
                    held = {name: self._weights[name] for name in shard.trained}
                    self._optimizers[shard.index] = build_optimizer(config, held)

    def fetch(self, names: Sequence[str]) -> list[torch.Tensor]:
        return [self._weights[name] for name in names]

    def update(
        self, shard: Shard, gradients: Mapping[str, torch.Tensor], learning_rate: float
    ) -> None:
        optimizer = self._optimizers[shard.index]
        for name in shard.trained:
            self._weights[name].grad = gradients.get(name)
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        for name in shard.trained:
            self._weights[name].grad = None

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self._weights.items()}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = {}
        for shard in self._shards:
            if shard.index in self._optimizers:
                held = optimizer_state(self._optimizers[shard.index], list(shard.trained))
                state.update(_copied(held))
        return state

    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self._weights[name].copy_(value)
        for shard in self._shards:
            if state and shard.index in self._optimizers:
                load_optimizer_state(self._optimizers[shard.index], list(shard.trained), state)


def _copied(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            key: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for key, value in entries.items()
        }
        for name, entries in state.items()
    }

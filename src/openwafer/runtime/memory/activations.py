"""What the forward pass leaves for the backward pass, layer by layer.

Decides how it is kept until then: as it is, as the layer's inputs alone (the layer runs forward a
second time, with the same random draws, so the same bits come out), or beside the weights in the
store (spill.py). Decides what counts as memory in use: each block of memory once, however many
tensors show it. Does not decide which layer is kept how (step_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from openwafer.runtime.compiled import CompiledLayer
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.memory.spill import Spill, Tensors
from openwafer.runtime.randomness import DrawKey

__all__ = ["Activations", "LiveTensors", "Policy"]

Policy = Literal["keep", "recompute", "spill"]


class LiveTensors:
    """The account of values and saved tensors: a block of memory that several show counts once."""

    def __init__(self, memory: DeviceMemory, purpose: str = "activations") -> None:
        self._memory, self._purpose = memory, purpose
        self._held: dict[int, int] = {}

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        new_bytes = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place not in self._held:
                new_bytes += storage.nbytes()
            self._held[place] = self._held.get(place, 0) + 1
        if new_bytes:
            self._memory.take(self._purpose, new_bytes)

    def drop(self, tensors: Iterable[torch.Tensor]) -> None:
        """Forget tensors that were held; the caller must still have them."""
        freed_bytes = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            self._held[place] -= 1
            if not self._held[place]:
                del self._held[place]
                freed_bytes += storage.nbytes()
        if freed_bytes:
            self._memory.give(self._purpose, freed_bytes)

    def drop_all(self) -> None:
        self._held.clear()
        self._memory.give_all(self._purpose)


class Activations:
    """Saved tensors of one step, each layer's by its policy.

    Args:
        policies: by layer.
        spill: where `spill` puts them; None where no layer does.
    """

    def __init__(
        self, policies: Sequence[Policy], live: LiveTensors, spill: Spill | None = None
    ) -> None:
        self._policies, self._live, self._spill = tuple(policies), live, spill
        self._kept: dict[tuple[int, int], Tensors] = {}
        self._again: dict[tuple[int, int], Tensors] = {}

    def keep(self, unit: tuple[int, int], inputs: Tensors, saved: Tensors) -> None:
        """Layer `unit[0]` has run forward on microbatch `unit[1]`."""
        policy = self._policies[unit[0]]
        if policy == "spill":
            assert self._spill is not None
            self._spill.put(unit, saved)
            return
        kept = inputs if policy == "recompute" else saved
        self._kept[unit] = kept
        self._live.hold(kept)

    def ask(self, index: int, num_microbatches: int) -> None:
        """The backward pass of layer `index` is next."""
        if self._policies[index] == "spill" and self._spill is not None:
            for microbatch in range(num_microbatches):
                self._spill.ask((index, microbatch))

    def stays(self, index: int) -> bool:
        """Whether anything of layer `index` stays in memory until its backward pass."""
        return self._policies[index] != "spill"

    def recomputes(self, index: int) -> bool:
        return self._policies[index] == "recompute"

    def recompute(
        self, unit: tuple[int, int], compiled: CompiledLayer, key: DrawKey, weights: Tensors
    ) -> None:
        """Run a layer forward again, for what it saves."""
        inputs = self._kept[unit]
        saved = compiled.functions.forward(key.at(compiled.first_draw), weights, inputs)[1]
        self._again[unit] = saved
        self._live.hold(saved)

    def get(self, unit: tuple[int, int]) -> Tensors:
        """What the backward pass needs; valid until `done`."""
        policy = self._policies[unit[0]]
        if policy == "spill":
            assert self._spill is not None
            return self._spill.get(unit)
        return self._again[unit] if policy == "recompute" else self._kept[unit]

    def done(self, unit: tuple[int, int]) -> None:
        if self._policies[unit[0]] == "spill" and self._spill is not None:
            self._spill.done(unit)
        for held in (self._kept, self._again):
            if unit in held:
                self._live.drop(held.pop(unit))

    def clear(self) -> None:
        """Forget what a step that was cut short has left."""
        self._kept.clear()
        self._again.clear()
        if self._spill is not None:
            self._spill.clear()

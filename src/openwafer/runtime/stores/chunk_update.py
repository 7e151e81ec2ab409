"""An optimizer's step on one chunk of a shard, in memory.

Decides how a chunk's new weights, state and 16-bit copies come about, and keeps the numbers that
are one per weight (a step count): every piece of a weight counts from the old ones, and the new
ones are the same for all. Does not decide where chunks come from (disk_store.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from openwafer.optim.build import set_learning_rate
from openwafer.runtime.stores.disk_record import WEIGHT, Chunk, Piece, Record, is_copy
from openwafer.runtime.stores.disk_staging import Views

__all__ = ["ChunkUpdates", "put_weights", "renew_copies"]

_Place = tuple[int, int]
"""(shard, the weight's position in it)."""


class ChunkUpdates:
    """Steps on chunks of one store's shards."""

    def __init__(self) -> None:
        self._scalars: dict[_Place, dict[str, torch.Tensor]] = {}
        self._new: dict[_Place, dict[str, torch.Tensor]] = {}

    def scalars(self, record: Record, position: int) -> Mapping[str, torch.Tensor]:
        """The numbers that a weight has."""
        return self._scalars.get((record.shard.index, position), {})

    def begin(
        self, record: Record, chunk: Chunk, optimizer: torch.optim.Optimizer, views: Views
    ) -> None:
        """Take over the first numbers from an optimizer that has just been made."""
        for number, piece in enumerate(chunk):
            state = optimizer.state[views[number, WEIGHT]]
            self._scalars[record.shard.index, piece.position] = {
                key: value.clone() for key, value in state.items() if not value.dim()
            }

    def step(
        self,
        record: Record,
        chunk: Chunk,
        views: Views,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[int, torch.Tensor],
        learning_rate: float,
    ) -> None:
        """One step on the pieces of `views` that have gradients (by number in the chunk)."""
        for number in gradients:
            weight = views[number, WEIGHT]
            weight.grad = gradients[number]
            for key, value in self.scalars(record, chunk[number].position).items():
                optimizer.state[weight][key].copy_(value)
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        for number in gradients:
            weight, piece = views[number, WEIGHT], chunk[number]
            weight.grad = None
            state = optimizer.state[weight]
            for key in record.state_keys[piece.position]:
                if state[key] is not views[number, key]:  # the optimizer made a new tensor
                    views[number, key].copy_(state[key])
                    state[key] = views[number, key]
            place = (record.shard.index, piece.position)
            if place not in self._new:
                self._new[place] = {key: state[key].clone() for key in self._scalars[place]}

    def end_shard(self, *, failed: bool) -> None:
        """All chunks of a shard have had their step: the new numbers count; after a failure not."""
        if not failed:
            self._scalars.update(self._new)
        self._new = {}

    def put_state(
        self, record: Record, chunk: Chunk, views: Views, state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Take over a loaded state, by name and entry; weights that it lacks stay as they are."""
        for number, piece in enumerate(chunk):
            entries = state.get(record.shard.names[piece.position], {})
            for key in record.state_keys.get(piece.position, ()) if entries else ():
                if entries[key] is None:  # torch's SGD before its first step
                    views[number, key].zero_()
                else:
                    _copy_part(views[number, key], torch.as_tensor(entries[key]), piece)
            for key, value in self.scalars(record, piece.position).items() if entries else ():
                # AdamW without bias correction counts from infinity, and stays there.
                if not (key == "step" and math.isinf(float(value))):
                    value.copy_(torch.as_tensor(entries[key]))


def put_weights(
    record: Record, chunk: Chunk, views: Views, weights: Mapping[str, torch.Tensor]
) -> None:
    """Take over those of a chunk's weights that are given, by name."""
    for number, piece in enumerate(chunk):
        name = record.shard.names[piece.position]
        if name in weights:
            _copy_part(views[number, WEIGHT], weights[name], piece)


def renew_copies(record: Record, chunk: Chunk, views: Views) -> None:
    """The weights in `views` have changed: make their copies again."""
    for number in range(len(chunk)):
        for region in record.regions:
            if is_copy(region) and (number, region) in views:
                views[number, region].copy_(views[number, WEIGHT])


def _copy_part(target: torch.Tensor, source: torch.Tensor, piece: Piece) -> None:
    """Fill `target` with the piece's elements of `source`, or with all of it where it is whole."""
    if target.shape == source.shape:
        target.copy_(source)
    else:
        target.copy_(source.reshape(-1)[piece.start : piece.stop])

"""A weight store that several processes share: each keeps a part and serves it to the others.

Decides who keeps what (whole shards, about the same bytes for each), and what travels: weights from
their owner to all at every fetch, gradients from all to the owner, summed on the way. So each
process holds its part of the weights and of the optimizer's state alone, and updates it alone. Does
not decide how a part is kept (store.py, disk_store.py) or when anything is fetched or returned.

Every process must fetch, park and update the same shards in the same order, which the executor's
store thread does: collectives have no names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from openwafer.optim.clip import gradient_norms
from openwafer.runtime.compiled import StreamedWeight
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stores.store import Fetched, Prepare, Shard, WeightStore

__all__ = ["SharedStore", "assign_owners"]

_ALIGNMENT_BYTES = 64


def assign_owners(shards: Sequence[Shard], sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """By shard, the process that keeps it: the largest first, each to who has least.

    Args:
        sizes: by weight name.
    """
    held = [0] * count
    owners = [0] * len(shards)
    size_of = [sum(sizes[name] for name in shard.names) for shard in shards]
    for index in sorted(range(len(shards)), key=lambda i: (-size_of[i], i)):
        owners[index] = min(range(count), key=lambda rank: (held[rank], rank))
        held[owners[index]] += size_of[index]
    return tuple(owners)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where one weight of a fetch is in its buffer."""

    position: int
    owner: int
    offset: int
    num_bytes: int


class SharedStore(WeightStore):
    """This process's part of a store, and the others' by way of it.

    Args:
        own: keeps the shards of which this process is the owner, and those alone.
        layouts: by weight name, a tensor of its shape and strides ("meta" will do).
        owners: as `assign_owners` gives them.
        group: the processes; all make their store at the same time.
    """

    def __init__(
        self,
        own: WeightStore,
        shards: Sequence[Shard],
        layouts: Mapping[str, torch.Tensor],
        owners: Sequence[int],
        group: ComputeGroup,
    ) -> None:
        self._own, self._group = own, group
        self._owner_of = {n: owners[s.index] for s in shards for n in s.names}
        self._owners = tuple(owners)
        self._layouts = {n: torch.empty_like(t, device="meta") for n, t in layouts.items()}
        # Of its own: other threads of the process talk over other groups.
        self._link: Any = group.subgroup(tuple(range(group.size)))
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lent: dict[int, Fetched] = {}
        self._norms: dict[str, torch.Tensor] = {}
        self.staging_bytes = own.staging_bytes

    # ------------------------------------------------------------------ weights

    def fetch(self, wanted: Sequence[StreamedWeight]) -> Fetched:
        if not wanted:
            return Fetched(tensors=[])
        pieces, total = self._lay_out(wanted)
        buffer = self._take_buffer(total)
        mine = [piece.position for piece in pieces if piece.owner == self._group.rank]
        kept = self._own.fetch([wanted[position] for position in mine])
        tensors = [self._view(buffer, piece, wanted[piece.position]) for piece in pieces]
        for position, weight in zip(mine, kept.tensors, strict=True):
            tensors[position].copy_(weight)
        with self._group.watching():
            works = [
                dist.broadcast(buffer[start:end], owner, group=self._link, async_op=True)
                for owner, start, end in _stretches(pieces)
            ]
            _wait_for(works)
        self._own.release(kept)
        return Fetched(tensors=tensors, buffer=buffer)

    def _lay_out(self, wanted: Sequence[StreamedWeight]) -> tuple[list[_Piece], int]:
        """Each owner's weights side by side, in the order of `wanted` within."""
        places: dict[int, _Piece] = {}
        offset = 0
        order = sorted(range(len(wanted)), key=lambda i: self._owner_of[wanted[i].name])
        for position in order:
            weight = wanted[position]
            num_bytes = self._layouts[weight.name].numel() * weight.dtype.itemsize
            owner = self._owner_of[weight.name]
            places[position] = _Piece(position, owner, offset, num_bytes)
            offset += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return [places[position] for position in range(len(wanted))], offset

    def _view(self, buffer: torch.Tensor, piece: _Piece, wanted: StreamedWeight) -> torch.Tensor:
        layout = self._layouts[wanted.name]
        flat = buffer[piece.offset : piece.offset + piece.num_bytes].view(wanted.dtype)
        return flat.as_strided(layout.shape, layout.stride())

    def _take_buffer(self, num_bytes: int) -> torch.Tensor:
        free = self._free.setdefault(num_bytes, [])
        return free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8)

    def release(self, fetched: Fetched) -> None:
        if fetched.buffer is not None:
            self._free[fetched.buffer.numel()].append(fetched.buffer)

    # ------------------------------------------------------------------ gradients

    def park(self, shard: Shard, gradients: Mapping[str, torch.Tensor]) -> None:
        summed = self._reduce(shard, gradients)
        if summed is not None:
            found = gradient_norms(list(summed.values()))
            self._norms.update(zip(summed, found, strict=True))
            self._own.park(shard, summed)

    def update(
        self,
        shard: Shard,
        gradients: Mapping[str, torch.Tensor] | None,
        learning_rate: float,
        prepare: Prepare | None = None,
    ) -> None:
        if gradients is not None:
            gradients = self._reduce(shard, gradients)
        if self._keeps(shard):
            self._own.update(shard, gradients, learning_rate, prepare)

    def _reduce(
        self, shard: Shard, gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """The sums over all processes, at the owner, in place; None elsewhere."""
        owner = self._owners[shard.index]
        with self._group.watching():
            works = [
                dist.reduce(gradient, owner, group=self._link, async_op=True)
                for gradient in gradients.values()
            ]
            _wait_for(works)
        return dict(gradients) if self._keeps(shard) else None

    def _keeps(self, shard: Shard) -> bool:
        return self._owners[shard.index] == self._group.rank

    def take_norms(self) -> dict[str, torch.Tensor]:
        """The norms of the summed gradients that were parked here since the last call, by name."""
        found, self._norms = self._norms, {}
        return found

    # ------------------------------------------------------------------ state

    def weights(self) -> dict[str, torch.Tensor]:
        """This process's part."""
        return self._own.weights()

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """This process's part."""
        return self._own.optimizer_state()

    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Take this process's part of a whole state."""
        self._own.load(self._mine(weights), self._mine(state))

    def _mine(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in named.items() if self._owner_of.get(n) == self._group.rank}

    def close(self) -> None:
        self._own.close()


def _wait_for(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        assert work is not None, "every process of the group takes part"
        work.wait()


def _stretches(pieces: Sequence[_Piece]) -> list[tuple[int, int, int]]:
    """(owner, first byte, end) of each owner's part of a buffer."""
    found: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        end = piece.offset + piece.num_bytes
        start, last = found.get(piece.owner, (piece.offset, end))
        found[piece.owner] = (min(start, piece.offset), max(last, end))
    return [(owner, *found[owner]) for owner in sorted(found)]

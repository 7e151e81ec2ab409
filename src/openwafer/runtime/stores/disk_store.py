"""A weight store on disk: one preallocated file, read and written past the page cache.

Decides what an update does to a shard, chunk by chunk: while one is updated, the next is read and
the one before is written; and how whole states are taken over and given. Does not decide what is
where in the file (disk_record.py), how bytes move (direct_file.py, disk_staging.py), or when shards
move (weight_traffic.py). A run's checkpoints are elsewhere: this file has no name and ends with the
process, so whatever happens to it, the last checkpoint is whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import PlanError
from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state
from openwafer.runtime.compiled import StreamedWeight
from openwafer.runtime.stores.direct_file import DirectFile, io_threads, wait_for
from openwafer.runtime.stores.disk_record import (
    GRADIENT,
    WEIGHT,
    Chunk,
    Entry,
    Piece,
    Record,
    copy_region,
    lay_out,
)
from openwafer.runtime.stores.disk_staging import (
    NUM_STAGINGS,
    Staging,
    Stagings,
    Views,
    largest_chunk_bytes,
)
from openwafer.runtime.stores.fetch_buffers import FetchBuffers, idle_bytes
from openwafer.runtime.stores.store import Copies, Fetched, Prepare, Shard, WeightStore

__all__ = ["CHUNK_ELEMENTS", "DiskStore", "staging_bytes"]

CHUNK_ELEMENTS = 2 << 20
"""Weights in a chunk: 8 MiB of each fp32 region, enough for the disk's full rate."""


class DiskStore(WeightStore):
    """Weights and optimizer state in a file below `directory`, which must exist.

    Args:
        weights: the first values; read once, one weight after another.
        copies: further dtypes that weights are fetched in.
        chunk_elements: how much of a shard is updated at a time.

    Raises:
        PlanError: the folder does not exist, cannot be written or has too little room; later, a
            read or write that failed.
    """

    fetches_beside_updates = True

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shards: Sequence[Shard],
        config: OptimizerConfig | None,
        directory: Path,
        *,
        copies: Copies | None = None,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        if not directory.is_dir():
            raise PlanError(
                f"the weight store's folder {directory} does not exist",
                allowed="disk:DIR with an existing, writable folder",
                hint=f"mkdir -p {directory}, or --weight_store ram",
            )
        self._config = config
        records, end = _lay_out_all(weights, shards, config, copies or {}, chunk_elements)
        self._records = {record.shard.index: record for record in records}
        self._place_of = {
            name: (record, position)
            for record in records
            for position, name in enumerate(record.shard.names)
        }
        self._parked: dict[int, frozenset[int]] = {}
        self._scalars: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._was_mapped = False
        self._threads = io_threads()
        try:
            self._file = DirectFile(directory, end, self._threads)
        except BaseException:
            self._threads.shutdown()
            raise
        try:
            self._fetches = FetchBuffers(self._file)
            self._stagings = Stagings(self._file, records, config)
            self.staging_bytes = self._stagings.num_bytes + idle_bytes(records)
            for record in self._records.values():
                self._create(record, weights)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ fetch

    def fetch(self, wanted: Sequence[StreamedWeight]) -> Fetched:
        entries: list[Entry] = []
        for weight in wanted:
            record, position = self._place_of[weight.name]
            own = record.regions[WEIGHT][position].spec.torch_dtype
            region = WEIGHT if weight.dtype == own else copy_region(weight.dtype)
            entries.append(record.regions[region][position])
        tensors, buffer = self._fetches.read(entries)
        return Fetched(tensors=tensors, buffer=buffer)

    def release(self, fetched: Fetched) -> None:
        if fetched.buffer is not None:
            self._fetches.give_back(fetched.buffer)

    # ------------------------------------------------------------------ update

    def park(self, shard: Shard, gradients: Mapping[str, torch.Tensor]) -> None:
        record = self._records[shard.index]
        flat = _by_position(shard, gradients)
        for chunk in record.chunks:
            staging = self._stagings.next()
            views, _ = self._stagings.over(staging, record, chunk)
            for number, piece in enumerate(chunk):
                if piece.position in flat and piece.stop > piece.start:
                    part = flat[piece.position].view(-1)[piece.start : piece.stop]
                    views[number, GRADIENT].view(-1).copy_(part)
            self._stagings.begin_write(staging, record, chunk, (GRADIENT,))
        self._stagings.settle()
        self._parked[shard.index] = frozenset(flat)

    def update(
        self,
        shard: Shard,
        gradients: Mapping[str, torch.Tensor] | None,
        learning_rate: float,
        prepare: Prepare | None = None,
    ) -> None:
        record = self._records[shard.index]
        flat = None if gradients is None else _by_position(shard, gradients)
        given = self._parked.pop(shard.index) if flat is None else frozenset(flat)
        if flat is not None and prepare is not None:
            prepare(list(flat.values()))
        if self._was_mapped:
            self._file.forget_cached()
            self._was_mapped = False
        regions = [r for r in record.regions if not _is_copy(r) and (r != GRADIENT or flat is None)]
        kept = [region for region in record.regions if region != GRADIENT]
        new_scalars: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        coming: deque[tuple[Staging, list[Future[None]]]] = deque()
        for index, chunk in enumerate(record.chunks):
            for ahead in record.chunks[index + len(coming) : index + 2]:
                coming.append(self._stagings.begin_read(record, ahead, regions))
            staging, reads = coming.popleft()
            wait_for(reads)
            views, optimizer = self._stagings.over(staging, record, chunk)
            assert optimizer is not None
            grads = {
                number: views[number, GRADIENT] if flat is None else _part(flat, piece)
                for number, piece in enumerate(chunk)
                if piece.position in given
            }
            grads = {n: grad.view(views[n, WEIGHT].shape) for n, grad in grads.items()}
            if flat is None and prepare is not None:
                prepare(list(grads.values()))
            self._step(record, chunk, views, optimizer, grads, learning_rate, new_scalars)
            self._renew_copies(record, chunk, views)
            self._stagings.begin_write(staging, record, chunk, kept)
        self._stagings.settle()
        self._scalars.update(new_scalars)

    def _step(
        self,
        record: Record,
        chunk: Chunk,
        views: Views,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[int, torch.Tensor],
        learning_rate: float,
        new_scalars: dict[tuple[int, int], dict[str, torch.Tensor]],
    ) -> None:
        """One optimizer step on the chunk in `views`. Every piece of a weight counts from the old
        single numbers (step counts and the like); the new ones are the same for all."""
        for number in gradients:
            weight = views[number, WEIGHT]
            weight.grad = gradients[number]
            scalars = self._scalars[record.shard.index, chunk[number].position]
            for key, value in scalars.items():
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
            new_scalars[place] = {key: state[key].clone() for key in self._scalars[place]}

    def _renew_copies(self, record: Record, chunk: Chunk, views: Views) -> None:
        for number in range(len(chunk)):
            for region in record.regions:
                if _is_copy(region) and (number, region) in views:
                    views[number, region].copy_(views[number, WEIGHT])

    # ------------------------------------------------------------------ whole records

    def _create(self, record: Record, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the first weights, their copies, and the optimizer's first state."""
        for chunk in (*record.chunks, *record.rest):
            staging = self._stagings.next()
            views, optimizer = self._stagings.fresh(staging, record, chunk)
            self._put_weights(record, chunk, views, weights)
            if optimizer is not None:
                for number, piece in enumerate(chunk):
                    state = optimizer.state[views[number, WEIGHT]]
                    self._scalars[record.shard.index, piece.position] = {
                        key: value.clone() for key, value in state.items() if not value.dim()
                    }
            self._renew_copies(record, chunk, views)
            regions = [region for region in record.regions if region != GRADIENT]
            self._stagings.begin_write(staging, record, chunk, regions)
        self._stagings.settle()

    @staticmethod
    def _put_weights(
        record: Record, chunk: Chunk, views: Views, weights: Mapping[str, torch.Tensor]
    ) -> None:
        for number, piece in enumerate(chunk):
            name = record.shard.names[piece.position]
            if name in weights:
                _copy_part(views[number, WEIGHT], weights[name], piece)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: self._mapped(name, WEIGHT) for name in self._place_of}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = {}
        for record in self._records.values():
            for position, keys in record.state_keys.items():
                name = record.shard.names[position]
                state[name] = {
                    **self._scalars[record.shard.index, position],
                    **{key: self._mapped(name, key) for key in keys},
                }
        return state

    def _mapped(self, name: str, region: str) -> torch.Tensor:
        self._was_mapped = True
        record, position = self._place_of[name]
        entry = record.regions[region][position]
        held = self._file.mapped(entry.offset, entry.spec.num_bytes)
        return held.view(entry.spec.torch_dtype).view(entry.spec.shape)

    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        for record in self._records.values():
            self._check_state(record, state)
        for record in self._records.values():
            regions = [region for region in record.regions if region != GRADIENT]
            for chunk in (*record.chunks, *record.rest):
                staging, reads = self._stagings.begin_read(record, chunk, regions)
                wait_for(reads)
                views, _ = self._stagings.over(staging, record, chunk)
                self._put_weights(record, chunk, views, weights)
                self._put_state(record, chunk, views, state)
                self._renew_copies(record, chunk, views)
                self._stagings.begin_write(staging, record, chunk, regions)
            self._stagings.settle()

    def _check_state(self, record: Record, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise CheckpointError where a loaded state does not fit, before anything is changed."""
        if not state or self._config is None or not record.state_keys:
            return
        outlines = {
            record.shard.names[position]: torch.empty(
                record.regions[WEIGHT][position].spec.shape, device="meta"
            )
            for position in record.state_keys
        }
        load_optimizer_state(build_optimizer(self._config, outlines), None, state)

    def _put_state(
        self, record: Record, chunk: Chunk, views: Views, state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        for number, piece in enumerate(chunk):
            entries = state.get(record.shard.names[piece.position], {})
            for key in record.state_keys.get(piece.position, ()) if entries else ():
                if entries[key] is None:  # torch's SGD before its first step
                    views[number, key].zero_()
                else:
                    _copy_part(views[number, key], torch.as_tensor(entries[key]), piece)
            scalars = self._scalars.get((record.shard.index, piece.position), {})
            for key, value in scalars.items() if entries else ():
                # AdamW without bias correction counts from infinity, and stays there.
                if not (key == "step" and math.isinf(float(value))):
                    value.copy_(torch.as_tensor(entries[key]))

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._file.close()


def staging_bytes(
    weights: Mapping[str, torch.Tensor],
    shards: Sequence[Shard],
    config: OptimizerConfig | None,
    *,
    copies: Copies,
) -> int:
    """What a store of these weights would take of host memory, without making it."""
    records, _ = _lay_out_all(weights, shards, config, copies, CHUNK_ELEMENTS)
    return NUM_STAGINGS * largest_chunk_bytes(records) + idle_bytes(records)


def _lay_out_all(
    weights: Mapping[str, torch.Tensor],
    shards: Sequence[Shard],
    config: OptimizerConfig | None,
    copies: Copies,
    chunk_elements: int,
) -> tuple[list[Record], int]:
    """The shards' records, and the size of the file."""
    records: list[Record] = []
    end = 0
    for shard in shards:
        record, end = lay_out(
            shard, weights, copies, config, first_byte=end, chunk_elements=chunk_elements
        )
        records.append(record)
    return records, end


def _is_copy(region: str) -> bool:
    return region.startswith("copy in ")


def _by_position(shard: Shard, gradients: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Row by row, as the file has them."""
    return {i: gradients[n].contiguous() for i, n in enumerate(shard.names) if n in gradients}


def _part(tensors: Mapping[int, torch.Tensor], piece: Piece) -> torch.Tensor:
    return tensors[piece.position].view(-1)[piece.start : piece.stop]


def _copy_part(target: torch.Tensor, source: torch.Tensor, piece: Piece) -> None:
    """Fill `target` with the piece's elements of `source`, or with all of it where it is whole."""
    if target.shape == source.shape:
        target.copy_(source)
    else:
        target.copy_(source.reshape(-1)[piece.start : piece.stop])

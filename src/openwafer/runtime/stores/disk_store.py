"""A weight store on disk: one preallocated file, read and written past the page cache.

Decides what an update does to a shard, chunk by chunk: while one is updated, the next ones are read
and those before are written, also after the update has ended; and how whole states are taken over
and given. Does not decide how a chunk is updated (chunk_update.py), what is where in the file
(disk_record.py), how bytes move (direct_file.py, disk_staging.py, read_ahead.py), or when shards
move (weight_traffic.py). A run's checkpoints are elsewhere: this file has no name and ends with the
process, so whatever happens to it, the last checkpoint is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import PlanError
from openwafer.optim.build import build_optimizer
from openwafer.optim.state import load_optimizer_state
from openwafer.runtime.compiled import StreamedWeight
from openwafer.runtime.stores.chunk_update import ChunkUpdates, put_weights, renew_copies
from openwafer.runtime.stores.direct_file import (
    NUM_THREADS,
    DirectFile,
    io_threads,
    wait_for,
)
from openwafer.runtime.stores.disk_record import (
    GRADIENT,
    WEIGHT,
    Entry,
    Piece,
    Record,
    copy_region,
    lay_out,
)
from openwafer.runtime.stores.disk_staging import (
    FEWEST_STAGINGS,
    MOST_STAGINGS,
    Stagings,
    stagings_bytes,
)
from openwafer.runtime.stores.fetch_buffers import NUM_FETCH_THREADS, FetchBuffers, idle_bytes
from openwafer.runtime.stores.read_ahead import ReadAhead
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
        pin: fetch into pinned memory, for a GPU to read.
        memory_promised: whether memory is limited to what `staging_bytes` says before. Otherwise
            more is taken, up to a fixed number of chunks and a few layers, and waits are shorter.

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
        pin: bool = False,
        memory_promised: bool = True,
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
        self._updates = ChunkUpdates()
        self._was_mapped = False
        at_most = FEWEST_STAGINGS if memory_promised else MOST_STAGINGS
        with ExitStack() as opened:
            threads, fetch_threads = (
                opened.enter_context(io_threads(count))
                for count in (NUM_THREADS, NUM_FETCH_THREADS)
            )
            self._file = DirectFile(directory, end, threads)
            opened.callback(self._file.close)
            self._stagings = Stagings(self._file, records, config, at_most=at_most)
            self._ahead = ReadAhead(self._stagings, records)
            self._fetches = FetchBuffers(
                self._file, self._stagings, fetch_threads, promised=memory_promised, pin=pin
            )
            opened.callback(self._fetches.close)
            for pool in (threads, fetch_threads):
                opened.push(pool)  # from here on they end first, before what they use is closed
            self.staging_bytes = self._stagings.num_bytes + idle_bytes(records)
            for record in records:
                self._create(record, weights)
            self._opened = opened.pop_all()

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
        self._ahead.drop()
        for chunk in record.chunks:
            staging = self._stagings.take()
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
        try:
            self._update_chunks(record, flat, given, learning_rate, prepare)
        except BaseException:
            self._updates.end_shard(failed=True)
            self._ahead.drop()
            self._stagings.reset()
            raise
        self._updates.end_shard(failed=False)
        self._ahead.extend()

    def _update_chunks(
        self,
        record: Record,
        flat: Mapping[int, torch.Tensor] | None,
        given: frozenset[int],
        learning_rate: float,
        prepare: Prepare | None,
    ) -> None:
        kept = [region for region in record.regions if region != GRADIENT]
        for index, chunk in enumerate(record.chunks):
            staging = self._ahead.take(record, index, parked=flat is None)
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
            self._updates.step(record, chunk, views, optimizer, grads, learning_rate)
            renew_copies(record, chunk, views)
            self._stagings.begin_write(staging, record, chunk, kept, holds=True)

    # ------------------------------------------------------------------ whole records

    def _create(self, record: Record, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the first weights, their copies, and the optimizer's first state."""
        for chunk in (*record.chunks, *record.rest):
            staging = self._stagings.take()
            views, optimizer = self._stagings.fresh(staging, record, chunk)
            put_weights(record, chunk, views, weights)
            if optimizer is not None:
                self._updates.begin(record, chunk, optimizer, views)
            renew_copies(record, chunk, views)
            regions = [region for region in record.regions if region != GRADIENT]
            self._stagings.begin_write(staging, record, chunk, regions)
        self._stagings.settle()

    def weights(self) -> dict[str, torch.Tensor]:
        self._stagings.settle()
        return {name: self._mapped(name, WEIGHT) for name in self._place_of}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        self._stagings.settle()
        state: dict[str, dict[str, Any]] = {}
        for record in self._records.values():
            for position, keys in record.state_keys.items():
                name = record.shard.names[position]
                state[name] = {
                    **self._updates.scalars(record, position),
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
        self._ahead.drop()
        for record in self._records.values():
            regions = [region for region in record.regions if region != GRADIENT]
            for chunk in (*record.chunks, *record.rest):
                staging = self._stagings.take()
                wait_for(self._stagings.begin_read(staging, record, chunk, regions))
                views, _ = self._stagings.over(staging, record, chunk)
                put_weights(record, chunk, views, weights)
                self._updates.put_state(record, chunk, views, state)
                renew_copies(record, chunk, views)
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

    def close(self) -> None:
        self._opened.close()


def staging_bytes(
    weights: Mapping[str, torch.Tensor],
    shards: Sequence[Shard],
    config: OptimizerConfig | None,
    *,
    copies: Copies,
) -> int:
    """What a store of these weights would take of host memory, without making it, where memory is
    promised."""
    records, _ = _lay_out_all(weights, shards, config, copies, CHUNK_ELEMENTS)
    return stagings_bytes(records, at_most=FEWEST_STAGINGS) + idle_bytes(records)


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


def _by_position(shard: Shard, gradients: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Row by row, as the file has them."""
    return {i: gradients[n].contiguous() for i, n in enumerate(shard.names) if n in gradients}


def _part(tensors: Mapping[int, torch.Tensor], piece: Piece) -> torch.Tensor:
    return tensors[piece.position].view(-1)[piece.start : piece.stop]

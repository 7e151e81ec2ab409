"""The buffers that chunks of a shard pass through on their way to the optimizer and back.

Decides that there are three, in turn, and that what is put over one (the pieces of a chunk as
tensors, an optimizer over them) is made once for all chunks of one form. Does not decide what
happens to a chunk (disk_store.py) or what is where in the file (disk_record.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.optim.build import build_optimizer, has_weight_decay
from openwafer.runtime.stores.direct_file import DirectFile, aligned_buffer, wait_for
from openwafer.runtime.stores.disk_record import WEIGHT, Chunk, Record

__all__ = ["NUM_STAGINGS", "Staging", "Stagings", "Views", "largest_chunk_bytes"]

NUM_STAGINGS = 3
"""One is read, one updated, one written."""

Views = dict[tuple[int, str], torch.Tensor]
"""(number of the piece in its chunk, region) → its elements in a staging buffer."""

Optimizer = torch.optim.Optimizer


@dataclass(slots=True)
class Staging:
    """A buffer that chunks pass through; `writes` is what still leaves it, `forms` what is over it
    for chunks of each form."""

    buffer: torch.Tensor
    writes: list[Future[None]] = field(default_factory=list[Future[None]])
    forms: dict[Any, tuple[Views, Optimizer | None]] = field(
        default_factory=dict[Any, tuple[Views, Optimizer | None]]
    )


class Stagings:
    """Three buffers for the largest chunk of some records."""

    def __init__(
        self, file: DirectFile, records: Sequence[Record], config: OptimizerConfig | None
    ) -> None:
        self._file, self._config = file, config
        self.num_bytes = NUM_STAGINGS * largest_chunk_bytes(records)
        self._stagings = [
            Staging(aligned_buffer(largest_chunk_bytes(records))) for _ in range(NUM_STAGINGS)
        ]

    def next(self) -> Staging:
        """The buffer that was used longest ago, once what was written from it is on the disk."""
        staging = self._stagings.pop(0)
        self._stagings.append(staging)
        wait_for(staging.writes)
        staging.writes = []
        return staging

    def begin_read(
        self, record: Record, chunk: Chunk, regions: Sequence[str]
    ) -> tuple[Staging, list[Future[None]]]:
        """A chunk's part of some regions on its way into the next buffer."""
        staging = self.next()
        self.over(staging, record, chunk)  # making an optimizer writes its first state
        return staging, self._move(self._file.read, staging, record, chunk, regions)

    def begin_write(
        self, staging: Staging, record: Record, chunk: Chunk, regions: Sequence[str]
    ) -> None:
        staging.writes = self._move(self._file.write, staging, record, chunk, regions)

    def settle(self) -> None:
        """Until everything is written."""
        for staging in self._stagings:
            wait_for(staging.writes)
            staging.writes = []

    def over(
        self, staging: Staging, record: Record, chunk: Chunk
    ) -> tuple[Views, Optimizer | None]:
        """The chunk's pieces in a buffer, with an optimizer over them."""
        form = self._form(record, chunk)
        if form not in staging.forms:
            staging.forms[form] = self.fresh(staging, record, chunk)
        return staging.forms[form]

    def fresh(
        self, staging: Staging, record: Record, chunk: Chunk
    ) -> tuple[Views, Optimizer | None]:
        """The same made anew: the optimizer's first state is in the buffer then."""
        views = _make_views(staging.buffer, record, chunk)
        return views, self._make_optimizer(record, chunk, views)

    def _make_optimizer(self, record: Record, chunk: Chunk, views: Views) -> Optimizer | None:
        trained = [n for n, piece in enumerate(chunk) if piece.position in record.state_keys]
        if self._config is None or not trained:
            return None
        named = {record.shard.names[chunk[n].position]: views[n, WEIGHT] for n in trained}
        optimizer = build_optimizer(self._config, named)
        for number in trained:
            state = optimizer.state[views[number, WEIGHT]]
            for key in record.state_keys[chunk[number].position]:
                views[number, key].copy_(state[key])
                state[key] = views[number, key]
        return optimizer

    def _form(self, record: Record, chunk: Chunk) -> Any:
        """What two chunks must have in common to share views and an optimizer."""
        pieces: list[Any] = []
        for piece in chunk:
            name = record.shard.names[piece.position]
            decays = self._config is not None and has_weight_decay(self._config, name)
            held = tuple(
                (region, entries[piece.position].spec.dtype, record.shape(region, piece))
                for region, entries in record.regions.items()
                if piece.position in entries
            )
            pieces.append((decays, piece.position in record.state_keys, held))
        return tuple(pieces), tuple(record.span(region, chunk)[1] for region in record.regions)

    @staticmethod
    def _move(
        move: Any, staging: Staging, record: Record, chunk: Chunk, regions: Sequence[str]
    ) -> list[Future[None]]:
        """Begin to read or write a chunk's part of some regions."""
        futures: list[Future[None]] = []
        begin = 0
        for region in record.regions:
            offset, size = record.span(region, chunk)
            if region in regions and size:
                futures += move(staging.buffer[begin : begin + size], offset)
            begin += size
        return futures


def largest_chunk_bytes(records: Sequence[Record]) -> int:
    """What the largest chunk takes, all its regions together."""
    return max(
        (
            sum(record.span(region, chunk)[1] for region in record.regions)
            for record in records
            for chunk in (*record.chunks, *record.rest)
        ),
        default=0,
    )


def _make_views(buffer: torch.Tensor, record: Record, chunk: Chunk) -> Views:
    views: Views = {}
    begin = 0
    for region, entries in record.regions.items():
        offset, size = record.span(region, chunk)
        for number, piece in enumerate(chunk):
            place = record.place(region, piece)
            if place is not None:
                start, stop = (begin + byte - offset for byte in place)
                dtype = entries[piece.position].spec.torch_dtype
                shape = record.shape(region, piece)
                views[number, region] = buffer[start:stop].view(dtype).view(shape)
        begin += size
    return views

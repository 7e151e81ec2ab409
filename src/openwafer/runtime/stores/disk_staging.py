"""The buffers that chunks of a shard pass through on their way to the optimizer and back.

Decides that they are used in turn, that one is used again only once what left it is on the disk,
and that a fetch takes from them what they still hold of an update, which is as new as the file or
newer; that what is put over one (the pieces of a chunk as tensors, an optimizer over them) is made
once for all chunks of one form. Does not decide what happens to a chunk (disk_store.py), which one
is read when (read_ahead.py) or what is where in the file (disk_record.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.optim.build import build_optimizer, has_weight_decay
from openwafer.runtime.stores.direct_file import (
    DirectFile,
    lasting_buffer,
    lasting_bytes,
    wait_for,
)
from openwafer.runtime.stores.disk_record import WEIGHT, Chunk, Record

__all__ = [
    "FEWEST_STAGINGS",
    "MOST_STAGINGS",
    "Staging",
    "Stagings",
    "Views",
    "stagings_bytes",
]

FEWEST_STAGINGS = 3
"""One is read, one updated, one written: where memory is promised."""

MOST_STAGINGS = 20
"""Where it is not: enough that GPT-2's largest shard, the embedding, which is updated last and
fetched first, is read before its gradients are there and written after it is fetched."""

Views = dict[tuple[int, str], torch.Tensor]
"""(number of the piece in its chunk, region) → its elements in a staging buffer."""

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True, slots=True)
class _Place:
    """A region of a chunk: where it begins in a staging and in the file, and its length."""

    region: str
    begin: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a chunk lies in a staging; chunks of one form share views and an optimizer."""

    places: tuple[_Place, ...]
    form: Any


@dataclass(slots=True)
class Staging:
    """A buffer that chunks pass through; `writes` is what still leaves it, `held` what it has as
    the file has it or will have it, `forms` what is over it for chunks of each form."""

    buffer: torch.Tensor
    writes: list[Future[None]] = field(default_factory=list[Future[None]])
    held: tuple[_Place, ...] = ()
    forms: dict[Any, tuple[Views, Optimizer | None]] = field(
        default_factory=dict[Any, tuple[Views, Optimizer | None]]
    )


class Stagings:
    """Buffers for the largest chunk of some records; not more of them than there are chunks.

    One thread takes them; any thread may `fill`.
    """

    def __init__(
        self,
        file: DirectFile,
        records: Sequence[Record],
        config: OptimizerConfig | None,
        *,
        at_most: int,
    ) -> None:
        self._file, self._config = file, config
        self.count = _count(records, at_most)
        self.num_bytes = stagings_bytes(records, at_most=at_most)
        size = _largest_chunk_bytes(records)
        memory = lasting_buffer(self.count * size)
        self._all = tuple(
            Staging(memory[start : start + size])
            for start in range(0, self.count * size, size or 1)
        ) or tuple(Staging(memory) for _ in range(self.count))
        self._free = deque(self._all)
        self._layouts: dict[tuple[int, Chunk], _Layout] = {}
        self._failed: BaseException | None = None
        self._holding = threading.Lock()

    # ------------------------------------------------------------------ in turn

    def take(self) -> Staging:
        """The buffer that was used longest ago, once what was written from it is on the disk."""
        self._finish_writes(self._free[0])
        staging = self._free.popleft()
        self._forget(staging)
        return staging

    def take_idle(self) -> Staging | None:
        """The same, where nothing would be waited for."""
        if not self._free or not all(write.done() for write in self._free[0].writes):
            return None
        return self.take()

    def give_back(self, staging: Staging) -> None:
        """Nothing of it is read or written any more."""
        self._free.append(staging)

    def settle(self) -> None:
        """Until everything is written.

        Raises:
            PlanError: a write has failed, now or before.
        """
        for staging in self._all:
            self._finish_writes(staging)

    def reset(self) -> None:
        """All buffers are free again, after a failure."""
        for staging in self._all:
            for write in staging.writes:
                write.exception()
            self._forget(staging)
        self._free = deque(self._all)

    def _finish_writes(self, staging: Staging) -> None:
        try:
            wait_for(staging.writes)
        except Exception as error:
            self._failed = error
        if self._failed is not None:
            raise self._failed
        staging.writes = []

    # ------------------------------------------------------------------ read and write

    def begin_read(
        self, staging: Staging, record: Record, chunk: Chunk, regions: Sequence[str]
    ) -> list[Future[None]]:
        """A chunk's part of some regions on its way into a buffer."""
        layout = self._layout(record, chunk)
        self._leave_to_file(layout)
        self.over(staging, record, chunk)  # making an optimizer writes its first state
        reads: list[Future[None]] = []
        for place in _of(layout, regions):
            part = staging.buffer[place.begin : place.begin + place.num_bytes]
            reads += self._file.read(part, place.offset)
        return reads

    def begin_write(
        self,
        staging: Staging,
        record: Record,
        chunk: Chunk,
        regions: Sequence[str],
        *,
        holds: bool = False,
    ) -> None:
        """Write a chunk's part of some regions; the buffer is in turn again.

        holds: until then, fetches take these regions from the buffer.

        Raises:
            PlanError: a write has failed before.
        """
        if self._failed is not None:
            raise self._failed
        places = _of(self._layout(record, chunk), regions)
        for place in places:
            part = staging.buffer[place.begin : place.begin + place.num_bytes]
            staging.writes += self._file.write(part, place.offset)
        if holds:
            with self._holding:
                staging.held = places
        self._free.append(staging)

    def fill(self, target: torch.Tensor, offset: int) -> list[tuple[int, int]]:
        """Put what buffers hold of the file's bytes from `offset` on into `target` (uint8); the
        stretches (first, end) of the file that are left, which are on the disk."""
        end = offset + target.numel()
        filled: list[tuple[int, int]] = []
        with self._holding:
            for staging in self._all:
                for place in staging.held:
                    first = max(place.offset, offset)
                    last = min(place.offset + place.num_bytes, end)
                    if first < last:
                        begin = place.begin + first - place.offset
                        part = staging.buffer[begin : begin + last - first]
                        target[first - offset : last - offset].copy_(part)
                        filled.append((first, last))
        return _gaps(filled, offset, end)

    def _leave_to_file(self, layout: _Layout) -> None:
        """A chunk that is read again: the file has it, and no buffer does."""
        offsets = {place.offset for place in layout.places}
        for staging in self._all:
            if any(place.offset in offsets for place in staging.held):
                self._finish_writes(staging)
                self._forget(staging)

    def _forget(self, staging: Staging) -> None:
        with self._holding:
            staging.held = ()

    # ------------------------------------------------------------------ over a buffer

    def over(
        self, staging: Staging, record: Record, chunk: Chunk
    ) -> tuple[Views, Optimizer | None]:
        """The chunk's pieces in a buffer, with an optimizer over them."""
        form = self._layout(record, chunk).form
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

    def _layout(self, record: Record, chunk: Chunk) -> _Layout:
        key = record.shard.index, chunk
        if key not in self._layouts:
            places: list[_Place] = []
            begin = 0
            for region in record.regions:
                offset, size = record.span(region, chunk)
                places.append(_Place(region, begin, offset, size))
                begin += size
            self._layouts[key] = _Layout(tuple(places), self._form(record, chunk))
        return self._layouts[key]

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


def stagings_bytes(records: Sequence[Record], *, at_most: int) -> int:
    """What the buffers for some records take of host memory."""
    return lasting_bytes(_count(records, at_most) * _largest_chunk_bytes(records))


def _count(records: Sequence[Record], at_most: int) -> int:
    num_chunks = sum(len(record.chunks) for record in records)
    return max(FEWEST_STAGINGS, min(at_most, num_chunks))


def _largest_chunk_bytes(records: Sequence[Record]) -> int:
    """What the largest chunk takes, all its regions together."""
    return max(
        (
            sum(record.span(region, chunk)[1] for region in record.regions)
            for record in records
            for chunk in (*record.chunks, *record.rest)
        ),
        default=0,
    )


def _of(layout: _Layout, regions: Sequence[str]) -> tuple[_Place, ...]:
    return tuple(p for p in layout.places if p.region in regions and p.num_bytes)


def _gaps(filled: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What some stretches leave of `start` to `end`."""
    gaps: list[tuple[int, int]] = []
    for first, last in sorted(filled):
        if first > start:
            gaps.append((start, first))
        start = max(start, last)
    return [*gaps, (start, end)] if start < end else gaps


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

"""Chunks on their way from the disk, in the order in which updates want them.

Decides which chunks are read before they are asked for: a step updates shards from the last to the
first, so the chunks that follow are known, also those of shards whose gradients are not there yet.
One is always read ahead; more where buffers are idle. Gradients that wait on the disk are not there
before their shard's turn: such an update reads ahead within its shard. Does not decide what happens
to a chunk (disk_store.py) or which buffer is whose (disk_staging.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from openwafer.runtime.stores.direct_file import wait_for
from openwafer.runtime.stores.disk_record import GRADIENT, Record, is_copy
from openwafer.runtime.stores.disk_staging import Staging, Stagings

__all__ = ["ReadAhead"]

_LEFT_TO_WRITES = 3
"""Buffers that are not read into ahead: one is updated, the others are written."""


@dataclass(slots=True)
class _Coming:
    """A chunk that is read: its place in the order, and whether with its gradients."""

    position: int
    parked: bool
    staging: Staging
    reads: list[Future[None]]


class ReadAhead:
    """Of some records, for the one thread that updates them."""

    def __init__(self, stagings: Stagings, records: Sequence[Record]) -> None:
        self._stagings = stagings
        last_first = sorted(records, key=lambda record: -record.shard.index)
        self._order = [(r, number) for r in last_first for number in range(len(r.chunks))]
        self._position = {(r.shard.index, n): p for p, (r, n) in enumerate(self._order)}
        self._most = max(1, stagings.count - _LEFT_TO_WRITES)
        self._coming: deque[_Coming] = deque()

    def take(self, record: Record, number: int, *, parked: bool) -> Staging:
        """The buffer with a record's chunk, its weights and state; `parked`: its gradients too."""
        position = self._position[record.shard.index, number]
        if self._coming and (self._coming[0].position, self._coming[0].parked) != (
            position,
            parked,
        ):
            self.drop()
        if not self._coming:
            self._begin(position, parked, self._stagings.take())
        if len(self._coming) == 1 and self._may_follow(position + 1, parked):
            self._begin(position + 1, parked, self._stagings.take())
        self.extend()
        wait_for(self._coming[0].reads)
        return self._coming.popleft().staging

    def extend(self) -> None:
        """Read further ahead, as far as buffers are idle."""
        while self._coming and len(self._coming) <= self._most:
            last = self._coming[-1]
            if not self._may_follow(last.position + 1, last.parked):
                return
            staging = self._stagings.take_idle()
            if staging is None:
                return
            self._begin(last.position + 1, last.parked, staging)

    def drop(self) -> None:
        """What was read is not wanted, or is about to change on the disk."""
        while self._coming:
            coming = self._coming.popleft()
            for read in coming.reads:
                read.exception()
            self._stagings.give_back(coming.staging)

    def _may_follow(self, position: int, parked: bool) -> bool:
        if position == len(self._order):
            return False
        return not parked or self._order[position][1] > 0

    def _begin(self, position: int, parked: bool, staging: Staging) -> None:
        record, number = self._order[position]
        regions = [r for r in record.regions if not is_copy(r) and (r != GRADIENT or parked)]
        reads = self._stagings.begin_read(staging, record, record.chunks[number], regions)
        self._coming.append(_Coming(position, parked, staging, reads))

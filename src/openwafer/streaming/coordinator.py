"""Task 0's side of streaming: batches from the workers, in order.

Decides which epochs are open and in what order batches are given; asking for them and waiting is
in `requests.py`, what has come in `ledger.py`. Batch k of an epoch comes from worker
`k % num_workers`. Each open epoch gives every worker credit for a few batches; one more for each
that is consumed. A worker without credit loads nothing, so memory is bounded, receiving threads
never stand still, and a lost worker is noticed whatever the training loop is doing. Does not decide
who may connect (`admission.py`).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from openwafer.errors import StreamingError
from openwafer.streaming.admission import Admission
from openwafer.streaming.conversation import END, Description, OpenStream
from openwafer.streaming.ledger import Ledger
from openwafer.streaming.requests import Requests
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.source import Batch, Mode

__all__ = ["Coordinator", "CoordinatorSource"]


class Coordinator:
    """Listens for the workers of a run and gives their batches as `BatchSource`s.

    Listens from the start, so that workers may connect while the model compiles.

    Args:
        address: `host:port`, as `--cs_ip`; port 0 takes a free one.
        num_workers: the tasks that stream.
        secret: the run's (`auth.run_secret`).
        workers_come_back: whoever started the tasks starts a killed worker again. Its place is then
            kept, and it goes on with the batch that is due.

    Raises:
        ConfigError: `address` is not one.
        StreamingError: the address cannot be listened at.
    """

    def __init__(
        self,
        address: str,
        num_workers: int,
        secret: bytes,
        *,
        settings: StreamSettings = StreamSettings(),  # noqa: B008 (frozen)
        workers_come_back: bool = False,
    ) -> None:
        assert num_workers >= 1, "without workers there is nothing to coordinate"
        self._num_workers = num_workers
        self._settings = settings
        self._next_stream = 0
        self._ledger = Ledger(
            num_workers,
            settings,
            workers_come_back=workers_come_back,
            give_up=lambda rank: self._admission.give_up(rank),
        )
        self._admission = Admission(
            address,
            num_workers,
            secret,
            settings,
            self._ledger.admit,
            stays_open=workers_come_back,
        )
        self._requests = Requests(
            self._ledger,
            num_workers,
            settings,
            address=self._admission.address,
            workers_come_back=workers_come_back,
        )

    @property
    def address(self) -> str:
        """`host:port` where it listens."""
        return self._admission.address

    @property
    def waited_seconds(self) -> dict[int, float]:
        """Per worker's rank, how long the training loop has waited for its batches."""
        with self._ledger.changed:
            return {
                rank: worker.waited_seconds for rank, worker in sorted(self._ledger.workers.items())
            }

    def busy_seconds(self, mode: Mode) -> dict[int, float]:
        """Per worker's rank, how long it took in all to load and send what has come of a mode."""
        with self._ledger.changed:
            workers = sorted(self._ledger.workers.items())
            return {rank: worker.busy_seconds.get(mode, 0.0) for rank, worker in workers}

    def source(self, mode: Mode) -> CoordinatorSource:
        """The batches of one mode. Several sources may be in use, each at its own place."""
        return CoordinatorSource(self, mode)

    def wait_for_workers(self) -> None:
        """Return when all workers are connected.

        Raises:
            StreamingError: some are missing after `join_timeout_seconds` (named), or one that was
                there is lost.
        """
        self._requests.wait_for_workers()

    def close(self) -> None:
        """Tell the workers to stop and close all connections. Safe to call twice."""
        with self._ledger.changed:
            if self._ledger.closing:
                return
            self._ledger.closing = True
            workers = [*self._ledger.workers.values(), *self._ledger.returned.values()]
        self._admission.close()
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.connection.settimeout(self._settings.close_timeout_seconds)
                worker.send({"do": "stop"})
                worker.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + self._settings.close_timeout_seconds
        for thread in self._ledger.threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.connection.shutdown(socket.SHUT_RDWR)
            worker.connection.close()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # What CoordinatorSource uses.

    def describe(self, mode: Mode) -> dict[int, Description]:
        """What each worker says about its data for `mode`.

        Raises:
            StreamingError: a worker failed, or the workers do not see the same data.
        """
        self.wait_for_workers()
        found = self._requests.descriptions(mode)
        lengths = {rank: d.num_batches for rank, d in found.items() if not d.already_sharded}
        if len(set(lengths.values())) > 1:
            raise StreamingError(
                f"the workers do not see the same {mode} data: batches per epoch by rank {lengths}",
                hint="every task must make the same dataset, or take its own part of it with"
                " num_streamers() and get_streaming_rank()",
            )
        return found

    def open_stream(self, mode: Mode, epoch: int, start: int) -> OpenStream:
        self.describe(mode)
        count = self._num_workers
        ranks = range(1, count + 1)
        with self._ledger.changed:
            for older in [s for s in self._ledger.streams.values() if s.mode == mode]:
                del self._ledger.streams[older.number]
            stream = OpenStream(
                self._next_stream,
                mode,
                epoch,
                waiting={rank: deque() for rank in ranks},
                next_number={rank: start + (rank - 1 - start) % count for rank in ranks},
            )
            self._next_stream += 1
            self._ledger.streams[stream.number] = stream
        for rank in ranks:
            self._requests.open(stream, rank)
        return stream

    def close_stream(self, stream: OpenStream) -> None:
        with self._ledger.changed:
            open_still = self._ledger.streams.pop(stream.number, None) is not None
            if self._ledger.closing or self._ledger.failure is not None or not open_still:
                return
        for rank in stream.waiting:
            self._requests.send(rank, {"do": "close", "stream": stream.number})

    def take(self, stream: OpenStream, number: int) -> Batch:
        """Batch `number` of the stream, or `END`."""
        rank = 1 + number % self._num_workers
        queue = stream.waiting[rank]
        assert stream.number in self._ledger.streams, (
            "an epoch was used after a newer one was opened"
        )
        found, batch = self._requests.wait_for(rank, lambda: queue[0] if queue else None)
        if batch is END:
            return END
        with self._ledger.changed:
            queue.popleft()
        if found != number:
            self._ledger.fail(rank, f"sent batch {found} where {number} was due")
            self._ledger.raise_failure()
        self._requests.send(rank, {"do": "more", "stream": stream.number})
        return batch

    def check_end(self, stream: OpenStream, number: int) -> None:
        """At the end of an epoch that nobody sharded by hand, all workers must be at its end."""
        descriptions = self.describe(stream.mode)
        for rank, queue in stream.waiting.items():
            if descriptions[rank].already_sharded:
                continue
            extra, batch = self._requests.wait_for(
                rank, lambda queue=queue: queue[0] if queue else None
            )
            if batch is not END:
                raise StreamingError(
                    f"worker {1 + number % self._num_workers} has {number} batches in {stream.mode}"
                    f" epoch {stream.epoch}, and worker {rank} has batch {extra}",
                    hint="every task must make the same dataset",
                )


class CoordinatorSource:
    """The batches of one mode, loaded by the workers (a `BatchSource`)."""

    def __init__(self, coordinator: Coordinator, mode: Mode) -> None:
        self._coordinator = coordinator
        self._mode: Mode = mode

    @property
    def num_batches(self) -> int | None:
        """Batches in one epoch; None where the workers' data have no length.

        Raises:
            StreamingError: a worker failed, or the workers do not see the same data.
        """
        numbers = [d.num_batches for d in self._coordinator.describe(self._mode).values()]
        known = [number for number in numbers if number is not None]
        return min(known) if len(known) == len(numbers) else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches `start`, `start + 1`, ... of the epoch. One epoch of a mode at a time.

        Raises:
            StreamingError: a worker failed (with its own error), is lost or silent.
        """
        coordinator = self._coordinator
        stream = coordinator.open_stream(self._mode, epoch, start)
        try:
            number = start
            while (batch := coordinator.take(stream, number)) is not END:
                yield batch
                number += 1
            coordinator.check_end(stream, number)
        finally:
            coordinator.close_stream(stream)

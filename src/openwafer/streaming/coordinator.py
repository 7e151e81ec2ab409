"""Task 0's side of streaming: batches from the workers, in order.

Decides what the workers are asked for, what is held in memory, and how long one is waited for; what
they say is kept in `ledger.py`. Batch k of an epoch comes from worker `k % num_workers`. Each open
epoch gives every worker credit for a few batches; one more for each that is consumed. A worker
without credit loads nothing, so memory is bounded, receiving threads never stand still, and a lost
worker is noticed whatever the training loop is doing. Does not decide who may connect
(`admission.py`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from openwafer.errors import StreamingError
from openwafer.streaming.admission import Admission
from openwafer.streaming.conversation import END, Description, OpenStream
from openwafer.streaming.ledger import Ledger
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.source import Batch, Mode

__all__ = ["Coordinator", "CoordinatorSource"]

_logger = logging.getLogger("openwafer.streaming")
_T = TypeVar("_T")


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
        self._ready = False
        self._workers_come_back = workers_come_back
        self._asked: set[Mode] = set()
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
        if self._ready:
            return
        _logger.info("Waiting for %d streamer(s) to prime the data pipeline", self._num_workers)
        deadline = time.monotonic() + self._settings.join_timeout_seconds
        with self._ledger.changed:
            while len(self._ledger.present()) < self._num_workers:
                self._ledger.raise_failure()
                self._take_in()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise self._missing()
                self._ledger.changed.wait(remaining)
        self._ready = True
        _logger.info("Streamers are ready")

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
        """What each worker says about its data for `mode`; asked once.

        Raises:
            StreamingError: a worker failed, or the workers do not see the same data.
        """
        self.wait_for_workers()
        ranks = range(1, self._num_workers + 1)
        if mode not in self._asked:
            self._asked.add(mode)
            for rank in ranks:
                self._send(rank, {"do": "describe", "mode": mode})
        found = {
            rank: self._await(rank, lambda rank=rank: self._ledger.descriptions.get((mode, rank)))
            for rank in ranks
        }
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
        with self._ledger.changed:
            for older in [s for s in self._ledger.streams.values() if s.mode == mode]:
                del self._ledger.streams[older.number]
            ranks = range(1, self._num_workers + 1)
            count = self._num_workers
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
            self._send(rank, self._opening(stream, rank))
        return stream

    def _opening(self, stream: OpenStream, rank: int) -> dict[str, Any]:
        """Tells a worker to stream what is due from it, as far as there is room."""
        room = self._settings.window_batches - len(stream.waiting[rank])
        return {
            "do": "open",
            "stream": stream.number,
            "mode": stream.mode,
            "epoch": stream.epoch,
            "start": stream.next_number[rank],
            "credit": room,
        }

    def close_stream(self, stream: OpenStream) -> None:
        with self._ledger.changed:
            open_still = self._ledger.streams.pop(stream.number, None) is not None
            if self._ledger.closing or self._ledger.failure is not None or not open_still:
                return
        for rank in stream.waiting:
            self._send(rank, {"do": "close", "stream": stream.number})

    def take(self, stream: OpenStream, number: int) -> Batch:
        """Batch `number` of the stream, or `END`."""
        rank = 1 + number % self._num_workers
        queue = stream.waiting[rank]
        assert stream.number in self._ledger.streams, (
            "an epoch was used after a newer one was opened"
        )
        found, batch = self._await(rank, lambda: queue[0] if queue else None)
        if batch is END:
            return END
        with self._ledger.changed:
            queue.popleft()
        if found != number:
            self._ledger.fail(rank, f"sent batch {found} where {number} was due")
            self._ledger.raise_failure()
        self._send(rank, {"do": "more", "stream": stream.number})
        return batch

    def check_end(self, stream: OpenStream, number: int) -> None:
        """At the end of an epoch that nobody sharded by hand, all workers must be at its end."""
        descriptions = self.describe(stream.mode)
        for rank, queue in stream.waiting.items():
            if descriptions[rank].already_sharded:
                continue
            extra, batch = self._await(rank, lambda queue=queue: queue[0] if queue else None)
            if batch is not END:
                raise StreamingError(
                    f"worker {1 + number % self._num_workers} has {number} batches in {stream.mode}"
                    f" epoch {stream.epoch}, and worker {rank} has batch {extra}",
                    hint="every task must make the same dataset",
                )

    # The training loop's thread.

    def _take_in(self) -> None:
        """Give each worker that came back what its predecessor was asked for and did not send."""
        for rank, worker in list(self._ledger.returned.items()):
            del self._ledger.returned[rank]
            before = self._ledger.workers[rank]
            before.connection.close()
            worker.waited_seconds, worker.last_batch = before.waited_seconds, before.last_batch
            worker.busy_seconds = before.busy_seconds
            self._ledger.workers[rank] = worker
            for mode in self._asked:
                if (mode, rank) not in self._ledger.descriptions:
                    self._send(rank, {"do": "describe", "mode": mode})
            for stream in self._ledger.streams.values():
                ended = bool(stream.waiting[rank]) and stream.waiting[rank][-1][1] is END
                if not ended:
                    self._send(rank, self._opening(stream, rank))
            _logger.info("%s takes the place of the one that was lost", worker.name)

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        worker = self._ledger.workers[rank]
        try:
            worker.send(message)
        except OSError as error:
            if self._workers_come_back:
                return  # whoever takes its place is told what is due by then
            # The receiving thread may know better why: give it a moment.
            with self._ledger.changed:
                self._ledger.changed.wait_for(lambda: self._ledger.failure is not None, timeout=1.0)
            self._ledger.fail(rank, f"was lost: {error.strerror or error}")
            self._ledger.raise_failure()

    def _await(self, rank: int, look: Callable[[], _T | None]) -> _T:
        """What `look` finds, once it finds something; times the wait and watches its limits."""
        settings = self._settings
        started = time.monotonic()
        warned = False
        with self._ledger.changed:
            while True:
                self._ledger.raise_failure()
                self._take_in()
                worker = self._ledger.workers[rank]
                found = look()
                waited = time.monotonic() - started
                if found is not None:
                    worker.waited_seconds += waited
                    return found
                if waited >= settings.fail_after_seconds:
                    self._ledger.fail(rank, f"has sent nothing for {waited:.0f} seconds")
                    continue
                away = time.monotonic() - worker.lost_at_seconds if worker.lost else 0.0
                if away >= settings.replace_timeout_seconds:
                    self._ledger.fail(rank, f"{worker.lost}, and did not come back")
                    continue
                if waited >= settings.warn_after_seconds and not warned:
                    warned = True
                    _logger.warning(
                        "waiting for %s for %.0f seconds; the last batch received from it: %s",
                        *(worker.name, waited, worker.last_batch),
                    )
                limit = settings.fail_after_seconds if warned else settings.warn_after_seconds
                pause = min(limit, settings.fail_after_seconds) - waited
                if worker.lost:
                    pause = min(pause, settings.replace_timeout_seconds - away)
                self._ledger.changed.wait(max(pause, 0.001))

    def _missing(self) -> StreamingError:
        missing = [r for r in range(1, self._num_workers + 1) if r not in self._ledger.present()]
        return StreamingError(
            f"worker(s) {', '.join(map(str, missing))} of {self._num_workers} did not connect"
            f" within {self._settings.join_timeout_seconds:.0f} seconds",
            where=self.address,
            hint="start all tasks with srun or `openwafer launch`, with the same --cs_ip",
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

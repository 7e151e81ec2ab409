"""What the coordinator asks of the workers, and how long it waits for an answer.

Decides the wait for all workers to be there, what one that came back is told, and the limits after
which a silent one is named or ends the run. For the training loop's thread: what comes in is kept
by `ledger.py`, whose changes are waited for here. Does not decide what is wanted next
(`coordinator.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from openwafer.errors import StreamingError
from openwafer.streaming.conversation import END, Description, OpenStream
from openwafer.streaming.ledger import Ledger
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.source import Mode

__all__ = ["Requests"]

_logger = logging.getLogger("openwafer.streaming")
_T = TypeVar("_T")


class Requests:
    """Asks the workers of ranks 1 to `num_workers`.

    Args:
        address: where they are expected, for the error that says they are missing.
        workers_come_back: one that is lost will be there again, and is then told what is due.
    """

    def __init__(
        self,
        ledger: Ledger,
        num_workers: int,
        settings: StreamSettings,
        *,
        address: str,
        workers_come_back: bool,
    ) -> None:
        self._ledger = ledger
        self._address = address
        self._ranks = range(1, num_workers + 1)
        self._settings = settings
        self._workers_come_back = workers_come_back
        self._asked: set[Mode] = set()
        self._ready = False

    def wait_for_workers(self) -> None:
        """Return when all workers are connected.

        Raises:
            StreamingError: some are missing after `join_timeout_seconds` (named), or one that was
                there is lost.
        """
        if self._ready:
            return
        _logger.info("Waiting for %d streamer(s) to prime the data pipeline", len(self._ranks))
        deadline = time.monotonic() + self._settings.join_timeout_seconds
        with self._ledger.changed:
            while len(self._ledger.present()) < len(self._ranks):
                self._ledger.raise_failure()
                self._take_in()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise self._missing()
                self._ledger.changed.wait(remaining)
        self._ready = True
        _logger.info("Streamers are ready")

    def _missing(self) -> StreamingError:
        present = self._ledger.present()
        missing = [rank for rank in self._ranks if rank not in present]
        return StreamingError(
            f"worker(s) {', '.join(map(str, missing))} of {len(self._ranks)} did not connect"
            f" within {self._settings.join_timeout_seconds:.0f} seconds",
            where=self._address,
            hint="start all tasks with srun or `openwafer launch`, with the same --cs_ip",
        )

    def descriptions(self, mode: Mode) -> dict[int, Description]:
        """By rank, what each worker says about its data for `mode`; asked once.

        Raises:
            StreamingError: a worker failed.
        """
        if mode not in self._asked:
            self._asked.add(mode)
            for rank in self._ranks:
                self.send(rank, {"do": "describe", "mode": mode})
        return {
            rank: self.wait_for(rank, lambda rank=rank: self._ledger.descriptions.get((mode, rank)))
            for rank in self._ranks
        }

    def open(self, stream: OpenStream, rank: int) -> None:
        """Tell a worker to stream what is due from it, as far as there is room."""
        opening = {
            "do": "open",
            "stream": stream.number,
            "mode": stream.mode,
            "epoch": stream.epoch,
            "start": stream.next_number[rank],
            "credit": self._settings.window_batches - len(stream.waiting[rank]),
        }
        self.send(rank, opening)

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """Send to a worker.

        Raises:
            StreamingError: it is gone, and will not come back.
        """
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

    def wait_for(self, rank: int, look: Callable[[], _T | None]) -> _T:
        """What `look` finds of a worker's, once it finds something; times the wait.

        Raises:
            StreamingError: a worker failed, or this one is silent for too long.
        """
        started, warned = time.monotonic(), False
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
                if waited >= self._settings.warn_after_seconds and not warned:
                    warned = True
                    _logger.warning(
                        "waiting for %s for %.0f seconds; the last batch received from it: %s",
                        *(worker.name, waited, worker.last_batch),
                    )
                self._pause(rank, waited, warned=warned)

    def _pause(self, rank: int, waited: float, *, warned: bool) -> None:
        """Wait for a change, but not beyond the next limit; at the last one the worker has
        failed."""
        settings, worker = self._settings, self._ledger.workers[rank]
        if waited >= settings.fail_after_seconds:
            self._ledger.fail(rank, f"has sent nothing for {waited:.0f} seconds")
            return
        away = time.monotonic() - worker.lost_at_seconds if worker.lost else 0.0
        if away >= settings.replace_timeout_seconds:
            self._ledger.fail(rank, f"{worker.lost}, and did not come back")
            return
        pause = settings.fail_after_seconds - waited
        if not warned:
            pause = min(pause, settings.warn_after_seconds - waited)
        if worker.lost:
            pause = min(pause, settings.replace_timeout_seconds - away)
        self._ledger.changed.wait(max(pause, 0.001))

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
                    self.send(rank, {"do": "describe", "mode": mode})
            for stream in self._ledger.streams.values():
                ended = bool(stream.waiting[rank]) and stream.waiting[rank][-1][1] is END
                if not ended:
                    self.open(stream, rank)
            _logger.info("%s takes the place of the one that was lost", worker.name)

"""What has come from the workers: the side of the coordinator that receives.

Decides what a worker's message changes, that no worker may send more than it was asked for, and
what becomes of one whose connection is lost. One thread per worker receives; every change is made
and waited for under one condition. Does not ask for anything (coordinator.py).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from openwafer.errors import StreamingError
from openwafer.streaming import wire
from openwafer.streaming.conversation import END, Description, OpenStream, WorkerLink
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.shared_slots import SlotReader
from openwafer.streaming.source import Mode

__all__ = ["Ledger"]

_logger = logging.getLogger("openwafer.streaming")


class Ledger:
    """Workers, their descriptions, the open epochs with what has come of them, the first failure.

    Hold `changed` to read more than one of these together; it is notified at every change.

    Args:
        give_up: called with the rank of a worker that was lost and may come back.
        workers_come_back: a lost worker is no failure by itself.
    """

    def __init__(
        self,
        num_workers: int,
        settings: StreamSettings,
        *,
        workers_come_back: bool,
        give_up: Callable[[int], None],
    ) -> None:
        self._num_workers = num_workers
        self._settings = settings
        self._workers_come_back = workers_come_back
        self._give_up = give_up
        self.changed = threading.Condition()
        self.workers: dict[int, WorkerLink] = {}
        self.returned: dict[int, WorkerLink] = {}
        """Those that came back for a lost one; taken in by the thread that sends."""
        self.descriptions: dict[tuple[Mode, int], Description] = {}
        self.streams: dict[int, OpenStream] = {}
        self.failure: StreamingError | None = None
        self.closing = False
        self.threads: list[threading.Thread] = []

    def admit(self, rank: int, connection: socket.socket, address: str) -> None:
        """Take a connection that has proved itself, and receive from it from now on."""
        worker = WorkerLink(rank, connection, address, f"worker {rank} ({address})")
        thread = threading.Thread(
            target=self._receive, args=(worker,), name=f"from-worker-{rank}", daemon=True
        )
        with self.changed:
            if self.closing:
                connection.close()
                return
            if rank in self.workers:
                lost_again = self.returned.get(rank)
                if lost_again is not None:
                    lost_again.connection.close()
                self.returned[rank] = worker
            else:
                self.workers[rank] = worker
            thread.start()  # before anyone who closes can see it and wait for its end
            self.threads.append(thread)
            self.changed.notify_all()

    def present(self) -> list[int]:
        """Ranks of the workers that are connected."""
        return [rank for rank, worker in self.workers.items() if not worker.lost]

    def fail(self, rank: int, what: str, where: str = "") -> None:
        """Note the first failure; whoever waits for batches raises it."""
        with self.changed:
            if self.failure is None and not self.closing:
                worker = self.workers[rank]
                self.failure = StreamingError(
                    f"{worker.name} {what}\n  the last batch received from it: {worker.last_batch}",
                    where=where,
                )
            self.changed.notify_all()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _receive(self, worker: WorkerLink) -> None:
        limit = self._settings.max_payload_bytes
        try:
            while frame := wire.receive_frame(
                worker.connection, max_payload_bytes=limit, slots=worker.slots
            ):
                self._accept(worker, frame)
                del frame  # its batch is the queue's from here on
            self._lose(worker, "was lost: it closed the connection")
        except wire.CutShortError as error:
            self._lose(worker, f"was lost: {error.what}")
        except StreamingError as error:
            self.fail(worker.rank, f"was lost: {error.what}")
        except OSError as error:
            self._lose(worker, f"was lost: {error.strerror or error}")
        except (KeyError, TypeError, ValueError) as error:
            self.fail(worker.rank, f"was lost: it sent a message that makes no sense ({error!r})")

    def _accept(self, worker: WorkerLink, frame: wire.Frame) -> None:
        message = frame.message
        kind = message["is"]
        if kind == "failed":
            self.fail(worker.rank, f"failed: {message['error']}", str(message["where"]))
            return
        if kind == "hello" and message.get("memory") is not None:
            self._share(worker, message["memory"])
        with self.changed:
            if kind == "hello":
                host, pid = str(message["host"])[:200], int(message["pid"])
                worker.name = f"worker {worker.rank} (host {host}, pid {pid}, {worker.address})"
            elif kind == "described":
                length = message["num_batches"]
                self.descriptions[message["mode"], worker.rank] = Description(
                    num_batches=None if length is None else int(length),
                    already_sharded=bool(message["already_sharded"]),
                )
            else:
                self._queue(worker, kind, frame)
            self.changed.notify_all()

    def _share(self, worker: WorkerLink, offer: Mapping[str, Any]) -> None:
        """Open the memory that a worker offers, if it is on this machine."""
        try:
            worker.slots = SlotReader(offer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.debug("the batches of %s come over its connection: %s", worker.name, error)
        else:
            worker.send({"do": "share"})

    def _queue(self, worker: WorkerLink, kind: str, frame: wire.Frame) -> None:
        stream = self.streams.get(frame.message["stream"])
        if stream is None:
            return  # of an epoch that was left early
        queue = stream.waiting[worker.rank]
        if kind == "end":
            queue.append((None, END))
            return
        if kind != "batch" or not frame.has_batch:
            raise ValueError(kind)
        if len(queue) >= self._settings.window_batches:
            raise ValueError("more batches than it was asked for")
        number = int(frame.message["number"])
        busy = float(frame.message.get("busy_seconds", 0.0))
        worker.busy_seconds[stream.mode] = worker.busy_seconds.get(stream.mode, 0.0) + busy
        stream.next_number[worker.rank] = number + self._num_workers
        worker.last_batch = f"{stream.mode} epoch {stream.epoch} batch {number}"
        queue.append((number, frame.batch))

    def _lose(self, worker: WorkerLink, what: str) -> None:
        """The connection is gone: the end of the run, or of this worker's first life."""
        if not self._workers_come_back:
            self.fail(worker.rank, what)
            return
        with self.changed:
            if self.closing:
                return
            worker.lost, worker.lost_at_seconds = what, time.monotonic()
            self._give_up(worker.rank)
            self.changed.notify_all()
        _logger.warning("%s %s; waiting for it to come back", worker.name, what)

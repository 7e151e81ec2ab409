"""A worker task: loads its shard of the batches and streams them when asked.

Decides what a worker does with each of the coordinator's messages (listed in `conversation.py`),
and how it ends. Does not decide how it finds the coordinator (`joining.py`), how it learns that
that is gone (`inbox.py`), or the order of batches (`loader.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openwafer.errors import OpenWaferError
from openwafer.streaming import wire
from openwafer.streaming.blame import user_place
from openwafer.streaming.inbox import Inbox
from openwafer.streaming.joining import join_run
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.shard import Shard
from openwafer.streaming.shared_slots import SlotWriter
from openwafer.streaming.signals import OutlivedSignal
from openwafer.streaming.source import Batch, Mode
from openwafer.streaming.tasks import TaskEnvironment

__all__ = ["run_worker", "worker_shard"]

_logger = logging.getLogger("openwafer.streaming")


def worker_shard(environment: TaskEnvironment) -> Shard:
    """The shard that the worker of this rank streams."""
    assert environment.role == "worker"
    return Shard(environment.worker_rank - 1, environment.num_workers)


def run_worker(
    make_sequence: Callable[[Mode], BatchSequence],
    address: str,
    environment: TaskEnvironment,
    *,
    settings: StreamSettings = StreamSettings(),  # noqa: B008 (frozen)
) -> None:
    """Stream batches to the coordinator at `address` until it says stop.

    Args:
        make_sequence: called once per mode, when the coordinator first asks for it; gives the
            batches of `worker_shard(environment)`.
        address: `host:port`, as `--cs_ip`.

    Raises:
        ConfigError: `address` is not one.
        StreamingError: the coordinator cannot be reached, refuses this task, or is gone.
        Exception: what the user's data code raises; the coordinator has been told.
    """
    connection = join_run(address, environment, settings)
    with OutlivedSignal() as signals:
        inbox = Inbox(connection, address, settings, signals)
        streamer = _Streamer(connection, inbox, make_sequence, worker_shard(environment), settings)
        _run(streamer, inbox, connection, settings)


def _run(
    streamer: _Streamer, inbox: Inbox, connection: socket.socket, settings: StreamSettings
) -> None:
    try:
        try:
            streamer.run()
        finally:
            inbox.end_interrupts()
    except OSError as error:
        # Only of the connection: a user's own was reported and is a _UserError by now.
        raise inbox.loss(error) from error
    except KeyboardInterrupt as error:
        if not inbox.interrupted:
            raise
        if not inbox.stopped:
            raise inbox.loss(error) from error
    except _UserError as error:
        _end_politely(connection, inbox, settings)
        raise error.__cause__ or error from None
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # ends the inbox's thread
        connection.close()


class _UserError(Exception):
    """Carries an exception of the user's data code past the handling of our own."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One epoch being streamed."""

    number: int
    batches: Iterator[Batch]
    next_batch: int
    credit: int
    sending_seconds: float = 0.0
    """What sending the last batch took."""


class _Streamer:
    """Obeys messages and, between them, loads and sends where there is credit."""

    def __init__(
        self,
        connection: socket.socket,
        inbox: Inbox,
        make_sequence: Callable[[Mode], BatchSequence],
        shard: Shard,
        settings: StreamSettings,
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._make_sequence = make_sequence
        self._shard = shard
        self._settings = settings
        self._offered = _offered_memory(settings)
        self._slots: SlotWriter | None = None
        """`_offered`, once the coordinator has opened it."""
        self._sequences: dict[Mode, BatchSequence] = {}
        self._streams: dict[Mode, _Stream] = {}

    def run(self) -> None:
        try:
            self._say_hello()
            while True:
                ready = [stream for stream in self._streams.values() if stream.credit > 0]
                message = self._inbox.take(wait=not ready)
                if message is None:
                    self._advance(ready[0])
                elif message["do"] == "stop":
                    return
                else:
                    self._obey(message)
        finally:
            self._streams.clear()  # ends DataLoader processes
            if self._offered is not None:
                self._offered.close()

    def _say_hello(self) -> None:
        hello = {"is": "hello", "host": socket.gethostname(), "pid": os.getpid()}
        memory = self._offered.offer if self._offered is not None else None
        wire.send_message(self._connection, hello | {"memory": memory})

    def _obey(self, message: dict[str, Any]) -> None:
        what = message["do"]
        if self._slots is not None:
            self._slots.give_back(message.get("free", ()))
        if what == "share":
            self._slots = self._offered
        elif what == "describe":
            self._describe(message["mode"])
        elif what == "open":
            self._open(message)
        elif what == "more":
            for stream in self._streams.values():
                stream.credit += stream.number == message["stream"]
        elif what == "close":
            self._close(message["stream"])

    def _describe(self, mode: Mode) -> None:
        sequence = self._sequence(mode)
        answer = {"is": "described", "mode": mode, "already_sharded": sequence.already_sharded}
        answer["num_batches"] = self._user(lambda: sequence.num_batches)
        wire.send_message(self._connection, answer)

    def _open(self, message: dict[str, Any]) -> None:
        mode: Mode = message["mode"]
        self._streams.pop(mode, None)
        start = int(message["start"])
        self._streams[mode] = _Stream(
            number=int(message["stream"]),
            batches=self._sequence(mode).epoch(int(message["epoch"]), start),
            next_batch=self._shard.first_from(start),
            credit=int(message["credit"]),
        )

    def _close(self, number: int) -> None:
        self._streams = {m: s for m, s in self._streams.items() if s.number != number}

    def _advance(self, stream: _Stream) -> None:
        """Load and send one batch, or say that the epoch has ended."""
        end, began = object(), time.perf_counter()
        batch = self._user(lambda: next(stream.batches, end))
        loaded = time.perf_counter()
        if batch is end:
            self._close(stream.number)
            wire.send_message(self._connection, {"is": "end", "stream": stream.number})
            return
        # Sending is known once it is done: it is told with the next batch.
        busy_seconds = loaded - began + stream.sending_seconds
        message: dict[str, Any] = {"is": "batch", "stream": stream.number}
        message |= {"number": stream.next_batch, "busy_seconds": busy_seconds}
        try:
            wire.send_batch(
                self._connection,
                message,
                batch,
                max_payload_bytes=self._settings.max_payload_bytes,
                slots=self._slots,
            )
        except OpenWaferError as error:
            raise self._report(error) from error
        stream.sending_seconds = time.perf_counter() - loaded
        stream.next_batch += self._shard.count
        stream.credit -= 1

    def _sequence(self, mode: Mode) -> BatchSequence:
        if mode not in self._sequences:
            self._sequences[mode] = self._user(lambda: self._make_sequence(mode))
        return self._sequences[mode]

    def _user(self, call: Callable[[], Any]) -> Any:
        """Run what may be user code; what it raises is told to the coordinator first."""
        try:
            return call()
        except Exception as error:
            raise self._report(error) from error

    def _report(self, error: Exception) -> _UserError:
        if isinstance(error, OpenWaferError):
            text, where = error.what, error.where
        else:
            text, where = f"{type(error).__name__}: {error}", user_place(error)
        # Bounded well below the size of a header.
        report = {"is": "failed", "error": text[-20_000:], "where": where[:2_000]}
        with contextlib.suppress(OSError):
            wire.send_message(self._connection, report)
        return _UserError()


def _offered_memory(settings: StreamSettings) -> SlotWriter | None:
    """Memory for batches, where the system has it and the settings want it."""
    if not settings.shared_slots:
        return None
    try:
        return SlotWriter(settings.shared_slots, settings.shared_slot_bytes)
    except OSError as error:
        _logger.debug("batches travel over the connection: %s", error)
        return None


def _end_politely(connection: socket.socket, inbox: Inbox, settings: StreamSettings) -> None:
    """Close so that the last message arrives: closing with unread data would drop it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    inbox.wait_for_end(settings.close_timeout_seconds)

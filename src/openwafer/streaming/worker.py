"""A worker task: loads its shard of the batches and streams them when asked.

Decides what a worker does with each of the coordinator's messages (listed in `conversation.py`),
and that it ends within seconds when the coordinator is gone. Does not decide the order of batches
(`loader.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openwafer.errors import OpenWaferError, StreamingError
from openwafer.streaming import auth, wire
from openwafer.streaming.address import parse_address
from openwafer.streaming.blame import user_place
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.meeting import find_coordinator
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.shard import Shard
from openwafer.streaming.signals import OutlivedSignal
from openwafer.streaming.source import Batch, Mode
from openwafer.streaming.tasks import TaskEnvironment

__all__ = ["run_worker", "worker_shard"]

_logger = logging.getLogger("openwafer.streaming")

_RETRY_SECONDS = 0.25
_GRACE_SECONDS = 2.0


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
    secret = auth.run_secret(environment, settings.connect_timeout_seconds)

    def find() -> str:
        return find_coordinator(address, environment, settings.connect_timeout_seconds)

    connection = _connect(find, secret, environment.worker_rank, settings)
    with OutlivedSignal() as signals:
        inbox = _Inbox(connection, address, settings, signals)
        streamer = _Streamer(connection, inbox, make_sequence, worker_shard(environment), settings)
        _run(streamer, inbox, connection, settings)


def _run(
    streamer: _Streamer, inbox: _Inbox, connection: socket.socket, settings: StreamSettings
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


def _connect(
    find: Callable[[], str], secret: bytes, rank: int, settings: StreamSettings
) -> socket.socket:
    """Connect and pass the handshake, trying again while the coordinator is not there.

    The address is looked up each time: what a run that was killed left under the same name is
    replaced once this run's coordinator is up.
    """
    deadline = time.monotonic() + settings.connect_timeout_seconds
    told = False
    while True:
        address = find()
        host, port = parse_address(address)
        try:
            connection = socket.create_connection((host, port), timeout=10)
            try:
                auth.introduce(connection, secret, rank, settings.handshake_timeout_seconds)
                wire.set_up_socket(connection)
                return connection
            except BaseException:
                connection.close()
                raise
        except auth.RefusedError as error:
            error.where = error.where or address
            raise
        except socket.gaierror as error:
            raise StreamingError(
                f"worker {rank} cannot find the coordinator's host: {error.strerror}", where=address
            ) from error
        except (OSError, StreamingError) as error:
            if time.monotonic() >= deadline:
                raise StreamingError(
                    f"worker {rank} could not reach the coordinator: {error}",
                    where=address,
                    hint="--cs_ip must be an address of the machine that runs task 0",
                ) from error
            if not told:
                told = True
                _logger.info("worker %d waits for the coordinator at %s", rank, address)
        time.sleep(_RETRY_SECONDS)


class _Inbox:
    """The coordinator's messages, read by a thread, which also notices that it is gone.

    User code that loads data cannot watch the connection. If it does not come back in time after
    the coordinator said stop or is gone, the main thread is interrupted as by Ctrl-C.
    """

    def __init__(
        self,
        connection: socket.socket,
        address: str,
        settings: StreamSettings,
        signals: OutlivedSignal,
    ) -> None:
        self._connection = connection
        self._signals = signals
        self._address = address
        self._limit = settings.max_payload_bytes
        self._messages: deque[dict[str, Any]] = deque()
        self._changed = threading.Condition()
        self._lost: str = ""
        self._finished = False
        self.stopped = False
        threading.Thread(target=self._read, name="from-coordinator", daemon=True).start()

    def take(self, *, wait: bool) -> dict[str, Any] | None:
        """The next message; None if there is none and `wait` is not set.

        Raises:
            StreamingError: the coordinator is gone.
        """
        with self._changed:
            while wait and not self._messages and not self._lost:
                self._changed.wait()
            if self._messages:
                return self._messages.popleft()
        if self._lost:
            raise self.loss(None)
        return None

    def loss(self, error: BaseException | None) -> StreamingError:
        """The error that says that the coordinator is gone, and how that was noticed."""
        why = self._lost or (str(error) if error else "")
        return StreamingError(
            f"the coordinator was lost: {why}",
            where=self._address,
            hint="its own messages say why it ended",
        )

    def wait_for_end(self, timeout_seconds: float) -> None:
        """Wait until the coordinator says stop or closes the connection."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._lost) or self.stopped, timeout_seconds)

    def end_interrupts(self) -> None:
        """The user's code has come back: no interrupt after this."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
        if self.interrupted:
            time.sleep(0.2)  # the signal may still be on its way: let it arrive here

    def _read(self) -> None:
        lost = "it closed the connection"
        try:
            while frame := wire.receive_frame(self._connection, max_payload_bytes=self._limit):
                with self._changed:
                    self._messages.append(frame.message)
                    self._changed.notify_all()
                if frame.message.get("do") == "stop":
                    self.stopped = True
                    break
        except StreamingError as error:
            lost = error.what
        except OSError as error:
            lost = error.strerror or str(error)
        with self._changed:
            self._lost = "" if self.stopped else lost
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: self._finished, _GRACE_SECONDS)
            if not ended:
                self._signals.interrupt()

    @property
    def interrupted(self) -> bool:
        """Whether the user's code was interrupted here."""
        return self._signals.interrupted


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
        inbox: _Inbox,
        make_sequence: Callable[[Mode], BatchSequence],
        shard: Shard,
        settings: StreamSettings,
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._make_sequence = make_sequence
        self._shard = shard
        self._limit = settings.max_payload_bytes
        self._sequences: dict[Mode, BatchSequence] = {}
        self._streams: dict[Mode, _Stream] = {}

    def run(self) -> None:
        hello = {"is": "hello", "host": socket.gethostname(), "pid": os.getpid()}
        wire.send_message(self._connection, hello)
        try:
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

    def _obey(self, message: dict[str, Any]) -> None:
        what = message["do"]
        if what == "describe":
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
            wire.send_batch(self._connection, message, batch, max_payload_bytes=self._limit)
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


def _end_politely(connection: socket.socket, inbox: _Inbox, settings: StreamSettings) -> None:
    """Close so that the last message arrives: closing with unread data would drop it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    inbox.wait_for_end(settings.close_timeout_seconds)

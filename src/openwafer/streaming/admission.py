"""How workers get in: the coordinator's listening socket.

Decides that every connection proves itself in a thread of its own, so that a stranger who says
nothing holds up nobody, and that listening ends once all are in. The proof is in `auth.py`. Does
not exchange a frame.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from openwafer.errors import StreamingError
from openwafer.streaming import auth
from openwafer.streaming.address import format_address, parse_address
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.wire import set_up_socket

__all__ = ["Admission"]

# Handshakes at a time. More connections are closed at once; true workers try again.
_MAX_HANDSHAKES = 64

_logger = logging.getLogger("openwafer.streaming")


class Admission:
    """Listens at `address` until every rank from 1 to `num_workers` has proved itself.

    Args:
        stays_open: go on listening after that, for ranks whose place was given up.
        on_admitted: called with the rank, its socket (blocking) and its address, in a thread.

    Raises:
        ConfigError: `address` is not one.
        StreamingError: the address cannot be listened at.
    """

    def __init__(
        self,
        address: str,
        num_workers: int,
        secret: bytes,
        settings: StreamSettings,
        on_admitted: Callable[[int, socket.socket, str], None],
        *,
        stays_open: bool = False,
    ) -> None:
        self._stays_open = stays_open
        self._num_workers = num_workers
        self._secret = secret
        self._settings = settings
        self._on_admitted = on_admitted
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self._num_admitted = 0
        self._closed = False
        self._slots = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._listener = _listen(address)
        host, port = self._listener.getsockname()[:2]
        self.address = format_address(host, port)
        """Where it listens; with port 0 asked for, the port that was given."""
        threading.Thread(target=self._accept, name="admission", daemon=True).start()

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()

    def give_up(self, rank: int) -> None:
        """The worker of this rank is gone: another task may take its place."""
        with self._lock:
            self._taken.discard(rank)

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                continue  # the connection was gone before it was taken
            place = format_address(*peer[:2])
            if not self._slots.acquire(blocking=False):
                _logger.warning("closed a connection from %s: too many at a time", place)
                connection.close()
                continue
            threading.Thread(
                target=self._shake_hands, args=(connection, place), name="handshake", daemon=True
            ).start()

    def _shake_hands(self, connection: socket.socket, place: str) -> None:
        claimed: list[int] = []
        try:
            rank = auth.admit(
                connection,
                self._secret,
                lambda rank: self._claim(rank, claimed),
                self._settings.handshake_timeout_seconds,
            )
            set_up_socket(connection)
        except (StreamingError, OSError) as error:
            with self._lock:
                self._taken.difference_update(claimed)
            _logger.warning("refused a connection from %s: %s", place, error)
            connection.close()
            return
        finally:
            self._slots.release()
        self._on_admitted(rank, connection, place)
        with self._lock:
            self._num_admitted += 1
            complete = self._num_admitted == self._num_workers and not self._stays_open
        if complete:
            self.close()

    def _claim(self, rank: int, claimed: list[int]) -> auth.Verdict:
        """Give the rank's place to this connection; `claimed` remembers it for a failure."""
        with self._lock:
            if not 1 <= rank <= self._num_workers:
                return auth.Verdict.UNKNOWN_RANK
            if rank in self._taken:
                return auth.Verdict.RANK_TAKEN
            self._taken.add(rank)
            claimed.append(rank)
            return auth.Verdict.ADMITTED


def _listen(address: str) -> socket.socket:
    host, port = parse_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(address, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_MAX_HANDSHAKES)
    except OSError as error:
        listener.close()
        raise _cannot_listen(address, error) from error
    return listener


def _cannot_listen(address: str, error: OSError) -> StreamingError:
    return StreamingError(
        f"the coordinator cannot listen at {address}: {error.strerror or error}",
        where="--cs_ip",
        allowed="an address of this machine and a free port",
    )

"""A worker's side of the connection: what the coordinator says, and that it is gone.

Decides how a worker whose main thread is in the user's code learns of either: a thread reads, and
interrupts the main thread where it does not come back in time. Does not decide what a message makes
a worker do (`worker.py`).
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from typing import Any

from openwafer.errors import StreamingError
from openwafer.streaming import wire
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.signals import OutlivedSignal

__all__ = ["Inbox"]

_GRACE_SECONDS = 2.0


class Inbox:
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

"""SIGTERM, SIGUSR1 and Ctrl-C while training.

Decides that the first one asks for an orderly stop (finish the step, save, say so) and a second
Ctrl-C ends at once. Does not decide what an orderly stop does (loop.py).
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]

# SIGUSR1 is what batch scripts have SLURM send before the time limit (`--signal=USR1@60`).
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A context in which SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

    Outside the main thread no handler can be set: the context then does nothing, and whoever owns
    the main thread may call `request`.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that a signal ended: 143 or 130; 0 if none came."""
        return 0 if self.requested is None else 128 + self.requested

    def request(self, which: signal.Signals = signal.SIGTERM) -> None:
        """Ask for an orderly stop, as the signal would."""
        self.requested = self.requested or which

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for which in _WATCHED:
                self._previous[which] = signal.signal(which, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for which, handler in self._previous.items():
            # None: the handler was not set from Python, and cannot be put back from here.
            signal.signal(which, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        if self.requested is not None and which is signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = which
            # Not through logging or print: the handler may have cut into one of their writes.
            os.write(2, f"\n{which.name}: stopping after this step ({_again(which)})\n".encode())


def _again(which: signal.Signals) -> str:
    return "Ctrl-C again: at once" if which is signal.SIGINT else "a checkpoint is saved first"

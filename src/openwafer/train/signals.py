"""SIGTERM, SIGUSR1 and Ctrl-C while training.

Decides that the first one asks for an orderly stop (finish the step, save, say so) and a second
Ctrl-C ends at once. Does not decide which signals are watched (streaming/signals.py), nor what an
orderly stop does (loop.py).
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from openwafer.streaming.signals import WatchedSignals

__all__ = ["StopRequest"]


class StopRequest(WatchedSignals):
    """A context in which SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

    Outside the main thread no signal is seen: whoever owns the main thread may call `request`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that a signal ended: 143 or 130; 0 if none came."""
        return 0 if self.requested is None else 128 + self.requested

    def request(self, which: signal.Signals = signal.SIGTERM) -> None:
        """Ask for an orderly stop, as the signal would."""
        self.requested = self.requested or which

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

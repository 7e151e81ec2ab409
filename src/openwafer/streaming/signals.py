"""SIGTERM, SIGUSR1 and Ctrl-C in the processes that load data.

Decides that such a process outlives the first one. Both reach every process of a run at once (the
group of a terminal, a SLURM step, the local launcher), and the process that trains then finishes
its step and saves a checkpoint, for which it may still need batches; it ends the others itself.
Does not decide how training stops (train/signals.py).
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["OutlivedSignal", "outlive_first_signal"]

GRACE_SECONDS = 25.0
"""How long a worker task goes on after a first signal: shorter than the 30 seconds (KillWait) that
SLURM leaves before it kills."""

# SIGUSR1 is what batch scripts have SLURM send before the time limit; the second may be SIGTERM.
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class OutlivedSignal:
    """A context for a worker task's main thread: the first signal only starts the grace time; a
    second one, or its end, raises SystemExit with 128 + the signal.

    Elsewhere than in the main thread the context does nothing. `interrupted` says whether
    `interrupt` was called and could do what it is for.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self._grace_seconds = grace_seconds
        self._timer: threading.Timer | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self.interrupted = False

    def interrupt(self) -> None:
        """From another thread: raise KeyboardInterrupt in the main thread. Does nothing where user
        code has set a handler of its own, or outside of the context."""
        if signal.getsignal(signal.SIGINT) == self._handle:
            self.interrupted = True
            signal.pthread_kill(_main_thread(), signal.SIGINT)

    def __enter__(self) -> OutlivedSignal:
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
        if self._timer is not None:
            self._timer.cancel()
        for which, handler in self._previous.items():
            # None: the handler was not set from Python, and cannot be put back from here.
            signal.signal(which, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        if self._timer is not None:
            raise SystemExit(128 + number)
        self._timer = threading.Timer(
            self._grace_seconds, signal.pthread_kill, (_main_thread(), number)
        )
        self._timer.daemon = True
        self._timer.start()


def _main_thread() -> int:
    identifier = threading.main_thread().ident
    assert identifier is not None, "the main thread has begun"
    return identifier


def outlive_first_signal() -> None:
    """For a process of a DataLoader, from its own start: the second signal ends it.

    One that died would take the process that reads from it along, in the middle of a step. torch
    itself sends SIGTERM only to a process that does not end when asked, and again when the
    interpreter ends.
    """
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)

    for which in _WATCHED:
        signal.signal(which, handle)

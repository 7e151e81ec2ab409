"""SIGTERM, SIGUSR1 and Ctrl-C: who watches them, and what processes that load data make of them.

Decides how handlers are set and put back (`WatchedSignals`, for training too), and that a process
that loads data outlives the first signal. All three reach every process of a run at once (the group
of a terminal, a SLURM step, the local launcher), and the process that trains then finishes its step
and saves a checkpoint, for which it may still need batches; it ends the others itself. Does not
decide how training stops (train/signals.py).
"""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from types import FrameType, TracebackType
from typing import Any, TypeVar

__all__ = ["OutlivedSignal", "WatchedSignals", "outlive_first_signal"]

GRACE_SECONDS = 25.0
"""How long a worker task goes on after a first signal: shorter than the 30 seconds (KillWait) that
SLURM leaves before it kills."""

# SIGUSR1 is what batch scripts have SLURM send before the time limit (`--signal=USR1@60`).
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_Self = TypeVar("_Self", bound="WatchedSignals")


class WatchedSignals(ABC):
    """A context for the main thread in which `_handle` takes the signals; the handlers before it
    are put back. Elsewhere than in the main thread no handler can be set: it does nothing there."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None: ...

    def __enter__(self: _Self) -> _Self:
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


class OutlivedSignal(WatchedSignals):
    """For the main thread of a task that does not train: the first signal only starts the grace
    time; a second one, or its end, raises SystemExit with 128 + the signal.

    `interrupted` says whether `interrupt` was called and could do what it is for.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        super().__init__()
        self._grace_seconds = grace_seconds
        self._timer: threading.Timer | None = None
        self.interrupted = False

    def interrupt(self) -> None:
        """From another thread: raise KeyboardInterrupt in the main thread. Does nothing where user
        code has set a handler of its own, or outside of the context."""
        if signal.getsignal(signal.SIGINT) == self._handle:
            self.interrupted = True
            signal.pthread_kill(_main_thread(), signal.SIGINT)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().__exit__(kind, error, trace)

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

"""What happened when in each step: the record behind `--timeline` and the summary of a run.

Decides what a span is, who may record one, and which spans belong to a step. Does not decide what
they say about a step (breakdown.py, step_model.py) or how they are written (trace_file.py).

An executor calls `recorder.span(kind, layer_name, detail)` around its work, on whichever thread
does it; the training loop says where a step begins and ends. `Recorder` itself records nothing and
costs next to nothing, so executors need not ask whether anybody looks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

__all__ = ["NO_RECORDER", "Kind", "Recorder", "Span", "StepRecord", "StepSink", "Timeline"]

Kind = Literal["compute", "fetch", "return", "update", "input"]
"""compute: a layer's functions. fetch: weights to the device, from disk too. return: gradients to
the host, their sums and clipping included. update: the optimizer. input: waiting for batches."""

_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work; `start` and `end` in seconds of one clock, `thread` its identity.

    detail: what tells several spans of a layer apart: "forward", "backward" or "recompute".
    """

    kind: Kind
    layer: str
    detail: str
    thread: int
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The spans that ended in one step, in order of their start; the first may begin before it.

    thread: that of the step, on which its batches are waited for.
    """

    step: int
    start: float
    end: float
    thread: int
    spans: tuple[Span, ...]


class StepSink(Protocol):
    """Takes each step as it ends."""

    def add(self, record: StepRecord) -> None: ...


class Recorder:
    """Records nothing: what an executor has where nobody asked. Safe to use from any thread."""

    def span(self, kind: Kind, layer: str, detail: str = "") -> AbstractContextManager[None]:
        """Around one stretch of work of one kind for one layer. Spans of a thread do not nest."""
        return _NOTHING

    def planned(self, *, prefetch_depth: int, returns_waiting: int) -> None:
        """How many layers ahead the executor fetches, and how many may wait for their return."""

    def begin_step(self, step: int) -> None:
        """A step begins, with the wait for its batches."""

    def end_step(self) -> None:
        """The step's update has been decided; updates put off end later, in the next step."""

    def abandon_step(self) -> None:
        """The step that began will not be: there were no more batches."""


NO_RECORDER = Recorder()


class Timeline(Recorder):
    """Keeps the spans of the current step, and hands each step to the sinks as it ends.

    Args:
        sinks: called on the thread that ends the step, one after another.
        clock: seconds; another one is for tests.
    """

    def __init__(
        self, sinks: Sequence[StepSink], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._sinks = tuple(sinks)
        self._clock = clock
        # Every thread appends; end_step takes from the front. Neither needs a lock.
        self._spans: list[Span] = []
        self._step: tuple[int, float] | None = None
        self.prefetch_depth = 0
        self.returns_waiting = 1

    def span(self, kind: Kind, layer: str, detail: str = "") -> AbstractContextManager[None]:
        return _OpenSpan(self, kind, layer, detail)

    def planned(self, *, prefetch_depth: int, returns_waiting: int) -> None:
        self.prefetch_depth, self.returns_waiting = prefetch_depth, returns_waiting

    def now(self) -> float:
        return self._clock()

    def record(self, span: Span) -> None:
        """Keep a span that was measured by the same clock. Work between steps (an evaluation, a
        checkpoint) is part of none, and dropped."""
        if self._step is not None:
            self._spans.append(span)

    def begin_step(self, step: int) -> None:
        self._step = (step, self._clock())

    def abandon_step(self) -> None:
        self._step = None
        self._spans.clear()

    def end_step(self) -> None:
        if self._step is None:
            return
        (step, start), end = self._step, self._clock()
        self._step = None
        count = len(self._spans)
        spans = self._spans[:count]
        del self._spans[:count]
        inside = sorted((s for s in spans if s.end > start), key=lambda span: span.start)
        record = StepRecord(
            step=step, start=start, end=end, thread=threading.get_ident(), spans=tuple(inside)
        )
        for sink in self._sinks:
            sink.add(record)


class _OpenSpan:
    """A span that has begun."""

    __slots__ = ("_detail", "_kind", "_layer", "_start", "_timeline")

    def __init__(self, timeline: Timeline, kind: Kind, layer: str, detail: str) -> None:
        self._timeline = timeline
        self._kind: Kind = kind
        self._layer, self._detail = layer, detail
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = self._timeline.now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timeline.record(
            Span(
                self._kind,
                self._layer,
                self._detail,
                threading.get_ident(),
                self._start,
                self._timeline.now(),
            )
        )

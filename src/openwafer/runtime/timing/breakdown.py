"""Where the time of a step went: its seconds, shared out among the kinds of work.

Decides what counts as exposed: while a layer computes, nothing else costs time; while none does,
the step waits for whatever is in progress. Does not decide what a step should have taken
(step_model.py).

The exposed seconds of all kinds, compute included, add up to the step. Busy seconds are the work
done, on all threads, hidden or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from openwafer.runtime.timing.timeline import Kind, Span, StepRecord

__all__ = ["KINDS", "Breakdown", "BreakdownSum", "break_down"]

KINDS: tuple[Kind, ...] = ("compute", "fetch", "return", "update", "input")

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Seconds of one step, or the mean of several.

    busy_seconds: work done, by kind. exposed_seconds: time in which nothing computed and this kind
    was waited for; for compute, the time in which something did. other_seconds: neither: the loss,
    metrics, logging, Python.
    """

    step_seconds: float
    busy_seconds: Mapping[Kind, float]
    exposed_seconds: Mapping[Kind, float]
    other_seconds: float

    @property
    def bound_by(self) -> str:
        """The kind, or "other", that most of the step was spent on or waiting for."""
        shares = {**self.exposed_seconds, "other": self.other_seconds}
        return max(shares, key=lambda kind: shares[kind])


def break_down(record: StepRecord) -> Breakdown:
    """Share out the seconds of one step."""
    window = (record.start, record.end)
    spans = [span for span in record.spans if span.start < record.end]
    computing = _union([_cut(span, window) for span in spans if span.kind == "compute"])
    exposed: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    exposed["compute"] = _total(computing)
    others = [span for span in spans if span.kind != "compute"]
    for gap in _gaps(window, computing):
        _share_out(gap, others, _next_layer(spans, gap), exposed)
    busy: dict[Kind, float] = {
        kind: _total([_cut(span, window) for span in spans if span.kind == kind]) for kind in KINDS
    }
    seconds = record.end - record.start
    return Breakdown(
        step_seconds=seconds,
        busy_seconds=busy,
        exposed_seconds=exposed,
        other_seconds=max(0.0, seconds - sum(exposed.values())),
    )


def _next_layer(spans: Sequence[Span], gap: Interval) -> str | None:
    """The layer that computes after the gap: what is done for it is what it waits for."""
    following = (s.layer for s in spans if s.kind == "compute" and s.start >= gap[1])
    return next(following, None)


def _share_out(
    gap: Interval, others: Sequence[Span], layer: str | None, exposed: dict[Kind, float]
) -> None:
    """Give each moment of a gap to one kind: the most plausible one of those in progress.

    What is done for the next layer comes first; then what stands before it in the store's queue.
    """

    def of(kind: Kind, wanted: str | None = None) -> Callable[[Span], bool]:
        return lambda span: span.kind == kind and wanted in (None, span.layer)

    rules = [of("input")]
    if layer is not None:
        rules += [of("fetch", layer), of("update", layer), of("return", layer)]
    rules += [of("update"), of("return"), of("fetch")]
    left = [gap]
    inside = [span for span in others if span.start < gap[1] and span.end > gap[0]]
    for rule in rules:
        for span in filter(rule, inside):
            before = _total(left)
            left = _subtract(left, [(span.start, span.end)])
            exposed[span.kind] += before - _total(left)


@dataclass(slots=True)
class BreakdownSum:
    """Adds breakdowns up, so that a long run keeps one."""

    num_steps: int = 0
    _step_seconds: float = 0.0
    _busy: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    _exposed: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    _other: float = 0.0

    def add(self, part: Breakdown) -> None:
        self.num_steps += 1
        self._step_seconds += part.step_seconds
        self._other += part.other_seconds
        for kind in KINDS:
            self._busy[kind] += part.busy_seconds[kind]
            self._exposed[kind] += part.exposed_seconds[kind]

    def mean(self) -> Breakdown:
        """Per step; there must be one."""
        count = self.num_steps
        return Breakdown(
            step_seconds=self._step_seconds / count,
            busy_seconds={kind: seconds / count for kind, seconds in self._busy.items()},
            exposed_seconds={kind: seconds / count for kind, seconds in self._exposed.items()},
            other_seconds=self._other / count,
        )


def _cut(span: Span, window: Interval) -> Interval:
    return max(span.start, window[0]), min(span.end, window[1])


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same moments as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def _gaps(window: Interval, covered: Sequence[Interval]) -> list[Interval]:
    """The moments of `window` outside disjoint intervals in order."""
    edges = [window[0], *(edge for interval in covered for edge in interval), window[1]]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, end) for start, end in pairs if end > start]


def _subtract(intervals: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """The moments of `intervals` that are in none of `taken`."""
    left = list(intervals)
    for start, end in taken:
        pieces: list[Interval] = []
        for low, high in left:
            pieces += [
                piece
                for piece in ((low, min(high, start)), (max(low, end), high))
                if piece[1] > piece[0]
            ]
        left = pieces
    return left


def _total(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)

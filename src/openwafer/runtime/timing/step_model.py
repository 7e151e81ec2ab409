"""What a step of weight streaming should take, from what its parts take.

Decides the model: layers compute one after another; each waits for its weights, which are fetched
some layers ahead; gradients go back and are updated behind; work that one thread does queues there.
So a layer costs the longest of what happens at once, and the step the sum over its layers, plus
what the first and last layers cannot hide. Does not decide what is measured (timeline.py) or what
anybody should change (summary.py); the same model with other parts answers "what if".

Formulas of the same kind: T = max(compute, link, optimizer) + fill, per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openwafer.runtime.timing.timeline import Kind, Span, StepRecord

__all__ = ["PartsSum", "StepParts", "predict_step_seconds"]

Pass = Literal["forward", "backward"]
LayerPass = tuple[str, Pass]

_SETTLE_STEPS = 3
"""Steps that are played through; the last one is counted, when queues are as in a long run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Seconds of the parts of one step, the mean over several.

    order: what computes, in order. compute, fetch: by layer and pass. give_back, update: by layer.
    recompute: of `compute`, the part that runs a layer forward again, by layer and pass.
    threads: the kinds of work that each of the store's threads does; work queues for its threads.
    updates_late: updates run before the layer's next fetch, and not as its gradient arrives.
    returns_waiting: layers whose gradients may wait for the store while the next one computes; one
        while the last one does.
    alone_seconds: of the thread that computes, while it neither computes nor waits for the store.
    """

    order: tuple[LayerPass, ...]
    compute: Mapping[LayerPass, float]
    fetch: Mapping[LayerPass, float]
    recompute: Mapping[LayerPass, float]
    give_back: Mapping[str, float]
    update: Mapping[str, float]
    threads: tuple[frozenset[Kind], ...]
    updates_late: bool
    alone_seconds: float
    returns_waiting: int = 1


def predict_step_seconds(parts: StepParts, *, prefetch_depth: int) -> float:
    """Seconds of a step in a long run."""
    play = _Play(parts, prefetch_depth)
    ends = [play.step() for _ in range(_SETTLE_STEPS)]
    return ends[-1] - ends[-2]


class _Play:
    """The parts played through on a clock: when the compute thread and each store thread is free,
    and when each layer's last update was done."""

    def __init__(self, parts: StepParts, prefetch_depth: int) -> None:
        self._parts, self._depth = parts, prefetch_depth
        self._now = 0.0
        self._free = [0.0] * len(parts.threads)
        self._updated: dict[str, float] = {}
        self._late: dict[str, float] = {}

    def step(self) -> float:
        """Play one step; gives the time at its end."""
        order = self._parts.order
        for which in ("forward", "backward"):
            self._run_pass([item for item in order if item[1] == which])
        self._now += self._parts.alone_seconds
        return self._now

    def _run_pass(self, order: list[LayerPass]) -> None:
        """One pass: fetches are asked for `depth` layers ahead, from the beginning of the pass."""
        arrived: list[float] = []
        taken_over: list[float] = []
        for position, item in enumerate(order):
            while len(arrived) < min(position + 1 + self._depth, len(order)):
                arrived.append(self._fetch(order[len(arrived)]))
            self._now = max(self._now, arrived[position])
            if item[1] == "backward":
                # Gradients of some layers may wait while the next one computes, not of more.
                last = position == len(order) - 1
                waited_for = taken_over[: -1 if last else -self._parts.returns_waiting]
                self._now = max([self._now, *waited_for])
            self._now += self._parts.compute[item]
            if item[1] == "backward":
                taken_over.append(self._finish_layer(item[0]))

    def _fetch(self, item: LayerPass) -> float:
        """When the weights are there, asked for now."""
        layer = item[0]
        ready = self._updated.get(layer, 0.0)
        if layer in self._late:
            ready = self._work("update", self._late.pop(layer), self._now)
        return self._work("fetch", self._parts.fetch.get(item, 0.0), max(ready, self._now))

    def _finish_layer(self, layer: str) -> float:
        """When the store has taken a layer's gradients over."""
        returned = self._work("return", self._parts.give_back.get(layer, 0.0), self._now)
        seconds = self._parts.update.get(layer, 0.0)
        if self._parts.updates_late:
            self._late[layer] = seconds
            return returned
        self._updated[layer] = self._work("update", seconds, returned)
        return self._updated[layer]

    def _work(self, kind: Kind, seconds: float, asked: float) -> float:
        """When a piece of work is done that queues on its thread; none takes no time there."""
        able = [i for i, kinds in enumerate(self._parts.threads) if kind in kinds]
        if seconds == 0.0 or not able:
            return asked + seconds
        first = min(able, key=lambda index: self._free[index])
        self._free[first] = max(self._free[first], asked) + seconds
        return self._free[first]


@dataclass(slots=True)
class PartsSum:
    """Adds up the parts of steps, so that a long run keeps one of each."""

    num_steps: int = 0
    _order: list[LayerPass] = field(default_factory=list[LayerPass])
    _sums: dict[tuple[Kind, str, str], float] = field(
        default_factory=dict[tuple[Kind, str, str], float]
    )
    _recompute: dict[LayerPass, float] = field(default_factory=dict[LayerPass, float])
    _threads: dict[int, set[Kind]] = field(default_factory=dict[int, set[Kind]])
    _early_updates: int = 0
    _late_updates: int = 0

    def add(self, record: StepRecord) -> None:
        self.num_steps += 1
        backward_from = next(
            (s.start for s in record.spans if _is_compute(s, "backward")), record.end
        )
        for span in record.spans:
            if span.kind == "input":
                continue
            # What the computing thread does for the store holds the layer up like its own work.
            inline = span.thread == record.thread
            key = ("compute" if inline else span.kind, span.layer, _pass_of(span))
            self._sums[key] = self._sums.get(key, 0.0) + span.end - span.start
            if span.kind == "compute":
                item: LayerPass = (span.layer, _pass_of(span))
                if item not in self._order:
                    self._order.append(item)
                if span.detail == "recompute":
                    again = self._recompute.get(item, 0.0) + span.end - span.start
                    self._recompute[item] = again
            elif not inline:
                self._threads.setdefault(span.thread, set()).add(span.kind)
            if span.kind == "update":
                late = span.start < backward_from
                self._late_updates += late
                self._early_updates += not late

    def mean(self, alone_seconds: float) -> StepParts:
        """Per step; there must be one."""

        def of(kind: Kind) -> dict[LayerPass, float]:
            return {
                (layer, "backward" if detail == "backward" else "forward"): total / self.num_steps
                for (which, layer, detail), total in self._sums.items()
                if which == kind
            }

        def by_layer(kind: Kind) -> dict[str, float]:
            found: dict[str, float] = {}
            for (layer, _), seconds in of(kind).items():
                found[layer] = found.get(layer, 0.0) + seconds
            return found

        return StepParts(
            order=tuple(self._order),
            compute=of("compute"),
            fetch=of("fetch"),
            recompute={item: total / self.num_steps for item, total in self._recompute.items()},
            give_back=by_layer("return"),
            update=by_layer("update"),
            threads=tuple(frozenset(kinds) for kinds in self._threads.values()),
            updates_late=self._late_updates > self._early_updates,
            alone_seconds=alone_seconds,
        )


def _is_compute(span: Span, which: Pass) -> bool:
    return span.kind == "compute" and _pass_of(span) == which


def _pass_of(span: Span) -> Pass:
    """A recomputation is part of the backward pass, and so is all that follows from it."""
    forward = span.detail not in ("backward", "recompute") and span.kind in ("compute", "fetch")
    return "forward" if forward else "backward"

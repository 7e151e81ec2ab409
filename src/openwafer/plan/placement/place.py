"""Sizing and placement: `place(problem)`.

Decides the sequence: the smallest time target that fits (target.py), floorplans at that target with
short wires (wires.py), rectangles (settle.py); and with weights, which somewhat larger target gives
the better sum of time and wires.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from openwafer.plan.placement.effort import Clock, Effort
from openwafer.plan.placement.layout import Layout
from openwafer.plan.placement.ordering import pipeline_order
from openwafer.plan.placement.problem import Placement, Problem, Rect, wire_length
from openwafer.plan.placement.settle import settle
from openwafer.plan.placement.sizing import Sizing
from openwafer.plan.placement.target import Target, find_target, retarget
from openwafer.plan.placement.wires import Annealing, Wiring

__all__ = ["Weights", "place"]

_HOT, _WARM = 0.5, 0.2
"""Temperatures at which annealing starts, and starts again from a good floorplan."""

_STEPS = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4)
"""Targets that are tried with weights, as shares above the smallest."""

_FULL, _NEAR = 0.9, 1.1
"""A floor is full above this share, and outlines are near the smallest up to this ratio."""

_TARGET_SHARE, _TRADE_SHARE = 0.35, 0.35
"""Of the time that is left, for the target and for the weighing of targets, at most."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Wires against time: cycles × the slowest block + wires × the length of all wires is to be
    small, with the slowest block at most `most_ratio` × the area bound (or as fast as can be)."""

    cycles: float = 1.0
    wires: float = 1.0
    most_ratio: float = 1.05


@dataclass(frozen=True, slots=True)
class _Search:
    """What all steps of one call need."""

    problem: Problem
    sizing: Sizing
    wiring: Wiring
    random: Random
    clock: Clock


def place(
    problem: Problem,
    *,
    effort: Effort | None = None,
    time_limit_seconds: float | None = None,
    seed: int = 0,
    weights: Weights | None = None,
) -> Placement:
    """Sizes and places all blocks: the slowest as fast as possible, then the wires short; with
    `weights`, a weighted sum of both.

    The same problem, effort and seed give the same placement. `time_limit_seconds` without an
    effort chooses one that takes about a third of that; it is a cap that is not reached unless the
    machine is slow or busy.

    Raises:
        PlanError: the blocks do not fit the floor at any speed.
    """
    if not problem.blocks:
        return Placement({}, 0, 0.0, 0, 0.0)
    if effort is None:
        limit = time_limit_seconds
        effort = Effort() if limit is None else Effort.for_seconds(limit, len(problem.blocks))
    clock = Clock(None if time_limit_seconds is None else time_limit_seconds * 0.95)
    random = Random(seed)
    search = _Search(problem, Sizing(problem), Wiring(problem), random, clock)
    target = find_target(
        search.sizing,
        pipeline_order(problem),
        effort,
        random,
        clock.part(_TARGET_SHARE),
        enough_ratio=1.0 if weights is None else weights.most_ratio,
    )
    if weights is not None and search.wiring.weights.size:
        target = _traded(search, target, effort, weights)
    rectangles = _shortest(search, target, effort)
    slowest = max(rect.shape.time_cycles for rect in rectangles.values())
    return Placement(
        rectangles=rectangles,
        slowest_cycles=slowest,
        wire_length=wire_length(problem, rectangles),
        area_bound_cycles=target.bound_cycles,
        fill=sum(rect.area for rect in rectangles.values()) / problem.floor.area,
    )


def _shortest(search: _Search, target: Target, effort: Effort) -> dict[str, Rect]:
    """Anneals many floorplans at the target a little, the better ones longer, and so on."""
    found = [_start(search, target, number) for number in range(max(1, effort.starts))]
    moves, heat = effort.moves, _HOT
    rounds = _rounds(len(found))
    while True:
        clock = search.clock.part(1 / rounds)
        for number, annealing in enumerate(found):
            annealing.run(moves, heat, _slice(clock, len(found) - number))
        found.sort(key=lambda annealing: annealing.best)
        if len(found) == 1:
            break
        del found[max(1, len(found) // 4) :]
        moves, heat, rounds = moves * 4, _WARM, rounds - 1
    return settle(search.problem, search.sizing, search.wiring, target.time_cycles, found[0].kept)


def _slice(clock: Clock, left: int) -> Clock:
    """The time for the next of `left` equal parts. More than its share, since a usual machine needs
    a third of the time: only one that is far too slow then depends on the clock."""
    return clock.part(max(0.5, 1 / left))


def _rounds(starts: int) -> int:
    return 1 if starts == 1 else 1 + _rounds(max(1, starts // 4))


def _start(search: _Search, target: Target, number: int) -> Annealing:
    """A floorplan drawn at random. Where the blocks leave much of the floor free, every other one
    is on an outline as small as possible."""
    sizing = search.sizing
    curves = sizing.curves(target.time_cycles)
    assert curves is not None
    outline = (sizing.floor.width, sizing.floor.height)
    if number % 2 == 0:
        outline = _small_outline(search, target)
    layout = Layout(target.tables, target.order, outline, search.random)
    return Annealing(layout, search.wiring, sizing.kind_of, curves, search.random)


def _small_outline(search: _Search, target: Target) -> tuple[int, int]:
    """One of those near the smallest area, or the floor if it is nearly full."""
    floor = search.sizing.floor
    heights = target.tables.top.heights[-1][0].astype(np.int64)
    areas = np.where(heights <= floor.height, heights * np.arange(len(heights)), floor.area)
    if areas[1:].min() > _FULL * floor.area:
        return floor.width, floor.height
    near = np.flatnonzero(areas[1:] <= areas[1:].min() * _NEAR) + 1
    width = int(near[search.random.randrange(len(near))])
    return width, int(heights[width])


def _traded(search: _Search, smallest: Target, effort: Effort, weights: Weights) -> Target:
    """The target at which a little annealing gives the smallest weighted sum."""
    most = max(smallest.time_cycles, int(smallest.bound_cycles * weights.most_ratio))
    cycles = [min(most, int(smallest.time_cycles * (1 + step))) for step in _STEPS]
    cycles = sorted(set(cycles))
    starts = max(1, effort.starts // 8)
    clock = search.clock.part(_TRADE_SHARE)
    best, least = smallest, float("inf")
    for number, target_cycles in enumerate(cycles):
        if clock.expired():
            break
        mine = _slice(clock, len(cycles) - number)
        target = retarget(search.sizing, smallest, target_cycles)
        length = float("inf")
        for left in range(starts, 0, -1):
            annealing = _start(search, target, left - 1)
            annealing.run(effort.moves, _HOT, _slice(mine, left))
            length = min(length, annealing.best)
        total = weights.cycles * target_cycles + weights.wires * length
        if total < least:
            best, least = target, total
    return best

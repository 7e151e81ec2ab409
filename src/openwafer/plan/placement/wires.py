"""Shorter wires at the same speed: simulated annealing over the floorplans that fit.

Decides which changes of a layout are kept, by the length of the wires alone; every layout on the
way is a legal one at the time target. Does not decide the target (place.py) or where a block lies
in its room (settle.py).
"""

from __future__ import annotations

import math
from random import Random

import numpy as np

from openwafer.plan.placement.effort import Clock
from openwafer.plan.placement.layout import Floats, Layout
from openwafer.plan.placement.problem import IntArray, Problem
from openwafer.plan.placement.sizing import Curves
from openwafer.plan.placement.slicing import build_tables

__all__ = ["Annealing", "Rooms", "Wiring"]

Rooms = tuple[Floats, Floats, IntArray]
"""Centres and sizes of rooms [2, positions], and the block at each position."""

_COLD = 0.01
"""Last temperature, as a share of the mean length of a wire at the start."""

_STRIDE = 16
"""Moves between two looks at temperature and clock."""

_HURRY = 0.25
"""Share of the time before which the clock changes nothing, so that a pause of the machine does not
make the result depend on it."""

_MOST_MIXED = 40
"""Up to so many blocks, also different ones change places."""

_EXCHANGE, _REDRAW, _MIRROR = 0.2, 0.55, 0.8
"""Up to which random number between 0 and 1 a move is one of these; above, a flip."""


class Wiring:
    """The wires of a problem, by index of block; pins come after the blocks."""

    def __init__(self, problem: Problem) -> None:
        names = [block.name for block in problem.blocks] + [pin.name for pin in problem.pins]
        index = {name: number for number, name in enumerate(names)}
        self.num_blocks = len(problem.blocks)
        self.pins: Floats = np.array([[p.x, p.y] for p in problem.pins]).reshape(-1, 2).T
        totals: dict[tuple[int, int], float] = {}
        for wire in problem.wires:
            one, two = sorted((index[wire.source], index[wire.target]))
            if one != two:
                totals[one, two] = totals.get((one, two), 0.0) + wire.weight
        self.ends: IntArray = np.array(list(totals), dtype=np.int64).reshape(-1, 2).T
        self.weights: Floats = np.array(list(totals.values()), dtype=np.float64)

        self._twice = np.concatenate([self.weights, self.weights])

    def measure(self, centers: Floats, one: IntArray, two: IntArray) -> float:
        """Sum of weight × L1 distance, for centres [2, positions] and the result of `ends_at`."""
        points = centers.ravel()
        if self.pins.size:
            points = np.concatenate([points, self.pins.ravel()])
        distance = points.take(one)
        distance -= points.take(two)
        np.abs(distance, out=distance)
        return float(distance.dot(self._twice))

    def ends_at(self, order: IntArray) -> tuple[IntArray, IntArray]:
        """Where the wires' x, then y, of both ends are among the centres and pins in a row.
        `order` [positions] says which block is where."""
        num, pins = self.num_blocks, self.pins.shape[1]
        places = np.empty((2, num + pins), dtype=np.int64)
        places[0, order] = np.arange(num)
        places[1, order] = np.arange(num, 2 * num)
        places[:, num:] = np.arange(2 * num, 2 * num + 2 * pins).reshape(2, pins)
        return places[:, self.ends[0]].ravel(), places[:, self.ends[1]].ravel()


class Annealing:
    """A layout under change.

    length: of its wires now.
    """

    def __init__(
        self, layout: Layout, wiring: Wiring, kinds: IntArray, curves: Curves, random: Random
    ) -> None:
        self.layout, self._wiring, self._kinds = layout, wiring, kinds
        self._curves, self._random = curves, random
        self._may_mix = len(layout.order) <= _MOST_MIXED
        # The tables are computed again after it, which takes the time of so many moves.
        self._mix_every = self._moves_since_mix = len(layout.order) ** 2 // 2
        self._set_ends()
        self.length = self.best = self._measure()
        self.kept = self._rooms()

    def run(self, moves: int, heat: float, clock: Clock) -> None:
        """Tries `moves` changes, from the temperature of `heat` × the mean length of a wire down
        to a cold one. Where the clock is ahead of the moves it cools as fast as the clock says."""
        if not self.layout.cuts or not self._wiring.weights.size:
            return
        random = self._random.random
        mean = max(self.length, 1.0) / self._wiring.weights.size
        temperature = heat * mean
        cooling = (_COLD / heat) ** (_STRIDE / max(1, moves))
        for count in range(moves):
            if count % _STRIDE == 0:
                gone = clock.gone()
                if gone >= 1.0:
                    break
                temperature *= cooling
                if gone > max(_HURRY, count / moves):
                    temperature = heat * mean * (_COLD / heat) ** gone
            self._move(self.length - temperature * math.log(1.0 - random()))
            if self.length < self.best - 1e-9:
                self.best, self.kept = self.length, self._rooms()

    def _rooms(self) -> Rooms:
        return self.layout.centers.copy(), self.layout.sizes.copy(), self.layout.order.copy()

    def _set_ends(self) -> None:
        self._one, self._two = self._wiring.ends_at(self.layout.order)

    def _measure(self) -> float:
        return self._wiring.measure(self.layout.centers, self._one, self._two)

    def _move(self, limit: float) -> None:
        """Tries one change, and takes it back if the wires are longer than `limit`."""
        chance = self._random.random()
        self._moves_since_mix += 1
        if chance < _EXCHANGE:
            self._exchange(limit)
            return
        index = int(self._random.random() * len(self.layout.cuts))
        if chance < _REDRAW:
            self._redraw(index, limit)
        elif chance < _MIRROR:
            self._mirror(index, int(chance * 4096) & 1, limit)
        else:
            self._flip(index, limit)

    def _flip(self, index: int, limit: float) -> None:
        cut = self.layout.cuts[index]
        self.layout.flip(cut)
        length = self._measure()
        if length <= limit:
            self.length = length
        else:
            self.layout.flip(cut)

    def _mirror(self, index: int, axis: int, limit: float) -> None:
        cut = self.layout.cuts[index]
        self.layout.mirror(cut, axis)
        length = self._measure()
        if length <= limit:
            self.length = length
            self.layout.mirrored(index, axis)
        else:
            self.layout.mirror(cut, axis)

    def _redraw(self, index: int, limit: float) -> None:
        layout, cut = self.layout, self.layout.cuts[index]
        room = slice(cut.first, cut.end)
        before = (cut.one, cut.two, cut.axis, cut.flipped)
        centers, sizes = layout.centers[:, room].copy(), layout.sizes[:, room].copy()
        layout.redraw(cut)
        length = self._measure()
        if length <= limit:
            self.length = length
            layout.relist(index)
        else:
            cut.one, cut.two, cut.axis, cut.flipped = before
            layout.centers[:, room], layout.sizes[:, room] = centers, sizes

    def _exchange(self, limit: float) -> None:
        """Two blocks change places: of the same kind, or such that each fits the other's room."""
        order = self.layout.order
        one = int(self._random.random() * len(order))
        two = int(self._random.random() * len(order))
        mixed = self._kinds[order[one]] != self._kinds[order[two]]
        if one == two or (mixed and not self._may_exchange(one, two)):
            return
        ends = self._one, self._two
        order[[one, two]] = order[[two, one]]
        self._set_ends()
        length = self._measure()
        if length > limit:
            order[[one, two]] = order[[two, one]]
            self._one, self._two = ends
            return
        self.length = length
        if mixed:
            self._moves_since_mix -= self._mix_every
            bounds = self.layout.tables.bounds
            self.layout.tables = build_tables(self._kinds[order], bounds, self._curves)

    def _may_exchange(self, one: int, two: int) -> bool:
        if not self._may_mix or self._moves_since_mix < self._mix_every:
            return False
        heights, sizes, order = self._curves.heights, self.layout.sizes, self.layout.order
        return all(
            heights[self._kinds[order[block]], int(sizes[0, room])] <= sizes[1, room]
            for block, room in ((one, two), (two, one))
        )

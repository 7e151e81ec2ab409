"""How much room each block needs at a time target.

Decides the curves that placement works with: for every width the smallest height at which a block
takes at most so many cycles, and for every height the smallest width. Does not decide which point
of a curve is taken (slicing.py) or the target (place.py).

Blocks with equal shape families share one curve; most networks repeat a few kernels many times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openwafer.plan.placement.problem import IntArray, Problem, Shape, ShapeFamily

__all__ = ["TOO_LARGE", "Curves", "Lengths", "Sizing", "inverse"]

Lengths = NDArray[np.int16]

TOO_LARGE = 16_000
"""The length of what does not fit at all; two of them still add up in 16 bits."""

_KEPT_TARGETS = 64
"""Time targets whose sizes are remembered for each kind of block."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Room needed at one time target.

    heights: [kinds, floor.width + 1], the smallest height at most so wide; TOO_LARGE if none.
    widths: [kinds, floor.height + 1], the smallest width at most so high.
    """

    heights: Lengths
    widths: Lengths


class Sizing:
    """The kinds of blocks of a problem and their curves.

    kind_of: [blocks] index of each block's kind.
    num_kinds: how many different ones there are.
    """

    def __init__(self, problem: Problem) -> None:
        assert max(problem.floor.width, problem.floor.height) < TOO_LARGE, "the floor is too large"
        kinds: dict[tuple[ShapeFamily, bool], int] = {}
        indices = [
            kinds.setdefault((block.shapes, block.may_rotate), len(kinds))
            for block in problem.blocks
        ]
        self.floor = problem.floor
        self.kind_of: IntArray = np.array(indices, dtype=np.int64)
        self._kinds = list(kinds)
        self._sizes: dict[int, list[tuple[IntArray, IntArray]]] = {}

    @property
    def num_kinds(self) -> int:
        return len(self._kinds)

    @property
    def slowest_cycles(self) -> int:
        """A target above which nothing gets smaller."""
        return max((family.slowest_cycles for family, _ in self._kinds), default=1)

    def curves(self, time_cycles: int) -> Curves | None:
        """Curves at a target; None if a block has no implementation that is fast enough and fits
        the floor by itself."""
        width, height = self.floor.width, self.floor.height
        heights = np.full((self.num_kinds, width + 1), TOO_LARGE, dtype=np.int16)
        for kind, (wide, high) in enumerate(self._sizes_at(time_cycles)):
            if wide.size == 0:
                return None
            np.minimum.at(heights[kind], wide, high.astype(np.int16))
        heights = np.minimum.accumulate(heights, axis=1)
        return Curves(heights, inverse(heights, height))

    def minimum_areas(self, time_cycles: int) -> IntArray | None:
        """Smallest area [blocks] at a target; None as in `curves`."""
        areas = np.zeros(self.num_kinds, dtype=np.int64)
        for kind, (wide, high) in enumerate(self._sizes_at(time_cycles)):
            if wide.size == 0:
                return None
            areas[kind] = (wide * high).min()
        return areas[self.kind_of]

    def unlimited_areas(self, time_cycles: int) -> IntArray | None:
        """Smallest area [blocks] at a target on a floor without end; None if none is so fast."""
        areas = np.zeros(self.num_kinds, dtype=np.int64)
        for kind, (family, _) in enumerate(self._kinds):
            wide, high = family.sizes(time_cycles)
            if wide.size == 0:
                return None
            areas[kind] = (wide * high).min()
        return areas[self.kind_of]

    def shape_in(
        self, block: int, width: int, height: int, time_cycles: int
    ) -> tuple[Shape, bool] | None:
        """The smallest implementation for a room of `width` × `height`, and whether it is rotated
        there; None if there is none."""
        kind = int(self.kind_of[block])
        family, may_rotate = self._kinds[kind]
        wide, high = self._sizes_at(time_cycles)[kind]
        fits = np.flatnonzero((wide <= width) & (high <= height))
        if fits.size == 0:
            return None
        best = int(fits[np.argmin(wide[fits] * high[fits])])
        size = (int(wide[best]), int(high[best]))
        own_wide, own_high = family.sizes(time_cycles)
        upright = bool(((own_wide <= size[0]) & (own_high <= size[1])).any())
        assert upright or may_rotate
        if not upright:
            size = (size[1], size[0])
        return family.shape(*size, time_cycles), not upright

    def _sizes_at(self, time_cycles: int) -> list[tuple[IntArray, IntArray]]:
        """Per kind, the sizes on the floor (rotated ones too) that fit it."""
        found = self._sizes.get(time_cycles)
        if found is None:
            if len(self._sizes) >= _KEPT_TARGETS:
                del self._sizes[next(iter(self._sizes))]
            found = [self._fitting(kind, time_cycles) for kind in range(self.num_kinds)]
            self._sizes[time_cycles] = found
        return found

    def _fitting(self, kind: int, time_cycles: int) -> tuple[IntArray, IntArray]:
        family, may_rotate = self._kinds[kind]
        wide, high = family.sizes(time_cycles)
        if may_rotate:
            wide, high = np.concatenate([wide, high]), np.concatenate([high, wide])
        fits = (wide <= self.floor.width) & (high <= self.floor.height)
        return _smallest(wide[fits], high[fits])


def _smallest(wide: IntArray, high: IntArray) -> tuple[IntArray, IntArray]:
    """Those that no other is smaller than in both, by width."""
    if wide.size == 0:
        return wide, high
    least = np.full(int(wide.max()) + 1, TOO_LARGE, dtype=np.int64)
    np.minimum.at(least, wide, high)
    before = np.minimum.accumulate(np.concatenate([[TOO_LARGE], least[:-1]]))
    keep = np.flatnonzero(least < before)
    return keep, least[keep]


def inverse(lengths: Lengths, largest: int) -> Lengths:
    """Per row of a falling staircase [rows, n], for each value 0…`largest` the first index at which
    the staircase is at most that value, TOO_LARGE if it never is: [rows, largest + 1]."""
    rows, size = lengths.shape
    offsets = np.arange(rows, dtype=np.int64)[:, None] * (largest + 2)
    slots = np.minimum(lengths, largest + 1) + offsets
    counts = np.bincount(slots.ravel(), minlength=rows * (largest + 2))
    at_most = np.cumsum(counts.reshape(rows, largest + 2)[:, : largest + 1], axis=1)
    first = size - at_most
    first[first >= size] = TOO_LARGE
    return first.astype(np.int16)

"""The best slicing floorplan for blocks in a given order, at a time target.

Decides which outlines a run of consecutive blocks fits into. A slicing floorplan cuts a rectangle
in two, from side to side, again and again, down to one block; of all such floorplans that keep the
order, the smallest outlines of every run are found exactly, by dynamic programming over runs:

    heights[run](w) = min over cuts of run into A, B of  heights[A](w) + heights[B](w)  A over B
    widths[run](h)  = min over cuts of run into A, B of  widths[A](h) + widths[B](h)    A beside B

and each is the inverse staircase of the other. That is O(n³) additions of rows as long as the
floor's side, so long orders are cut into groups first: within a group as above, then over groups.
Runs with the same kinds of blocks are computed once (the layers of a network repeat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openwafer.plan.placement.problem import IntArray
from openwafer.plan.placement.sizing import TOO_LARGE, Curves, Lengths, inverse

__all__ = ["Level", "Tables", "build_tables", "group_bounds"]


_ROWS = 48
"""Rows that are added at a time: as many as the inner caches hold."""


class Level:
    """Outlines of all runs of some equally long sequences of items.

    ids[n]: [sequences, starts], which row of heights[n] and widths[n] the run of n items has.
    heights[n]: [different runs of n items, floor.width + 1].
    widths[n]: [different runs of n items, floor.height + 1].
    """

    def __init__(self, sequences: IntArray, heights: Lengths, widths: Lengths) -> None:
        """`sequences` [sequences, items] are rows of `heights` and `widths`."""
        self.num_items = int(sequences.shape[1])
        self.ids: list[IntArray] = [sequences, sequences]
        self.heights: list[Lengths] = [heights, heights]
        self.widths: list[Lengths] = [widths, widths]
        for length in range(2, self.num_items + 1):
            self._add(length)

    def _add(self, length: int) -> None:
        """The runs of `length` items, from the shorter ones."""
        starts = self.num_items - length + 1
        keys = self.ids[length - 1][:, :starts] * len(self.heights[1])
        keys = (keys + self.ids[1][:, length - 1 :]).ravel()
        _, examples, ids = np.unique(keys, return_index=True, return_inverse=True)
        sequence, start = np.divmod(examples, starts)
        size = (len(examples), self.heights[1].shape[1])
        heights = np.full(size, TOO_LARGE, dtype=np.int16)
        widths = np.full((len(examples), self.widths[1].shape[1]), TOO_LARGE, dtype=np.int16)
        for first in range(1, length):
            one = self.ids[first][sequence, start]
            two = self.ids[length - first][sequence, start + first]
            _add_rows(self.heights, first, length, one, two, heights)
            _add_rows(self.widths, first, length, one, two, widths)
        over = heights.copy()
        np.minimum(heights, inverse(widths, heights.shape[1] - 1), out=heights)
        np.minimum(widths, inverse(over, widths.shape[1] - 1), out=widths)
        self.ids.append(ids.reshape(-1, starts).astype(np.int64))
        self.heights.append(heights)
        self.widths.append(widths)


def _add_rows(
    rows: list[Lengths], first: int, length: int, one: IntArray, two: IntArray, least: Lengths
) -> None:
    """Lowers `least` to the sums of rows `one` of runs of `first` and `two` of the rest."""
    # A few rows at a time: they stay in the cache, and no large array is allocated.
    for at in range(0, len(one), _ROWS):
        part = slice(at, at + _ROWS)
        total = rows[first][one[part]]
        total += rows[length - first][two[part]]
        np.minimum(least[part], total, out=least[part])


@dataclass(frozen=True, slots=True)
class Tables:
    """Outlines of all runs of one order of blocks.

    top: over the groups. groups: per group its level and its sequence there; a group of one block
    is that block. bounds: (first, end) of each group in the order.
    """

    top: Level
    groups: tuple[tuple[Level, int], ...]
    bounds: tuple[tuple[int, int], ...]

    @property
    def height(self) -> int:
        """Height needed on the floor's whole width; TOO_LARGE or more if nothing fits."""
        return int(self.top.heights[-1][0, -1])


def build_tables(kinds: IntArray, bounds: Sequence[tuple[int, int]], curves: Curves) -> Tables:
    """Tables for blocks of these kinds [blocks], in this order, grouped by `bounds`."""
    by_length: dict[int, list[int]] = {}
    for group, (first, end) in enumerate(bounds):
        by_length.setdefault(end - first, []).append(group)
    places: list[tuple[Level, int] | None] = [None] * len(bounds)
    rows = np.zeros(len(bounds), dtype=np.int64)
    heights: list[Lengths] = []
    widths: list[Lengths] = []
    num_rows = 0
    for length, members in by_length.items():
        sequences = np.stack([kinds[bounds[group][0] : bounds[group][1]] for group in members])
        level = Level(sequences, curves.heights, curves.widths)
        for row, group in enumerate(members):
            places[group] = (level, row)
            rows[group] = num_rows + int(level.ids[length][row, 0])
        heights.append(level.heights[length])
        widths.append(level.widths[length])
        num_rows += len(heights[-1])
    top = Level(rows[None, :], np.concatenate(heights), np.concatenate(widths))
    assert all(place is not None for place in places)
    return Tables(top, tuple(place for place in places if place is not None), tuple(bounds))


def group_bounds(areas: IntArray, most: int) -> list[tuple[int, int]]:
    """Cuts an order with these areas [blocks] into about `most` groups of neighbours that have
    about equal areas; a block larger than that is a group of its own."""
    if len(areas) <= most:
        return [(index, index + 1) for index in range(len(areas))]
    target = float(areas.sum()) / most
    bounds: list[tuple[int, int]] = []
    first, filled = 0, 0.0
    for index, area in enumerate(areas.tolist()):
        if index > first and filled + area / 2 > target:
            bounds.append((first, index))
            first, filled = index, 0.0
        filled += area
    bounds.append((first, len(areas)))
    return bounds

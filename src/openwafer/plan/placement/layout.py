"""One slicing floorplan out of the many that fit: its tree of cuts and its rooms.

Decides how a floorplan is drawn at random from the tables, and how it is changed: flip the two
sides of a cut, mirror what is under it, exchange two blocks, draw what is under it anew. Every
change keeps every block in a room that is large enough. Does not decide which changes are good
(wires.py).

A block's place in the order is its *position*; the blocks under one cut have positions in a row.
"""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from openwafer.plan.placement.problem import IntArray
from openwafer.plan.placement.slicing import Level, Tables

__all__ = ["Cut", "Floats", "Layout", "X", "Y"]

Floats = NDArray[np.float64]

X, Y = 0, 1

_TOP = -1


class Cut:
    """A rectangle under the floor's: of one position, or cut in two.

    group, start, length: its run in the tables; the group's index, or -1 for a run of groups.
    first, end: its positions.
    size: width and height of its room.
    axis: Y if one part is over the other, X if beside.
    one, two: its parts; none if it is a single position.
    flipped: part two comes first (left or lower).
    """

    __slots__ = (
        "axis", "end", "first", "flipped", "group", "length", "one", "size", "start", "two",
    )  # fmt: skip

    def __init__(self, group: int, start: int, length: int) -> None:
        self.group, self.start, self.length = group, start, length
        self.first = self.end = self.axis = 0
        self.size: tuple[int, int] = (0, 0)
        self.one: Cut | None = None
        self.two: Cut | None = None
        self.flipped = False


class Layout:
    """A floorplan that can be changed.

    centers: [2, positions], x and y of each room's centre.
    sizes: [2, positions], width and height of each room.
    order: [positions], the block at each position.
    cuts: all rectangles that are cut in two.
    """

    def __init__(
        self, tables: Tables, order: IntArray, outline: tuple[int, int], random: Random
    ) -> None:
        """`outline` is the width and height to fill; the tables say that it is large enough."""
        self.tables = tables
        self.order = order.copy()
        self.centers: Floats = np.zeros((2, len(order)))
        self.sizes: Floats = np.zeros((2, len(order)))
        self._random = random
        self.root = Cut(_TOP, 0, tables.top.num_items)
        self._draw(self.root, (0.0, 0.0), outline)
        self.cuts = _inner(self.root)

    def redraw(self, cut: Cut) -> None:
        """Draws everything under `cut` anew, in the same room."""
        room = slice(cut.first, cut.end)
        low = (self.centers[:, room] - self.sizes[:, room] / 2).min(axis=1)
        self._draw(cut, (float(low[X]), float(low[Y])), cut.size)

    def relist(self, index: int) -> None:
        """To be called when `cuts[index]` was redrawn and that is kept. Cuts are listed from the
        outside in, so those under one follow it, and there are always as many."""
        cut = self.cuts[index]
        self.cuts[index : index + cut.end - cut.first - 1] = _inner(cut)

    def flip(self, cut: Cut) -> None:
        """Exchanges the places of the two parts of a cut; twice is as before."""
        one, two, axis = cut.one, cut.two, cut.axis
        assert one is not None
        assert two is not None
        sign = -1 if cut.flipped else 1
        centers = self.centers[axis]
        centers[one.first : one.end] += sign * two.size[axis]
        centers[two.first : two.end] -= sign * one.size[axis]
        cut.flipped = not cut.flipped

    def mirror(self, cut: Cut, axis: int) -> None:
        """Reflects everything under a cut along an axis; to be followed by `mirrored` if kept."""
        room = slice(cut.first, cut.end)
        centers, half = self.centers[axis, room], self.sizes[axis, room] / 2
        centers[:] = (centers - half).min() + (centers + half).max() - centers

    def mirrored(self, index: int, axis: int) -> None:
        """Notes that what is under `cuts[index]` was reflected."""
        cut = self.cuts[index]
        for inner in self.cuts[index : index + cut.end - cut.first - 1]:
            if inner.axis == axis:
                inner.flipped = not inner.flipped

    # ------------------------------------------------------------------------------- drawing

    def _draw(self, cut: Cut, corner: tuple[float, float], size: tuple[int, int]) -> None:
        waiting = [(cut, corner, size)]
        while waiting:
            cut, (x, y), size = waiting.pop()
            self._open(cut)
            cut.size = size
            if cut.length > 1:
                waiting += self._divide(cut, (x, y))
                continue
            cut.one = cut.two = None
            self.centers[:, cut.first] = (x + size[X] / 2, y + size[Y] / 2)
            self.sizes[:, cut.first] = size

    def _open(self, cut: Cut) -> None:
        """Finds the positions. A single item of the top level is a group with a run of its own."""
        bounds = self.tables.bounds
        if cut.group == _TOP and cut.length == 1:
            first, end = bounds[cut.start]
            cut.group, cut.start, cut.length = cut.start, 0, end - first
        if cut.group == _TOP:
            cut.first, cut.end = bounds[cut.start][0], bounds[cut.start + cut.length - 1][1]
        else:
            cut.first = bounds[cut.group][0] + cut.start
            cut.end = cut.first + cut.length

    def _divide(
        self, cut: Cut, corner: tuple[float, float]
    ) -> list[tuple[Cut, tuple[float, float], tuple[int, int]]]:
        """Cuts a room in two, at random among the ways in which both parts fit."""
        random, size = self._random, cut.size
        axis, split, first, second = random.choice(self._ways(cut))
        spare = size[axis] - first - second
        first += (0, spare, spare // 2)[random.randrange(3)]
        sizes = [first, size[axis] - first]
        cut.axis, cut.flipped = axis, random.random() < 0.5
        cut.one = Cut(cut.group, cut.start, split)
        cut.two = Cut(cut.group, cut.start + split, cut.length - split)
        x, y = corner
        one_at, two_at = (sizes[1], 0) if cut.flipped else (0, first)
        placed: list[tuple[Cut, tuple[float, float], tuple[int, int]]] = []
        for part, offset, length in ((cut.one, one_at, sizes[0]), (cut.two, two_at, sizes[1])):
            if axis == X:
                placed.append((part, (x + offset, y), (length, size[Y])))
            else:
                placed.append((part, (x, y + offset), (size[X], length)))
        return placed

    def _ways(self, cut: Cut) -> list[tuple[int, int, int, int]]:
        """(axis, items in part one, least length of part one, of part two) of all cuts that fit."""
        level, sequence = self._level(cut)
        width, height = cut.size
        length, start = cut.length, cut.start
        ids, heights, widths = level.ids, level.heights, level.widths
        ways: list[tuple[int, int, int, int]] = []
        for split in range(1, length):
            one = ids[split][sequence, start]
            two = ids[length - split][sequence, start + split]
            low = int(heights[split][one, width])
            high = int(heights[length - split][two, width])
            if low + high <= height:
                ways.append((Y, split, low, high))
            low = int(widths[split][one, height])
            high = int(widths[length - split][two, height])
            if low + high <= width:
                ways.append((X, split, low, high))
        assert ways, "the tables say that this run fits its room"
        return ways

    def _level(self, cut: Cut) -> tuple[Level, int]:
        return (self.tables.top, 0) if cut.group == _TOP else self.tables.groups[cut.group]


def _inner(cut: Cut) -> list[Cut]:
    """The cut and all under it that have parts."""
    found: list[Cut] = []
    waiting = [cut]
    while waiting:
        cut = waiting.pop()
        if cut.one is not None and cut.two is not None:
            found.append(cut)
            waiting += (cut.two, cut.one)
    return found

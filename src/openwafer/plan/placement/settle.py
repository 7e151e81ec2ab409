"""From rooms to rectangles: which shape each block takes in its room, and where it lies there.

Decides the last few cores of wire: a block slides inside its room towards what it is connected to.
"""

from __future__ import annotations

import numpy as np

from openwafer.plan.placement.layout import Floats
from openwafer.plan.placement.problem import IntArray, Problem, Rect, Shape
from openwafer.plan.placement.sizing import Sizing
from openwafer.plan.placement.wires import Wiring

__all__ = ["settle"]

_PASSES = 20


def settle(
    problem: Problem,
    sizing: Sizing,
    wiring: Wiring,
    time_cycles: int,
    rooms: tuple[Floats, Floats, IntArray],
) -> dict[str, Rect]:
    """Rectangles of all blocks; `rooms` are centres and sizes [2, positions] and the block at each
    position."""
    centers, sizes, order = rooms
    num_blocks = len(order)
    low: IntArray = np.zeros((2, num_blocks), dtype=np.int64)
    spare: IntArray = np.zeros((2, num_blocks), dtype=np.int64)
    own: IntArray = np.zeros((2, num_blocks), dtype=np.int64)
    shapes: list[tuple[Shape, bool] | None] = [None] * num_blocks
    for position, block in enumerate(order.tolist()):
        room = np.rint(sizes[:, position]).astype(np.int64)
        low[:, block] = np.rint(centers[:, position] - sizes[:, position] / 2)
        found = sizing.shape_in(block, int(room[0]), int(room[1]), time_cycles)
        assert found is not None, "every room fits its block"
        shape, rotated = shapes[block] = found
        own[:, block] = (shape.height, shape.width) if rotated else (shape.width, shape.height)
        spare[:, block] = room - own[:, block]
    corners = _slide(wiring, low, spare, own)
    rectangles: dict[str, Rect] = {}
    for index, block in enumerate(problem.blocks):
        found = shapes[index]
        assert found is not None
        x, y, wide, high = (int(v) for v in (*corners[:, index], *own[:, index]))
        rectangles[block.name] = Rect(x, y, wide, high, found[0], found[1])
    return rectangles


def _slide(wiring: Wiring, low: IntArray, spare: IntArray, own: IntArray) -> IntArray:
    """Lower left corners [2, blocks] within low…low + spare, each at the weighted median of its
    neighbours' centres, one after the other until nothing moves."""
    corners = low + spare // 2
    neighbours: list[list[tuple[int, float]]] = [[] for _ in range(low.shape[1])]
    pinned: list[float] = []
    for (one, two), weight in zip(wiring.ends.T.tolist(), wiring.weights.tolist(), strict=True):
        for here, there in ((one, two), (two, one)):
            if here < len(neighbours):
                neighbours[here].append((there, weight))
    for axis in range(2):
        pinned = wiring.pins[axis].tolist()
        at = corners[axis].tolist()
        half = (own[axis] / 2).tolist()
        bounds = [low[axis].tolist(), (low[axis] + spare[axis]).tolist()]
        for _ in range(_PASSES):
            moved = False
            for block, near in enumerate(neighbours):
                if not near or bounds[0][block] == bounds[1][block]:
                    continue
                points = [
                    (at[o] + half[o] if o < len(at) else pinned[o - len(at)], w) for o, w in near
                ]
                goal = round(_median(points) - half[block])
                goal = min(max(goal, bounds[0][block]), bounds[1][block])
                moved |= goal != at[block]
                at[block] = goal
            if not moved:
                break
        corners[axis] = at
    return corners


def _median(points: list[tuple[float, float]]) -> float:
    """The weighted median of (value, weight) pairs."""
    half = sum(weight for _, weight in points) / 2
    for value, weight in sorted(points):
        half -= weight
        if half <= 0:
            return value
    return points[-1][0]

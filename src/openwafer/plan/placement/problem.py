"""What is to be placed, and what a placement is.

Decides the values that go in and out of `place()`, and what a legal placement is (`check`). Does
not decide which shapes or positions are taken (sizing.py, slicing.py, place.py) or how fast an
implementation is; that is the caller's.

Units: lengths in cores, times in cycles, positions are of a rectangle's lower left core with (0, 0)
at a corner of the floor. A wire's length is the L1 distance between the centres of its ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from openwafer.errors import PlanError

__all__ = [
    "Block",
    "Floor",
    "IntArray",
    "Listed",
    "Pin",
    "Placement",
    "Problem",
    "Rect",
    "Shape",
    "ShapeFamily",
    "Wire",
    "check",
]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Floor:
    """The cores that may be used: a rectangle."""

    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Shape:
    """One implementation of a kernel: `width` × `height` cores, `time_cycles` per sample.

    memory_words: what the fullest core holds, for reports. The caller offers no implementation that
        exceeds a core's memory.
    arguments: (name, value) pairs that tell the caller which implementation this is.
    """

    width: int
    height: int
    time_cycles: int
    memory_words: int = 0
    arguments: tuple[tuple[str, int], ...] = ()

    @property
    def area(self) -> int:
        return self.width * self.height


@runtime_checkable
class ShapeFamily(Protocol):
    """All implementations of a kernel, computed when asked for.

    Hashable: blocks with equal families are sized once. A family of many thousand implementations
    costs nothing until a time target is known.
    """

    def sizes(self, time_cycles: int) -> tuple[IntArray, IntArray]:
        """Widths and heights [implementations] of those that take at most `time_cycles`.

        At least the ones that no other is smaller than in both; any order, others may be among
        them; empty if none is that fast. What is offered may only grow with `time_cycles`.
        """
        ...

    def shape(self, width: int, height: int, time_cycles: int) -> Shape:
        """An implementation of at most these three, which are at least one of `sizes()`. Not
        rotated. The smallest by area is the best."""
        ...

    @property
    def slowest_cycles(self) -> int:
        """A time target above which `sizes` offers nothing more."""
        ...


@dataclass(frozen=True, slots=True)
class Listed:
    """The family of a few implementations, each written down."""

    shapes: tuple[Shape, ...]

    def sizes(self, time_cycles: int) -> tuple[IntArray, IntArray]:
        fast = [shape for shape in self.shapes if shape.time_cycles <= time_cycles]
        widths = np.array([shape.width for shape in fast], dtype=np.int64)
        return widths, np.array([shape.height for shape in fast], dtype=np.int64)

    def shape(self, width: int, height: int, time_cycles: int) -> Shape:
        fitting = [
            shape
            for shape in self.shapes
            if shape.width <= width and shape.height <= height and shape.time_cycles <= time_cycles
        ]
        assert fitting, "asked for a shape that sizes() did not offer"
        return min(fitting, key=lambda shape: (shape.area, shape.time_cycles, shape.width))

    @property
    def slowest_cycles(self) -> int:
        return max((shape.time_cycles for shape in self.shapes), default=1)


@dataclass(frozen=True, slots=True)
class Block:
    """A kernel to place. `may_rotate`: a shape may also be put down with width and height
    exchanged."""

    name: str
    shapes: ShapeFamily
    may_rotate: bool = True

    @staticmethod
    def of(name: str, *shapes: Shape, may_rotate: bool = True) -> Block:
        """A block with the implementations that are given."""
        return Block(name, Listed(shapes), may_rotate)


@dataclass(frozen=True, slots=True)
class Pin:
    """A fixed point that wires may end at, such as an I/O lane. It occupies no core."""

    name: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Wire:
    """A connection between two blocks, or a block and a pin, by name. The length counts `weight`
    times."""

    source: str
    target: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Blocks to place on a floor. The order of `blocks` should be that of the pipeline, more or
    less: it is where the search for short wires starts."""

    floor: Floor
    blocks: tuple[Block, ...]
    wires: tuple[Wire, ...] = ()
    pins: tuple[Pin, ...] = ()

    def __post_init__(self) -> None:
        names = [block.name for block in self.blocks] + [pin.name for pin in self.pins]
        assert len(set(names)) == len(names), "blocks and pins have unique names"
        ends = {end for wire in self.wires for end in (wire.source, wire.target)}
        assert ends <= set(names), f"wires to nowhere: {sorted(ends - set(names))}"


@dataclass(frozen=True, slots=True)
class Rect:
    """Where a block is. `width` and `height` are those on the floor; where `rotated`, the shape's
    own are exchanged."""

    x: int
    y: int
    width: int
    height: int
    shape: Shape
    rotated: bool = False

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything is, and what that gives.

    slowest_cycles: time of the slowest block.
    wire_length: sum over wires of weight × L1 distance of the centres.
    area_bound_cycles: no placement of the problem can be faster than this (bound.py).
    fill: area of the blocks over that of the floor.
    """

    rectangles: Mapping[str, Rect] = field(hash=False)
    slowest_cycles: int
    wire_length: float
    area_bound_cycles: int
    fill: float

    @property
    def ratio(self) -> float:
        """How far the slowest block is from the bound; 1.0 is perfect."""
        return self.slowest_cycles / max(1, self.area_bound_cycles)


def check(problem: Problem, placement: Placement) -> None:
    """Raise PlanError where a block is missing, overlaps another, is outside of the floor, has a
    shape that its family does not offer, or where the placement's own sums are wrong."""
    rectangles = placement.rectangles
    if set(rectangles) != {block.name for block in problem.blocks}:
        raise PlanError("the placement does not have the blocks of the problem")
    owner = np.full((problem.floor.height, problem.floor.width), -1, dtype=np.int32)
    for index, block in enumerate(problem.blocks):
        rect = rectangles[block.name]
        _check_shape(block, rect)
        right, top = rect.x + rect.width, rect.y + rect.height
        if rect.x < 0 or rect.y < 0 or right > problem.floor.width or top > problem.floor.height:
            raise PlanError(f"block `{block.name}` is outside of the floor: {rect}")
        room = owner[rect.y : top, rect.x : right]
        if (room >= 0).any():
            other = problem.blocks[int(room.max())].name
            raise PlanError(f"blocks `{other}` and `{block.name}` overlap")
        room[:] = index
    slowest = max((rect.shape.time_cycles for rect in rectangles.values()), default=0)
    if slowest != placement.slowest_cycles:
        raise PlanError(f"the slowest block takes {slowest:,}, not {placement.slowest_cycles:,}")
    length = wire_length(problem, rectangles)
    if abs(length - placement.wire_length) > 1e-6 * max(1.0, length):
        raise PlanError(f"the wires are {length:,} long, not {placement.wire_length:,}")


def _check_shape(block: Block, rect: Rect) -> None:
    shape = rect.shape
    size = (shape.height, shape.width) if rect.rotated else (shape.width, shape.height)
    if size != (rect.width, rect.height) or (rect.rotated and not block.may_rotate):
        raise PlanError(f"block `{block.name}` is put down with a size that is not its shape's")
    widths, heights = block.shapes.sizes(shape.time_cycles)
    if not ((widths <= shape.width) & (heights <= shape.height)).any():
        raise PlanError(f"block `{block.name}` has no implementation like {shape}")


def wire_length(problem: Problem, rectangles: Mapping[str, Rect]) -> float:
    """Sum of weight × L1 distance of the centres, in cores."""
    at = {name: rect.center for name, rect in rectangles.items()}
    at |= {pin.name: (pin.x, pin.y) for pin in problem.pins}
    total = 0.0
    for wire in problem.wires:
        (x, y), (u, v) = at[wire.source], at[wire.target]
        total += wire.weight * (abs(x - u) + abs(y - v))
    return total

"""From sized kernels to rectangles on the floor.

Decides which rates a block is offered at, and turns the placement of blocks into rectangles of
kernels. The search itself is plan/placement/. Does not decide routes (routes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log

import numpy as np

from openwafer.errors import PlanError
from openwafer.machine.spec import Machine
from openwafer.plan.fabric.blocks import (
    BlockLayout,
    Part,
    group_kernels,
    heights_for,
    lanes_at,
    layout_at,
)
from openwafer.plan.fabric.demand import Demand, Net
from openwafer.plan.fabric.sizing import Needs, Sizing
from openwafer.plan.fabric.values import Rectangle
from openwafer.plan.placement import (
    Block,
    Effort,
    Floor,
    Pin,
    Placement,
    Problem,
    Shape,
    Wire,
    place,
)

__all__ = ["Floorplan", "floorplan"]

_RUNG = 1.02
_RUNGS = 16
"""Blocks are offered at rates in steps of 2 %, down to 1.36 times the cycles of the area bound; on
a fixed grid, so that a larger floor has the choices of a smaller one."""


@dataclass(frozen=True, slots=True)
class Floorplan:
    """Rectangles by kernel index, and what the placement says of itself.

    cycles: T that all kernels keep. bound_cycles: no placement of these kernels could go below.
    groups: the kernel indices of each block. pes: of each kernel, without transport.
    """

    rectangles: tuple[Rectangle, ...]
    groups: tuple[tuple[int, ...], ...]
    kernel_cycles: tuple[float, ...]
    pes: tuple[int, ...]
    transport_pes: tuple[int, ...]
    cycles: float
    bound_cycles: int
    pace: float


def floorplan(
    demands: Sequence[Demand],
    nets: Sequence[Net],
    sizing: Sizing,
    machine: Machine,
    *,
    effort: Effort | None = None,
) -> Floorplan:
    """Place the kernels so that the slowest is as fast as possible.

    Raises:
        PlanError: no placement was found.
    """
    needs = Needs(demands, machine)
    pes = needs.pes(sizing.cycles, sizing.pace)
    groups = group_kernels(demands, [float(p) for p in pes], machine.num_pes)
    last: PlanError | None = None
    for attempt in range(6):
        first = sizing.cycles * _RUNG ** (attempt * (_RUNGS - 1))
        blocks = _blocks(groups, demands, needs, first, sizing, machine)
        if blocks is None:
            continue
        problem = _problem(blocks, groups, demands, nets, machine)
        try:
            placement = place(problem, effort=effort or _effort(len(groups)))
        except PlanError as error:
            last = error
            continue
        return _finish(placement, blocks, groups, demands, needs, sizing)
    raise PlanError(
        f"no placement was found on machine `{machine.name}`: {last.what if last else 'no shapes'}",
        hint="execution_mode: weight_streaming, or a smaller model",
    )


def _effort(num_blocks: int) -> Effort:
    return Effort(starts=1, moves=1500 if num_blocks > 100 else 4000)


_Shapes = dict[tuple[int, int, int], BlockLayout]


def _blocks(
    groups: Sequence[Sequence[int]],
    demands: Sequence[Demand],
    needs: Needs,
    first: float,
    sizing: Sizing,
    machine: Machine,
) -> list[tuple[tuple[Shape, ...], _Shapes]] | None:
    """The shapes of each block at every rate that is offered; None if some block has none.

    Rates whose shapes fill more of the floor than `max_fill` are not offered.
    """
    targets = _targets(first, sizing)
    found = [_layouts(members, demands, needs, targets, sizing, machine) for members in groups]
    room = machine.max_fill * machine.num_pes
    offered = [t for t in targets if _smallest_area(found, t) <= room]
    if not offered:
        return None
    least = ceil(offered[0])
    result: list[tuple[tuple[Shape, ...], _Shapes]] = []
    for layouts in found:
        named: _Shapes = {}
        for target in offered:
            for slowest, layout in layouts[target]:
                named.setdefault((layout.width, layout.height, max(least, slowest)), layout)
        result.append((tuple(Shape(*key) for key in named), named))
    return result


_Layouts = dict[float, list[tuple[int, BlockLayout]]]
"""By target: cycles per sample that a layout keeps, and the layout."""


def _layouts(
    members: Sequence[int],
    demands: Sequence[Demand],
    needs: Needs,
    targets: Sequence[float],
    sizing: Sizing,
    machine: Machine,
) -> _Layouts:
    found: _Layouts = {}
    for target in targets:
        wanted = sum(needs.listed(target, sizing.pace)[0][i] for i in members)
        lanes = max(lanes_at(demands[i], target, machine) for i in members)
        at = found[target] = []
        for height in heights_for(wanted * 1.08, lanes, machine):
            layout = layout_at(members, demands, needs, target, sizing.pace, height)
            if layout is not None and _fits(layout, machine):
                at.append((ceil(_slowest(layout, needs, sizing.pace)), layout))
    return found


def _smallest_area(found: Sequence[_Layouts], target: float) -> float:
    """PEs of all blocks at `target` or faster; infinite where a block cannot be."""
    total = 0.0
    for layouts in found:
        areas = [
            layout.width * layout.height
            for at, choices in layouts.items()
            if at <= target
            for _, layout in choices
        ]
        total += min(areas, default=float("inf"))
    return total


def _targets(first: float, sizing: Sizing) -> list[float]:
    """Rates on the fixed grid from `first` on; the exact one too where it is not area that binds,
    since the grid may miss it."""
    lowest = floor(log(max(first, 1.0)) / log(_RUNG))
    grid = [_RUNG ** (lowest + step) for step in range(1, _RUNGS + 1)]
    return [first, *grid] if sizing.bound != "area" or first <= 50 else grid


def _fits(layout: BlockLayout, machine: Machine) -> bool:
    short, long = sorted((layout.width, layout.height))
    rows, cols = sorted((machine.fabric_rows, machine.fabric_cols))
    return short <= rows and long <= cols


def _slowest(layout: BlockLayout, needs: Needs, pace: float) -> float:
    """Cycles per sample that the block keeps: of its slowest kernel, a step's over its pace."""
    return max(
        (
            part.cycles / (pace if needs.steps[part.index] else 1.0)
            for part in layout.parts
            if not part.is_transport
        ),
        default=1.0,
    )


def _problem(
    blocks: Sequence[tuple[tuple[Shape, ...], _Shapes]],
    groups: Sequence[Sequence[int]],
    demands: Sequence[Demand],
    nets: Sequence[Net],
    machine: Machine,
) -> Problem:
    group_of = {demands[i].name: f"b{g}" for g, members in enumerate(groups) for i in members}
    middle = machine.fabric_rows / 2
    weights: dict[tuple[str, str], float] = {}
    for net in nets:
        source = "host" if net.from_host else group_of[net.source]
        for name in net.targets:
            target = group_of[name]
            if target != source:
                pair = (source, target)
                weights[pair] = weights.get(pair, 0.0) + net.num_bytes
    largest = max(weights.values(), default=1.0) or 1.0
    wires = tuple(Wire(s, t, max(w / largest, 1e-3)) for (s, t), w in weights.items())
    return Problem(
        floor=Floor(machine.fabric_cols, machine.fabric_rows),
        blocks=tuple(Block.of(f"b{index}", *shapes) for index, (shapes, _) in enumerate(blocks)),
        wires=wires,
        pins=(Pin("host", 0.0, middle),),
    )


def _finish(
    placement: Placement,
    blocks: Sequence[tuple[tuple[Shape, ...], _Shapes]],
    groups: Sequence[Sequence[int]],
    demands: Sequence[Demand],
    needs: Needs,
    sizing: Sizing,
) -> Floorplan:
    cycles = np.zeros(len(demands))
    pes, transport = np.zeros(len(demands), int), np.zeros(len(demands), int)
    rectangles: list[Rectangle] = []
    slowest = 1.0
    for index in range(len(groups)):
        rect = placement.rectangles[f"b{index}"]
        shape = rect.shape
        layout = blocks[index][1][(shape.width, shape.height, shape.time_cycles)]
        slowest = max(slowest, _slowest(layout, needs, sizing.pace))
        for part in layout.parts:
            area = part.width * part.height
            if part.is_transport:
                transport[part.index] += area
            else:
                pes[part.index] = area
                cycles[part.index] = part.cycles
            rectangles.append(_on_floor(part, rect.x, rect.y, rect.rotated, demands))
    return Floorplan(
        rectangles=tuple(rectangles),
        groups=tuple(tuple(members) for members in groups),
        kernel_cycles=tuple(float(c) for c in cycles),
        pes=tuple(int(p) for p in pes),
        transport_pes=tuple(int(p) for p in transport),
        cycles=max(slowest, sizing.cycles if sizing.bound != "area" else 1.0),
        bound_cycles=max(1, floor(sizing.floor_cycles)),
        pace=sizing.pace,
    )


def _on_floor(part: Part, x: int, y: int, rotated: bool, demands: Sequence[Demand]) -> Rectangle:
    px, py, width, height = part.x, part.y, part.width, part.height
    if rotated:
        px, py, width, height = py, px, height, width
    return Rectangle(
        kernel=demands[part.index].name,
        x=x + px,
        y=y + py,
        width=width,
        height=height,
        role="transport" if part.is_transport else "kernel",
    )

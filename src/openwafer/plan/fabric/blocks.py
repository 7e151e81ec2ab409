"""Kernels that are placed together, and the rectangles that a block of them can take.

Decides which kernels form a block (a matrix product or attention with what follows it, within one
module of one layer) and, for a height, how its kernels stand in it: dense kernels as columns of the
full height with their transport columns, small ones stacked. Does not decide where blocks lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from openwafer.machine.spec import Machine
from openwafer.plan.fabric.demand import Demand
from openwafer.plan.fabric.sizing import Needs

__all__ = ["BlockLayout", "Part", "group_kernels", "heights_for", "lanes_at", "layout_at"]

_LARGEST_SHARE = 0.12
"""A block that would take more of the floor than this is cut into its dense kernels."""
_STACKED_BELOW = 0.6
"""A kernel that needs less than this share of a column is stacked with others."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kernel's rectangle in its block. `cycles` per sample, forward and backward."""

    index: int
    x: int
    y: int
    width: int
    height: int
    cycles: float
    is_transport: bool = False


@dataclass(frozen=True, slots=True)
class BlockLayout:
    width: int
    height: int
    parts: tuple[Part, ...]


def group_kernels(demands: Sequence[Demand], needs: Sequence[float], floor: int) -> list[list[int]]:
    """Indices of the kernels of each block, in execution order.

    A matrix product, convolution or attention of another module than the block's begins a new
    block, another large kernel only in another layer or where the block is full: the scope that an
    activation or a loss is written in differs from frontend to frontend. The rest join the block
    before them (those in front of all join the first).
    """
    groups: list[list[int]] = []
    key: tuple[str, str] | None = None
    pes = 0.0
    for index, demand in enumerate(demands):
        dense = demand.macs > 0 or demand.row_cycles > 0 or needs[index] > 0.002 * floor
        here = (demand.layer, _parent(demand))
        crowded = pes + needs[index] > _LARGEST_SHARE * floor
        elsewhere = key is None or (here != key if demand.macs else demand.layer != key[0])
        if key is None or (dense and (elsewhere or crowded)):
            if key is None and groups:
                groups[0].append(index)
            else:
                groups.append([index])
                pes = 0.0
            key = here if dense else None
        else:
            groups[-1].append(index)
        pes += needs[index]
    return groups


def _parent(demand: Demand) -> str:
    """The module that a kernel's block is named for: of a weight, the one around it."""
    has_own_module = demand.grid is not None or demand.cost.weight_bytes > 0
    return demand.module.rpartition(".")[0] if has_own_module else demand.module


def heights_for(needed_pes: float, lanes: int, machine: Machine) -> list[int]:
    """Heights to offer for a block: from flat to tall around a square, with an edge for as many
    links as its widest tensor takes."""
    limit = max(machine.fabric_rows, machine.fabric_cols)
    lanes = min(lanes, limit)
    side = max(sqrt(needed_pes), lanes)
    factors = (0.3, 0.4, 0.5, 0.63, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5, 3.2)
    heights = {min(limit, max(1, round(side * factor))) for factor in factors}
    if needed_pes <= 64:
        heights |= set(range(1, min(limit, 9)))
    return sorted(height for height in heights | {lanes} if height >= min(lanes, 1))


def lanes_at(demand: Demand, target: float, machine: Machine) -> int:
    """Links side by side that the kernel's widest tensor takes at so many cycles per sample."""
    return max(1, ceil(demand.edge_bytes / (target * machine.link_bytes_per_cycle) - 1e-9))


def layout_at(
    members: Sequence[int],
    demands: Sequence[Demand],
    needs: Needs,
    target: float,
    pace: float,
    height: int,
) -> BlockLayout | None:
    """The block's kernels at a height, each at its speed for `target`; None if one cannot be."""
    machine = needs.machine
    pes, memory = needs.listed(target, pace)
    parts: list[Part] = []
    stacked: list[tuple[int, int]] = []
    x = 0
    for index in members:
        demand = demands[index]
        lanes = lanes_at(demand, target, machine)
        allowed = target * pace if needs.steps[index] else target
        if pes[index] < _STACKED_BELOW * height:
            enough = max(pes[index], lanes)
            lone = _stacked_height(demand, allowed, enough, height)
            if lone is not None:
                stacked.append((lone, index))
                continue
        held = ceil(memory[index] / machine.data_bytes_per_pe)
        width = _width_at(demand, allowed, height, held)
        if width is None or max(width, height) < lanes:
            return None
        beside = machine.transport_columns if demand.macs > 0 and pes[index] > 16 else 0
        before = ceil(beside / 2)
        if before:
            parts.append(Part(index, x, 0, before, height, 0.0, True))
        parts.append(Part(index, x + before, 0, width, height, cycles_on(demand, height, width)))
        if beside - before:
            parts.append(Part(index, x + before + width, 0, beside - before, height, 0.0, True))
        x += width + beside
    return _with_stacks(parts, stacked, demands, x, height)


def _with_stacks(
    parts: list[Part],
    stacked: list[tuple[int, int]],
    demands: Sequence[Demand],
    x: int,
    height: int,
) -> BlockLayout:
    """The small kernels in columns behind the others, the tallest first where there is room."""
    columns: list[tuple[int, int]] = []  # (x, used)
    for tall, index in sorted(stacked, key=lambda pair: (-pair[0], pair[1])):
        for position, (column, used) in enumerate(columns):
            if used + tall <= height:
                columns[position] = (column, used + tall)
                at, y = column, used
                break
        else:
            columns.append((x, tall))
            at, y, x = x, 0, x + 1
        parts.append(Part(index, at, y, 1, tall, cycles_on(demands[index], tall, 1)))
    return BlockLayout(max(1, x), height, tuple(parts))


def _stacked_height(demand: Demand, allowed: float, pes: float, height: int) -> int | None:
    """PEs of one column that are enough, if that is less than the column."""
    for tall in range(max(1, ceil(pes)), min(height + 1, 2 * ceil(pes) + 2)):
        if cycles_on(demand, tall, 1) <= allowed * 1.0001:
            return tall
    return None


def _width_at(demand: Demand, allowed: float, height: int, held: int) -> int | None:
    """The fewest columns at which a kernel keeps up and holds what it must."""
    width = max(1, ceil(held / height))
    if cycles_on(demand, height, width) <= allowed * 1.0001:
        return width
    if demand.grid is None:
        width = max(width, ceil(demand.work / (allowed * 1.0001) / height))
        return width if cycles_on(demand, height, width) <= allowed * 1.0001 else None
    choices: list[int] = []
    per_weight = demand.work / (demand.grid[0] * demand.grid[1])
    for along, across in (demand.grid, demand.grid[::-1]):
        tile = ceil(along / height)
        depth = int(allowed * 1.0001 / (per_weight * tile))
        if depth >= 1:
            choices.append(max(width, ceil(across / depth)))
    return min(choices) if choices else None


def cycles_on(demand: Demand, height: int, width: int) -> float:
    """Cycles per sample of a kernel on `height` × `width` PEs.

    A product's weight is cut into tiles, the largest of which counts; either side may lie along
    the height. Other work divides evenly, up to the parallelism that it has.
    """
    if demand.grid is None:
        return demand.work / min(height * width, demand.parallelism)
    rows, columns = demand.grid
    tile = min(
        ceil(rows / height) * ceil(columns / width), ceil(columns / height) * ceil(rows / width)
    )
    return demand.work * tile / (rows * columns)

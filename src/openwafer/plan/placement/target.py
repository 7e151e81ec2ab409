"""The smallest time target at which all blocks fit the floor.

Decides the target and the order of the blocks it was reached with. Does not decide which of the
floorplans that fit is taken (wires.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from openwafer.errors import PlanError
from openwafer.plan.placement.bound import smallest_time
from openwafer.plan.placement.effort import Clock, Effort
from openwafer.plan.placement.layout import Floats
from openwafer.plan.placement.problem import IntArray
from openwafer.plan.placement.sizing import Lengths, Sizing
from openwafer.plan.placement.slicing import Level, Tables, build_tables, group_bounds

__all__ = ["Target", "find_target", "retarget"]

_BATCH = 8
"""Orders that are tried at once; most of their runs are the same and computed once."""

_POOR = 1.05
"""Above this ratio to the bound the order by area is tried, which packs well and has long wires."""

_REFERENCE_CORES = 1 << 19
"""Groups are balanced by the areas that blocks have when they fill so many cores. Any number would
do that does not depend on the floor: equal groups on every floor make a larger one never slower."""


@dataclass(frozen=True, slots=True)
class Target:
    """`tables` at `time_cycles` fit the floor, for blocks in this `order`."""

    time_cycles: int
    bound_cycles: int
    order: IntArray
    tables: Tables


def retarget(sizing: Sizing, target: Target, time_cycles: int) -> Target:
    """The same order at a larger target."""
    tables = _tables(sizing, target.order, list(target.tables.bounds), time_cycles)
    assert tables is not None, "what fits at a target fits at a larger one"
    return Target(time_cycles, target.bound_cycles, target.order, tables)


def find_target(
    sizing: Sizing,
    order: IntArray,
    effort: Effort,
    random: Random,
    clock: Clock,
    *,
    enough_ratio: float = 1.0,
) -> Target:
    """The smallest target for `order`, then for as many other orders as the effort allows, unless
    it is within `enough_ratio` of the bound.

    Raises:
        PlanError: the blocks do not fit at any speed.
    """
    bound = smallest_time(sizing)
    groups = _groups(sizing, order, effort.most_groups)
    best = _smallest_target(sizing, order, groups, bound, clock)
    if not effort.orders or best.time_cycles <= bound * enough_ratio:
        return best
    if best.time_cycles > bound * _POOR:
        areas = sizing.minimum_areas(best.time_cycles)
        assert areas is not None
        by_area = np.argsort(-areas, kind="stable")
        by_area_groups = _groups(sizing, by_area, effort.most_groups)
        other = _smallest_target(sizing, by_area, by_area_groups, bound, clock)
        best = min(best, other, key=lambda target: target.time_cycles)
    if len(best.tables.bounds) == len(order):
        best = _try_orders(sizing, best, effort.orders, random, clock)
    return best


def _groups(sizing: Sizing, order: IntArray, most: int) -> list[tuple[int, int]]:
    if len(order) <= most:
        return [(index, index + 1) for index in range(len(order))]
    low, high = 1, max(1, sizing.slowest_cycles)
    while high > low * 1.05 and high - low > 1:
        middle = int((low * high) ** 0.5)
        middle = min(max(middle, low + 1), high - 1)
        areas = sizing.unlimited_areas(middle)
        if areas is not None and int(areas.sum()) <= _REFERENCE_CORES:
            high = middle
        else:
            low = middle
    areas = sizing.unlimited_areas(high)
    assert areas is not None, "at the slowest target every block has an implementation"
    return group_bounds(areas[order], most)


def _tables(
    sizing: Sizing, order: IntArray, groups: list[tuple[int, int]], time_cycles: int
) -> Tables | None:
    curves = sizing.curves(time_cycles)
    if curves is None:
        return None
    tables = build_tables(sizing.kind_of[order], groups, curves)
    return tables if tables.height <= sizing.floor.height else None


def _smallest_target(
    sizing: Sizing, order: IntArray, groups: list[tuple[int, int]], bound: int, clock: Clock
) -> Target:
    """Exact for this order and these groups: grows from the bound until it fits, then bisects."""
    low, high, step = bound - 1, bound, max(1, bound // 64)
    found = _tables(sizing, order, groups, high)
    while found is None:
        if high >= sizing.slowest_cycles:
            raise PlanError(
                f"the kernels fit the floor by their area, and no arrangement of them was found "
                f"({sizing.floor.width} × {sizing.floor.height} cores)"
            )
        low, high = high, min(high + step, max(high + 1, sizing.slowest_cycles))
        step *= 2
        found = _tables(sizing, order, groups, high)
    while high - low > 1 and not clock.expired():
        middle = (low + high) // 2
        tables = _tables(sizing, order, groups, middle)
        if tables is None:
            low = middle
        else:
            high, found = middle, tables
    return Target(high, bound, order, found)


# -------------------------------------------------------------------------------- other orders


def _try_orders(sizing: Sizing, best: Target, trials: int, random: Random, clock: Clock) -> Target:
    """Looks for orders that fit at a smaller target: aims between the bound and the best so far,
    and closer to the best after each failure."""
    share, order = 0.5, best.order
    per_aim = max(1, trials // (6 * _BATCH))
    left = trials // _BATCH
    while left > 0 and best.time_cycles > best.bound_cycles and not clock.expired():
        gap = best.time_cycles - best.bound_cycles
        aim = best.time_cycles - max(1, int(gap * share))
        found, used = _order_for(sizing, order, aim, min(left, per_aim), random, clock)
        left -= used
        if found is None:
            if gap * share < 1 or share < 0.02:
                break
            share /= 2
            continue
        groups = [(index, index + 1) for index in range(len(found))]
        tables = _tables(sizing, found, groups, aim)
        assert tables is not None
        best, order = Target(aim, best.bound_cycles, found, tables), found
    return best


def _order_for(
    sizing: Sizing,
    order: IntArray,
    time_cycles: int,
    batches: int,
    random: Random,
    clock: Clock,
) -> tuple[IntArray | None, int]:
    """An order near `order` that fits at a target, or None, and the number of batches tried."""
    curves = sizing.curves(time_cycles)
    if curves is None:
        return None, 1
    score = float("inf")
    for batch in range(batches):
        orders = np.stack([_neighbour(order, random) for _ in range(_BATCH)])
        level = Level(sizing.kind_of[orders], curves.heights, curves.widths)
        outlines = level.heights[-1][level.ids[-1][:, 0]]
        scores = _excess(outlines)
        pick = int(np.argmin(scores))
        if outlines[pick, -1] <= sizing.floor.height:
            return orders[pick], batch + 1
        if scores[pick] <= score:
            score, order = float(scores[pick]), orders[pick]
        if clock.expired():
            return None, batch + 1
    return None, batches


def _excess(outlines: Lengths) -> Floats:
    """How far orders are from fitting: the height at full width, and with a little weight the
    heights at somewhat smaller widths, which tells equal ones apart."""
    near = outlines[:, -max(2, outlines.shape[1] // 20) :]
    return outlines[:, -1] + near.mean(axis=1) / 100


def _neighbour(order: IntArray, random: Random) -> IntArray:
    """Moves one block, exchanges two, or reverses a short run."""
    changed = order.copy()
    num = len(order)
    if num < 2:
        return changed
    one = random.randrange(num)
    two = min(num - 1, max(0, one + random.choice((-1, 1)) * random.randint(1, max(1, num // 3))))
    kind = random.randrange(3)
    if kind == 0:
        changed[[one, two]] = changed[[two, one]]
    elif kind == 1:
        changed = np.insert(np.delete(changed, one), two, order[one])
    else:
        low, high = min(one, two), max(one, two)
        changed[low : high + 1] = changed[low : high + 1][::-1]
    return changed

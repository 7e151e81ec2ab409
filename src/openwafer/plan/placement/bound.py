"""The area lower bound: no placement of a problem can be faster.

Decides the bound alone: the smallest time at which every block has an implementation that fits the
floor by its sides, and the smallest such implementations together have at most the floor's area.
"""

from __future__ import annotations

from openwafer.errors import PlanError
from openwafer.plan.placement.problem import Problem
from openwafer.plan.placement.sizing import Sizing

__all__ = ["area_bound", "smallest_time"]


def area_bound(problem: Problem) -> int:
    """Cycles of the slowest block below which the area does not suffice.

    Raises:
        PlanError: the blocks do not fit at any speed.
    """
    return smallest_time(Sizing(problem))


def smallest_time(sizing: Sizing) -> int:
    """The bound, from a problem's sizing."""
    high = max(1, sizing.slowest_cycles)
    if not _area_suffices(sizing, high):
        _explain(sizing, high)
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if _area_suffices(sizing, middle):
            high = middle
        else:
            low = middle
    return high


def _area_suffices(sizing: Sizing, time_cycles: int) -> bool:
    areas = sizing.minimum_areas(time_cycles)
    return areas is not None and int(areas.sum()) <= sizing.floor.area


def _explain(sizing: Sizing, time_cycles: int) -> None:
    floor = f"{sizing.floor.width} × {sizing.floor.height}"
    areas = sizing.minimum_areas(time_cycles)
    if areas is None:
        raise PlanError(f"a kernel has no implementation that fits a floor of {floor} cores")
    raise PlanError(
        f"the kernels need {int(areas.sum()):,} cores at the least and the floor has "
        f"{sizing.floor.area:,} ({floor})"
    )

"""Sizing and placement: how large each kernel is and where, so that the slowest is fast and wires
are short. `place(problem)` is all that the rest of the compiler needs."""

from openwafer.plan.placement.bound import area_bound
from openwafer.plan.placement.effort import Effort
from openwafer.plan.placement.place import Weights, place
from openwafer.plan.placement.problem import (
    Block,
    Floor,
    Listed,
    Pin,
    Placement,
    Problem,
    Rect,
    Shape,
    ShapeFamily,
    Wire,
    check,
)

__all__ = [
    "Block",
    "Effort",
    "Floor",
    "Listed",
    "Pin",
    "Placement",
    "Problem",
    "Rect",
    "Shape",
    "ShapeFamily",
    "Weights",
    "Wire",
    "area_bound",
    "check",
    "place",
]

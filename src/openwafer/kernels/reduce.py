"""Sums, means, extrema and the like, over all elements or over dimensions."""

from __future__ import annotations

from functools import partial

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["REDUCE_KERNELS"]


def _cost(match: Match, context: CostContext, *, ops: int, saves: bool) -> KernelCost:
    """`ops` per element of the input; the way between the PEs is not in here."""
    return elementwise_cost(
        match, context, ops_per_element=ops, saved=match.inputs if saves else ()
    )


def _reduce(name: str, overloads: str, ops: int, *, saves: bool) -> Kernel:
    return Kernel(
        name=name,
        family="reduce",
        summary=f"{name} over some or all dimensions",
        patterns=tuple(Op(f"aten.{name}.{o}", Leaf("input")) for o in overloads.split()),
        dtypes=ALL_DTYPES,
        cost=partial(_cost, ops=ops, saves=saves),
        sources=("one operation per element and step of the formula",),
    )


REDUCE_KERNELS: tuple[Kernel, ...] = (
    _reduce("sum", "default dim_IntList", 1, saves=False),
    _reduce("mean", "default dim", 1, saves=False),
    _reduce("amax", "default", 1, saves=True),
    _reduce("amin", "default", 1, saves=True),
    _reduce("max", "default dim", 1, saves=True),
    _reduce("min", "default dim", 1, saves=True),
    _reduce("argmax", "default", 1, saves=False),
    _reduce("argmin", "default", 1, saves=False),
    _reduce("any", "default dim", 1, saves=False),
    _reduce("all", "default dim", 1, saves=False),
    _reduce("prod", "default dim_int", 1, saves=True),
    _reduce("var", "default dim correction", 4, saves=True),
    _reduce("std", "default dim correction", 4, saves=True),
    _reduce("linalg_vector_norm", "default", 2, saves=True),
)

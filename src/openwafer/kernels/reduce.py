"""Sums, means, extrema and the like, over all elements or dimensions; running sums; sorting."""

from __future__ import annotations

from functools import partial
from math import ceil, log2

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Op

__all__ = ["REDUCE_KERNELS"]


def _cost(match: Match, context: CostContext, *, ops: int, saves: bool) -> KernelCost:
    """`ops` per element of the input; the way between the PEs is not in here."""
    return elementwise_cost(
        match, context, ops_per_element=ops, saved=match.inputs if saves else ()
    )


def _sort_cost(match: Match, context: CostContext) -> KernelCost:
    """A bitonic network: log2(n) (log2(n) + 1) / 2 comparisons of each element. Backward puts each
    element back in its place."""
    longest = max((s for node in match.inputs for s in _shape(node.meta.get("val"))), default=1)
    steps = ceil(log2(max(2, longest)))
    return elementwise_cost(
        match,
        context,
        ops_per_element=steps * (steps + 1) // 2,
        backward_ops_per_element=1,
        saved=(),
    )


def _shape(value: object) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _targets(names: str) -> str:
    return " ".join(f"aten.{name}" for name in names.split())


def _reduce(name: str, targets: str, ops: int, *, saves: bool) -> Kernel:
    return Kernel(
        name=name,
        family="reduce",
        summary=f"{name} over some or all dimensions",
        patterns=(Op(_targets(targets)),),
        dtypes=ALL_DTYPES,
        cost=partial(_cost, ops=ops, saves=saves),
        sources=("one operation per element and step of the formula",),
    )


def _sort(name: str, summary: str, targets: str) -> Kernel:
    return Kernel(
        name=name,
        family="sort",
        summary=summary,
        patterns=(Op(_targets(targets)),),
        dtypes=ALL_DTYPES,
        cost=_sort_cost,
        sources=("comparisons of a bitonic sorting network",),
    )


_E = OPS_PER_EXP

REDUCE_KERNELS: tuple[Kernel, ...] = (
    _reduce("sum", "sum nansum sum_to_size", 1, saves=False),
    _reduce("mean", "mean nanmean", 1, saves=False),
    _reduce("trace", "trace", 1, saves=False),
    _reduce("amax", "amax", 1, saves=True),
    _reduce("amin", "amin", 1, saves=True),
    _reduce("aminmax", "aminmax", 2, saves=True),
    _reduce("max", "max.default max.dim", 1, saves=True),
    _reduce("min", "min.default min.dim", 1, saves=True),
    _reduce("argmax", "argmax", 1, saves=False),
    _reduce("argmin", "argmin", 1, saves=False),
    _reduce("any", "any", 1, saves=False),
    _reduce("all", "all", 1, saves=False),
    _reduce("count_nonzero", "count_nonzero", 1, saves=False),
    _reduce("prod", "prod", 1, saves=True),
    _reduce("var", "var var_mean", 4, saves=True),
    _reduce("std", "std std_mean", 4, saves=True),
    _reduce("norm", "linalg_vector_norm norm linalg_norm frobenius_norm linalg_matrix_norm", 2,
            saves=True),
    _reduce("distance", "dist pairwise_distance cdist _cdist_forward _euclidean_dist "
            "cosine_similarity", 4, saves=True),
    _reduce("logsumexp", "logsumexp special_logsumexp", _E + 3, saves=True),
    _reduce("cumsum", "cumsum", 1, saves=False),
    _reduce("cumprod", "cumprod cummax cummin", 2, saves=True),
    _reduce("logcumsumexp", "logcumsumexp", _E + 3, saves=True),
    _sort("sort", "elements in order, and where they were", "sort argsort msort"),
    _sort("topk", "the largest elements, and where they were", "topk kthvalue median mode"),
    _sort("search", "places in a sorted row", "searchsorted bucketize"),
)  # fmt: skip

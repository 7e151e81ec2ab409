"""Sums, means, extrema and the like, over all elements or dimensions; running sums; sorting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil, log2
from typing import Any

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import (
    ALL_DTYPES,
    Candidate,
    CostContext,
    Kernel,
    KernelCost,
    Match,
    Rejection,
)
from openwafer.kernels.pattern import Op, target_name

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


def _check_norm(candidate: Candidate) -> Rejection | None:
    """The spectral and nuclear norms of a matrix are sums over singular values."""
    node = candidate.anchor
    if target_name(node).startswith("aten.linalg_vector_norm"):
        return None
    order: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("ord")
    dims: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    of_matrix = "matrix" in target_name(node) or (isinstance(dims, list) and len(dims) == 2)
    if order == "nuc" or (of_matrix and order in (2, -2, 2.0, -2.0)):
        return Rejection(
            f"the norm {order!r} of a matrix needs its singular values",
            "the Frobenius norm, torch.linalg.vector_norm(x)",
        )
    return None


def _accept(candidate: Candidate) -> Rejection | None:
    return None


def _reduce(
    name: str,
    targets: str,
    ops: int,
    *,
    saves: bool,
    check: Callable[[Candidate], Rejection | None] = _accept,
) -> Kernel:
    return Kernel(
        name=name,
        family="reduce",
        summary=f"{name} over some or all dimensions",
        patterns=(Op(_targets(targets)),),
        dtypes=ALL_DTYPES,
        cost=partial(_cost, ops=ops, saves=saves),
        check=check,
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
            saves=True, check=_check_norm),
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

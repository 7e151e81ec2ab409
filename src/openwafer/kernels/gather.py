"""Elements picked and put by integers that are known only when running.

One operation per element moved; the backward pass adds each back to its place. Indices of torch are
int64 (int32 where torch takes them); a boolean mask as an index gives a result whose shape depends
on the data, which a static graph cannot hold.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import (
    ALL_DTYPES,
    INTEGERS,
    Candidate,
    CostContext,
    Kernel,
    KernelCost,
    Match,
    Rejection,
    specs_of,
)
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["GATHER_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    indices = tuple(node for node in match.inputs if specs_of(node)[0].dtype in INTEGERS)
    return elementwise_cost(match, context, ops_per_element=1, saved=indices)


def _check_index(candidate: Candidate) -> Rejection | None:
    indices: Any = candidate.anchor.args[1]
    for index in indices:
        if isinstance(index, fx.Node) and specs_of(index)[0].dtype in ("bool", "uint8"):
            return Rejection(
                f"`{index.name}` is a mask used as an index: how many elements it picks depends on "
                "the data",
                "torch.where(mask, x, other), or a product with the mask",
            )
    return None


def _kernel(name: str, summary: str, *patterns: Op, **settings: Any) -> Kernel:
    return Kernel(
        name=name,
        family="gather",
        summary=summary,
        patterns=patterns,
        dtypes=ALL_DTYPES,
        cost=_cost,
        sources=("one read and one write per element",),
        **settings,
    )


_X = Leaf("input")

GATHER_KERNELS: tuple[Kernel, ...] = (
    _kernel(
        "index",
        "x[i, j]: elements or slices by tensors of integers",
        Op("aten.index aten._unsafe_index", _X),
        check=_check_index,
    ),
    _kernel(
        "gather",
        "elements along one dimension",
        Op("aten.gather aten.take_along_dim aten.take", _X),
        Op("aten.index_select", _X),
    ),
    _kernel(
        "scatter",
        "elements put or added at places along one dimension",
        Op("aten.scatter aten.scatter_add aten.scatter_reduce", _X),
        Op("aten.index_add aten.index_copy aten.index_fill aten.index_reduce", _X),
    ),
    _kernel(
        "index_put",
        "x[i, j] = y",
        Op("aten.index_put aten._unsafe_index_put aten.put", _X),
        check=_check_index,
    ),
    _kernel(
        "slice_scatter",
        "x[a:b] = y",
        Op("aten.slice_scatter aten.select_scatter aten.diagonal_scatter", _X),
        Op("aten.as_strided_scatter", _X),
    ),
    _kernel("one_hot", "a one at each class's place", Op("aten.one_hot", _X)),
    _kernel("histogram", "how many elements lie in each bin", Op("aten.histc", _X)),
    _kernel(
        "unpool",
        "elements put back where pooling found them",
        Op("aten.max_unpool2d aten.max_unpool3d", _X),
    ),
    _kernel(
        "unfold",
        "windows of an image side by side, and their sum back into an image",
        Op("aten.im2col aten.col2im aten.unfold aten.unfold_copy", _X),
    ),
)

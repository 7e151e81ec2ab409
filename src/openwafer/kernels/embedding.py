"""Rows of a table, looked up by integers."""

from __future__ import annotations

from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match, Work
from openwafer.kernels.pattern import Const, Leaf, Op

__all__ = ["EMBEDDING_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    """One operation per element picked; the backward pass adds each to its row."""
    row = match.spec("weight").shape[-1]
    numel = match.spec("index").numel * row
    return kernel_cost(
        match,
        context,
        forward=Work(elementwise_ops=numel),
        backward=Work(elementwise_ops=numel * len(match.grad_inputs)),
        parallelism=per_sample(numel, context),
        saved=tuple(node for node in match.inputs if node is not match.bound["weight"]),
    )


_W, _I = Leaf("weight"), Leaf("index")
_BAG = Op("aten.embedding_bag aten._embedding_bag aten._embedding_bag_forward_only", _W, _I)


def _embedding(name: str, summary: str, *patterns: Op) -> Kernel:
    return Kernel(
        name=name,
        family="embedding",
        summary=summary,
        patterns=patterns,
        dtypes=ALL_DTYPES,
        cost=_cost,
        sources=("one read per element",),
    )


EMBEDDING_KERNELS: tuple[Kernel, ...] = (
    _embedding("embedding", "rows of a weight by index", Op("aten.embedding", _W, _I)),
    _embedding(
        "embedding_bag",
        "sums, means or maxima of rows of a weight",
        Op("getitem", _BAG, Const(0)),
        _BAG,
    ),
)

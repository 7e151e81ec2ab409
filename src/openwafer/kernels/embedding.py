"""Rows of a table, looked up by integers."""

from __future__ import annotations

from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match, Work
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["EMBEDDING_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    """One operation per element picked; the backward pass adds each to its row."""
    numel = match.output.numel
    return kernel_cost(
        match,
        context,
        forward=Work(elementwise_ops=numel),
        backward=Work(elementwise_ops=numel * len(match.grad_inputs)),
        parallelism=per_sample(numel, context),
        saved=tuple(node for node in match.inputs if node is not match.bound["weight"]),
    )


EMBEDDING_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="embedding",
        family="embedding",
        summary="rows of a weight by index",
        patterns=(Op("aten.embedding.default", Leaf("weight"), Leaf("index")),),
        dtypes=ALL_DTYPES,
        cost=_cost,
        sources=("one read per element",),
    ),
)

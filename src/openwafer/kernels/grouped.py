"""Products of groups of rows with a matrix each: the experts of a mixture."""

from __future__ import annotations

from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match, Work
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["GROUPED_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    """`[rows, in] x [experts, in, out]`: each row meets one expert's matrix."""
    macs = match.output.numel * match.spec("input").shape[-1]
    factors = (match.bound["input"], match.bound["weight"])
    grads = sum(node in match.grad_inputs for node in factors)
    return kernel_cost(
        match,
        context,
        forward=Work(macs=macs),
        backward=Work(macs=macs * grads),
        parallelism=per_sample(macs, context),
        saved=factors,
    )


GROUPED_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="grouped_matmul",
        family="matmul",
        summary="groups of rows, each group times a matrix of its own",
        patterns=(
            Op(
                "aten._grouped_mm transformers.grouped_mm_fallback",
                Leaf("input"),
                Leaf("weight"),
            ),
        ),
        dtypes=ALL_DTYPES,  # the groups' ends are integers
        cost=_cost,
        sources=("count of multiply-accumulates; one product of that size for each gradient",),
    ),
)

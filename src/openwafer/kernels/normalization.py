"""Layer, group and batch normalization."""

from __future__ import annotations

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["NORMALIZATION_KERNELS"]

FORWARD_OPS = 8
"""Per element: sum and sum of squares (3), subtract and scale (2), weight and bias (2), and one
for the statistics of short rows."""
BACKWARD_OPS = 4
"""Per element and gradient: two sums and two products (of the input; the gradients of weight and
bias take fewer and are counted as much)."""


def _cost(match: Match, context: CostContext) -> KernelCost:
    return elementwise_cost(
        match,
        context,
        ops_per_element=FORWARD_OPS,
        backward_ops_per_element=BACKWARD_OPS,
        saved=(match.bound["input"],),
    )


def _norm(name: str, targets: str) -> Kernel:
    return Kernel(
        name=name,
        family=name,
        summary="(x - mean) / sqrt(variance + epsilon) * weight + bias",
        patterns=tuple(Op(f"aten.{target}", Leaf("input")) for target in targets.split()),
        dtypes=ALL_DTYPES,
        cost=_cost,
        sources=("operations counted from the formula",),
    )


NORMALIZATION_KERNELS: tuple[Kernel, ...] = (
    _norm("layer_norm", "layer_norm.default native_layer_norm.default rms_norm.default"),
    _norm("group_norm", "group_norm.default native_group_norm.default"),
    _norm(
        "batch_norm",
        "_native_batch_norm_legit_functional.default _native_batch_norm_legit_no_training.default "
        "native_batch_norm.default batch_norm.default",
    ),
)

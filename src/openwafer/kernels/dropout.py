"""Dropout and Bernoulli draws: a mask from a random number per element, and a product.

The draws come from (seed, step, layer, microbatch), as those in random.py do.
"""

from __future__ import annotations

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Const, Leaf, Op

__all__ = ["DROPOUT_KERNELS", "OPS_PER_RANDOM"]

OPS_PER_RANDOM = 4
"""Assumed: a shift-register generator takes three shift-and-xor steps and one comparison."""


def _cost(match: Match, context: CostContext) -> KernelCost:
    """Forward: random number and product. Backward: a product with the mask, which is one bit per
    element and is counted as if the input waited, since the mask's place on a PE is not known."""
    return elementwise_cost(
        match, context, ops_per_element=OPS_PER_RANDOM + 1, backward_ops_per_element=1
    )


_NATIVE = Op("aten.native_dropout", Leaf("input"))

DROPOUT_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="dropout",
        family="dropout",
        summary="zero elements at random and scale the rest",
        patterns=(
            Op("getitem", _NATIVE, Const(0)),
            _NATIVE,
            Op("aten.dropout", Leaf("input")),
        ),
        # The mask, where it is read as well, is boolean.
        dtypes=("float32", "float16", "bfloat16", "bool"),
        cost=_cost,
        sources=("OPS_PER_RANDOM assumed",),
    ),
    Kernel(
        name="bernoulli",
        family="dropout",
        summary="ones with a given probability, or with one for each element, else zeros",
        patterns=(Op("aten.bernoulli", Leaf("input")),),
        dtypes=("float32", "float16", "bfloat16", "bool"),
        cost=_cost,
        sources=("OPS_PER_RANDOM assumed",),
    ),
)

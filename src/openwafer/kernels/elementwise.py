"""Arithmetic and comparison of single elements, with tensors and with numbers."""

from __future__ import annotations

from functools import partial

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Op

__all__ = ["ELEMENTWISE_KERNELS"]


def _cost(match: Match, context: CostContext, *, ops: int, saves: bool) -> KernelCost:
    """`saves` is False where the gradient does not depend on the operands."""
    return elementwise_cost(
        match, context, ops_per_element=ops, saved=match.inputs if saves else ()
    )


def _family(family: str, names: str, ops: int, *, saves: bool = True) -> tuple[Kernel, ...]:
    """One kernel for each name; every overload in `_OVERLOADS` is one of its patterns."""
    return tuple(
        Kernel(
            name=name,
            family=family,
            summary=f"{name}, element by element",
            patterns=tuple(Op(f"aten.{name}.{overload}") for overload in _OVERLOADS),
            dtypes=ALL_DTYPES,
            cost=partial(_cost, ops=ops, saves=saves),
            sources=("operations counted from the formula; OPS_PER_EXP assumed",),
        )
        for name in names.split()
    )


_OVERLOADS = (
    "Tensor",
    "Scalar",
    "default",
    "self",
    "ScalarSelf",
    "ScalarOther",
    "Tensor_Tensor",
    "Tensor_Scalar",
    "Tensor_mode",
    "Scalar_mode",
    "other",
)
_E = OPS_PER_EXP

ELEMENTWISE_KERNELS: tuple[Kernel, ...] = (
    *_family("add", "add sub rsub", 1, saves=False),
    *_family("multiply", "mul square", 1),
    *_family("multiply", "div reciprocal", 4),
    *_family("sign", "neg sign floor ceil round trunc", 1, saves=False),
    *_family("sign", "abs clamp clamp_min clamp_max minimum maximum", 1),
    *_family("power", "pow", 2 * _E),
    *_family("power", "sqrt rsqrt exp log sin cos erf log1p expm1 exp2 log2", _E),
    *_family("select", "eq ne lt le gt ge", 1, saves=False),
    *_family("select", "logical_and logical_or logical_not logical_xor", 1, saves=False),
    *_family("select", "bitwise_and bitwise_or bitwise_not bitwise_xor", 1, saves=False),
    *_family("select", "where masked_fill", 1),
    *_family("select", "isnan isinf isfinite", 1, saves=False),
    *_family("multiply", "addcmul addcdiv lerp", 3),
)

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


def _kernel(name: str, family: str, targets: str, ops: int, saves: bool) -> Kernel:
    return Kernel(
        name=name,
        family=family,
        summary=f"{name}, element by element",
        patterns=(Op(targets),),
        dtypes=ALL_DTYPES,
        cost=partial(_cost, ops=ops, saves=saves),
        sources=("operations counted from the formula; OPS_PER_EXP assumed",),
    )


def _family(family: str, names: str, ops: int, *, saves: bool = True) -> tuple[Kernel, ...]:
    """One kernel for each word; torch's other names of the same operation stand behind `=`."""
    kernels: list[Kernel] = []
    for word in names.split():
        aliases = word.split("=")
        targets = " ".join(f"aten.{alias}" for alias in aliases)
        kernels.append(_kernel(aliases[0], family, targets, ops, saves))
    return tuple(kernels)


_E = OPS_PER_EXP

ELEMENTWISE_KERNELS: tuple[Kernel, ...] = (
    *_family("add", "add sub=subtract rsub", 1, saves=False),
    *_family("multiply", "mul=multiply square outer=ger=linalg_outer kron", 1),
    *_family("multiply", "div=divide=true_divide reciprocal", 4),
    *_family("multiply", "floor_divide remainder=fmod", 5, saves=False),
    *_family("multiply", "addcmul addcdiv lerp addr cross=linalg_cross", 3),
    *_family("multiply", "deg2rad rad2deg", 1, saves=False),
    *_family("sign", "neg=negative sign=sgn floor ceil round trunc=fix signbit", 1, saves=False),
    *_family("sign", "frac nan_to_num", 1, saves=False),
    *_family("sign", "abs=absolute clamp=clip clamp_min clamp_max", 1),
    *_family("sign", "minimum=fmin=min.other maximum=fmax=max.other copysign heaviside", 1),
    *_family("power", "pow=float_power atan2=arctan2 hypot logaddexp logaddexp2 xlogy", 2 * _E),
    *_family("power", "sqrt rsqrt exp=special_exp exp2=special_exp2 expm1=special_expm1", _E),
    *_family("power", "log log2 log10 log1p=special_log1p logit=special_logit", _E),
    *_family("power", "sin cos tan sinh cosh sinc=special_sinc", _E),
    *_family("power", "asin=arcsin acos=arccos atan=arctan", _E),
    *_family("power", "asinh=arcsinh acosh=arccosh atanh=arctanh", 2 * _E),
    *_family("power", "erf=special_erf erfc=special_erfc erfinv=special_erfinv", _E),
    *_family("power", "lgamma=special_gammaln digamma=special_digamma", 2 * _E),
    *_family("power", "special_entr special_log_ndtr special_ndtr special_xlog1py", 2 * _E),
    *_family("select", "eq ne=not_equal lt=less le=less_equal", 1, saves=False),
    *_family("select", "gt=greater ge=greater_equal isclose", 1, saves=False),
    *_family("select", "logical_and logical_or logical_not logical_xor", 1, saves=False),
    *_family("select", "bitwise_and=__and__ bitwise_or=__or__ bitwise_xor=__xor__", 1, saves=False),
    *_family("select", "bitwise_not bitwise_left_shift=__lshift__", 1, saves=False),
    *_family("select", "bitwise_right_shift=__rshift__", 1, saves=False),
    *_family("select", "where masked_fill triu tril fill=fill_", 1),
    *_family("select", "isnan isinf isfinite isposinf isneginf", 1, saves=False),
)

"""Layer, group, instance, batch and RMS normalization, by torch's operations and by hand."""

from __future__ import annotations

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import (
    ANY,
    HOLE,
    Const,
    Either,
    Leaf,
    Number,
    Op,
    Pattern,
    Wrapped,
)

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


def _norm(name: str, summary: str, *patterns: Op) -> Kernel:
    return Kernel(
        name=name,
        family=name,
        summary=summary,
        patterns=patterns,
        dtypes=ALL_DTYPES,  # the count of batches is an integer
        cost=_cost,
        sources=("operations counted from the formula",),
    )


_X = Leaf("input")
_CASTS = (Op("aten._to_copy aten.to aten.type_as", HOLE),)


def _cast(inner: Pattern) -> Pattern:
    """`inner`, perhaps in another dtype: normalizations are often written in float32."""
    return Wrapped(inner, _CASTS)


def _square(value: Pattern) -> Pattern:
    return Either(
        (
            Op("aten.pow", value, Const(2)),
            Op("aten.square", value),
            Op("aten.mul", value, value),
        )
    )


def _inverse_root(variance: Pattern) -> Pattern:
    """1 / sqrt(variance + epsilon), as a factor."""
    shifted = Op("aten.add", variance, Number())
    return Either(
        (
            Op("aten.rsqrt", shifted),
            Op("aten.reciprocal", Op("aten.sqrt", shifted)),
            Op("aten.pow", shifted, Const(-0.5)),
        )
    )


def _scaled(value: Pattern, variance: Pattern) -> tuple[Pattern, ...]:
    """value / sqrt(variance + epsilon), in its spellings."""
    shifted = Op("aten.add", variance, Number())
    return (
        Op("aten.mul", value, _inverse_root(variance), commutes=True),
        Op("aten.div", value, Op("aten.sqrt", shifted)),
    )


_RMS = Either(_scaled(_X, Op("aten.mean", _square(_X))))
_MEAN = Op("aten.mean", _X)
_CENTRED = Op("aten.sub", _X, _MEAN)
_VARIANCES = Either((Op("aten.mean", _square(_CENTRED)), Op("aten.var", _X)))
_BY_HAND = Either(
    (
        *_scaled(_CENTRED, _VARIANCES),
        # Some write (x - mean) / (std + epsilon).
        Op("aten.div", _CENTRED, Op("aten.add", Op("aten.std", _X), Number())),
    )
)


def _affine(inner: Pattern) -> tuple[Op, ...]:
    """The normalized value with a factor and a bias. Both are part of the kernel only where they
    are written, so there is one pattern for each."""
    weighted = Op("aten.mul", _cast(inner), Leaf("weight"), commutes=True)
    return (Op("aten.add", _cast(weighted), Leaf("bias"), commutes=True), weighted)


def _alone(inner: Pattern) -> tuple[Op, ...]:
    assert isinstance(inner, Either)
    return tuple(part for part in inner.parts if isinstance(part, Op))


_FORMULA = "(x - mean) / sqrt(variance + epsilon) * weight + bias"

NORMALIZATION_KERNELS: tuple[Kernel, ...] = (
    _norm(
        "layer_norm",
        f"{_FORMULA}, over the last dimensions",
        Op("getitem", Op("aten.native_layer_norm", _X), Const(0)),
        Op("aten.layer_norm aten.native_layer_norm", _X),
        *_affine(_BY_HAND),
        *_alone(_BY_HAND),
    ),
    _norm(
        "rms_norm",
        "x / sqrt(mean(x^2) + epsilon) * weight",
        Op("aten.rms_norm aten._fused_rms_norm", _X),
        *_affine(_RMS)[1:],
        *_alone(_RMS),
    ),
    _norm(
        "group_norm",
        f"{_FORMULA}, over groups of channels",
        Op("getitem", Op("aten.native_group_norm", _X), Const(0)),
        Op("aten.group_norm aten.native_group_norm", _X),
    ),
    _norm(
        "instance_norm",
        f"{_FORMULA}, over each channel of each sample",
        Op("aten.instance_norm", _X),
    ),
    _norm(
        "batch_norm",
        f"{_FORMULA}, over the batch, with running statistics",
        Op(
            "aten._native_batch_norm_legit_functional aten._native_batch_norm_legit_no_training "
            "aten._native_batch_norm_legit aten.native_batch_norm aten.batch_norm "
            "aten._batch_norm_with_update_functional aten._batch_norm_no_update",
            _X,
        ),
    ),
    _norm(
        "weight_norm",
        "v * (g / norm(v))",
        Op("aten._weight_norm aten._weight_norm_interface", _X, ANY),
    ),
)

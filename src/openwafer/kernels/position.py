"""Positions that turn queries and keys (rotary embeddings), as one kernel.

Other position schemes need no kernel of their own: learned and fixed positions are an embedding or
a constant and a sum, relative ones an embedding and a bias of attention, ALiBi a bias.
"""

from __future__ import annotations

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import HOLE, Either, Leaf, Op, Pattern, Seq, Wrapped

__all__ = ["POSITION_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    """Two products and a sum per element; the gradient turns back by the same angles."""
    angles = tuple(match.bound[leaf] for leaf in ("cos", "sin"))
    return elementwise_cost(
        match, context, ops_per_element=3, backward_ops_per_element=3, saved=angles
    )


_X, _COS, _SIN = Leaf("input"), Leaf("cos"), Leaf("sin")
_LOW, _HIGH = Op("aten.slice", _X), Op("aten.slice", _X)
_VIEWS = (
    Op("aten.view aten.reshape aten._unsafe_view aten.flatten aten.unsqueeze aten.squeeze", HOLE),
    Op("aten.clone aten.contiguous aten.alias", HOLE),
)
_TURNED: Pattern = Wrapped(
    Either(
        (
            # cat(-x[half:], x[:half]), and every second element in GPT-J's form.
            Op("aten.cat", Seq((Op("aten.neg", _HIGH), _LOW))),
            Op("aten.stack", Seq((Op("aten.neg", _HIGH), _LOW))),
        )
    ),
    _VIEWS,
)
_ROTATED = Op(
    "aten.add",
    Op("aten.mul", _X, _COS, commutes=True),
    Op("aten.mul", _TURNED, _SIN, commutes=True),
    commutes=True,
)
_A, _B = Leaf("input"), Leaf("other")


def _times(half: Leaf, angle: Leaf) -> Op:
    return Op("aten.mul", half, angle, commutes=True)


_HALVES = Op(
    "aten.cat aten.stack",
    Seq(
        (
            Op("aten.sub", _times(_A, _COS), _times(_B, _SIN)),
            Either(
                (
                    Op("aten.add", _times(_A, _SIN), _times(_B, _COS), commutes=True),
                    Op("aten.add", _times(_B, _COS), _times(_A, _SIN), commutes=True),
                )
            ),
        )
    ),
)

POSITION_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="rotary",
        family="position",
        summary="pairs of elements turned by an angle: x * cos + turned(x) * sin",
        patterns=(_ROTATED, _HALVES),
        cost=_cost,
        sources=("operations counted from the formula",),
    ),
)

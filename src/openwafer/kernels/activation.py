"""Nonlinearities on single elements, and softmax.

Operation counts are per element, counted from the formulas. Nothing public gives the cycles of a
transcendental function on a PE: `OPS_PER_EXP` is an assumption, the same wherever exp, log, tanh or
erf occurs.
"""

from __future__ import annotations

import math
from functools import partial

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Const, Either, Leaf, Op, Pattern

__all__ = ["ACTIVATION_KERNELS", "OPS_PER_EXP"]

OPS_PER_EXP = 8
"""Assumed: range reduction (2) and a polynomial of degree 6 in Horner form (6 multiply-adds)."""


def _cost(match: Match, context: CostContext, *, forward: int, backward: int) -> KernelCost:
    return elementwise_cost(
        match, context, ops_per_element=forward, backward_ops_per_element=backward
    )


def _activation(
    name: str, summary: str, target: str, forward: int, backward: int, *by_hand: Op
) -> Kernel:
    return Kernel(
        name=name,
        family="nlin",
        summary=summary,
        patterns=(Op(target, Leaf("input")), *by_hand),
        cost=partial(_cost, forward=forward, backward=backward),
        sources=("operations counted from the formula; OPS_PER_EXP assumed",),
    )


_X = Leaf("input")
_HALF = Const(0.5)


def _product(*factors: Pattern) -> tuple[Op, ...]:
    """The product of three factors, in every order and grouping that a person may choose."""
    a, b, c = factors
    groups = ((a, b, c), (a, c, b), (b, c, a))
    return tuple(
        Op("aten.mul", Op("aten.mul", x, y, commutes=True), z, commutes=True) for x, y, z in groups
    )


def _scaled(value: Pattern, factor: float) -> Pattern:
    return Either(
        (
            Op("aten.mul", value, Const(factor), commutes=True),
            Op("aten.div", value, Const(1 / factor)),
        )
    )


_ERF = Op("aten.add", Op("aten.erf", _scaled(_X, math.sqrt(0.5))), Const(1), commutes=True)
_CUBE = Either(
    (
        Op("aten.pow", _X, Const(3)),
        Op("aten.mul", Op("aten.mul", _X, _X), _X, commutes=True),
    )
)
_SCALED_X = Op("aten.mul", _X, Const(0.044715), commutes=True)
_TANH_INSIDE = Either(
    (
        Op("aten.add", _X, Op("aten.mul", _CUBE, Const(0.044715), commutes=True), commutes=True),
        # 0.044715 * x * x * x
        Op("aten.add", _X, Op("aten.mul", Op("aten.mul", _SCALED_X, _X), _X), commutes=True),
        # x * (1 + 0.044715 * x * x)
        Op(
            "aten.mul",
            _X,
            Op(
                "aten.add",
                Either(
                    (
                        Op("aten.mul", Op("aten.mul", _X, Const(0.044715)), _X, commutes=True),
                        Op("aten.mul", Op("aten.pow", _X, Const(2)), Const(0.044715)),
                        Op("aten.mul", Op("aten.mul", _X, _X), Const(0.044715)),
                    )
                ),
                Const(1),
            ),
            commutes=True,
        ),
    )
)
_ROOT = math.sqrt(2 / math.pi)
_TANH = Op(
    "aten.add",
    Op(
        "aten.tanh",
        Either(
            (
                Op("aten.mul", _TANH_INSIDE, Const(_ROOT), commutes=True),
                # The factor on x alone: (x * 0.7978) * (1 + 0.044715 * x * x)
                Op(
                    "aten.mul",
                    Op("aten.mul", _X, Const(_ROOT)),
                    Op(
                        "aten.add",
                        Op("aten.mul", Op("aten.mul", _X, Const(0.044715)), _X, commutes=True),
                        Const(1),
                    ),
                    commutes=True,
                ),
            )
        ),
    ),
    Const(1),
    commutes=True,
)
_QUICK = Op("aten.sigmoid", Op("aten.mul", _X, Const(1.702), commutes=True))
_E = OPS_PER_EXP

ACTIVATION_KERNELS: tuple[Kernel, ...] = (
    _activation("relu", "max(x, 0)", "aten.relu", 1, 1),
    _activation("relu6", "min(max(x, 0), 6)", "aten.relu6", 2, 2),
    _activation("hardtanh", "clamp to [-1, 1]", "aten.hardtanh", 2, 2),
    _activation("leaky_relu", "x or slope * x", "aten.leaky_relu", 2, 2),
    _activation("elu", "x or exp(x) - 1; selu and celu with their factors",
                "aten.elu aten.selu aten.celu", _E + 2, 2),
    _activation("sigmoid", "1 / (1 + exp(-x))", "aten.sigmoid aten.special_expit", _E + 2, 3),
    _activation("log_sigmoid", "-log(1 + exp(-x))",
                "aten.log_sigmoid aten.log_sigmoid_forward", 2 * _E + 2, _E + 2),
    _activation("tanh", "tanh(x)", "aten.tanh", _E + 3, 3),
    _activation("silu", "x * sigmoid(x), by torch's operation or spelled out",
                "aten.silu", _E + 3, _E + 6,
                Op("aten.mul", _X, Op("aten.sigmoid", _X), commutes=True)),
    _activation("gelu", "x * Phi(x), by torch's operation, erf or tanh spelled out",
                "aten.gelu", _E + 8, 2 * _E + 8,
                *_product(_X, _HALF, _ERF), *_product(_X, _HALF, _TANH),
                Op("aten.mul", Op("aten.div", _X, Const(2.0)), _ERF, commutes=True)),
    _activation("quick_gelu", "x * sigmoid(1.702 * x)", "aten.quick_gelu", _E + 4, _E + 7,
                Op("aten.mul", _X, _QUICK, commutes=True)),
    _activation("softplus", "log(1 + exp(x))", "aten.softplus", 2 * _E + 1, _E + 2),
    _activation("mish", "x * tanh(softplus(x)), by torch's operation or spelled out",
                "aten.mish", 3 * _E + 5, 3 * _E + 10,
                Op("aten.mul", _X, Op("aten.tanh", Op("aten.softplus", _X)), commutes=True)),
    _activation("hardswish", "x * relu6(x + 3) / 6", "aten.hardswish", 4, 4),
    _activation("hardsigmoid", "relu6(x + 3) / 6", "aten.hardsigmoid", 3, 2),
    _activation("threshold", "x, or a number where x is small", "aten.threshold", 1, 1),
    _activation("prelu", "x or slope * x with a learned slope",
                "aten.prelu aten._prelu_kernel", 2, 2),
    _activation("glu", "one half times the sigmoid of the other", "aten.glu", _E + 3, _E + 5),
    _activation("softmax", "exp(x) / sum(exp(x))",
                "aten.softmax aten._softmax aten._safe_softmax", _E + 4, 4),
)  # fmt: skip

"""Nonlinearities on single elements, and softmax.

Operation counts are per element, counted from the formulas. Nothing public gives the cycles of a
transcendental function on a PE: `OPS_PER_EXP` is an assumption, the same wherever exp, log, tanh or
erf occurs.
"""

from __future__ import annotations

from functools import partial

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["ACTIVATION_KERNELS", "OPS_PER_EXP"]

OPS_PER_EXP = 8
"""Assumed: range reduction (2) and a polynomial of degree 6 in Horner form (6 multiply-adds)."""


def _cost(match: Match, context: CostContext, *, forward: int, backward: int) -> KernelCost:
    return elementwise_cost(
        match, context, ops_per_element=forward, backward_ops_per_element=backward
    )


def _activation(name: str, summary: str, target: str, forward: int, backward: int) -> Kernel:
    return Kernel(
        name=name,
        family="nlin",
        summary=summary,
        patterns=(Op(target, Leaf("input")),),
        cost=partial(_cost, forward=forward, backward=backward),
        sources=("operations counted from the formula; OPS_PER_EXP assumed",),
    )


_E = OPS_PER_EXP

ACTIVATION_KERNELS: tuple[Kernel, ...] = (
    _activation("relu", "max(x, 0)", "aten.relu.default", 1, 1),
    _activation("relu6", "min(max(x, 0), 6)", "aten.relu6.default", 2, 2),
    _activation("hardtanh", "clamp to [-1, 1]", "aten.hardtanh.default", 2, 2),
    _activation("leaky_relu", "x or slope * x", "aten.leaky_relu.default", 2, 2),
    _activation("elu", "x or exp(x) - 1", "aten.elu.default", _E + 2, 2),
    _activation("sigmoid", "1 / (1 + exp(-x))", "aten.sigmoid.default", _E + 2, 3),
    _activation("tanh", "tanh(x)", "aten.tanh.default", _E + 3, 3),
    _activation("silu", "x * sigmoid(x)", "aten.silu.default", _E + 3, _E + 6),
    _activation("gelu", "x * Phi(x), by erf or tanh", "aten.gelu.default", _E + 8, 2 * _E + 8),
    _activation("softplus", "log(1 + exp(x))", "aten.softplus.default", 2 * _E + 1, _E + 2),
    _activation("mish", "x * tanh(softplus(x))", "aten.mish.default", 3 * _E + 5, 3 * _E + 10),
    _activation("hardswish", "x * relu6(x + 3) / 6", "aten.hardswish.default", 4, 4),
    _activation("hardsigmoid", "relu6(x + 3) / 6", "aten.hardsigmoid.default", 3, 2),
    _activation("softmax", "exp(x) / sum(exp(x))", "aten.softmax.int", _E + 4, 4),
    _activation("softmax", "exp(x) / sum(exp(x))", "aten._softmax.default", _E + 4, 4),
)

"""Losses, and the log-softmax in front of them."""

from __future__ import annotations

from functools import partial

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["LOSS_KERNELS"]

_X, _Y = Leaf("input"), Leaf("target")
_LOG_SOFTMAX = tuple(
    Op(target, _X) for target in ("aten.log_softmax.int", "aten._log_softmax.default")
)


def _cost(match: Match, context: CostContext, *, forward: int, backward: int) -> KernelCost:
    return elementwise_cost(
        match, context, ops_per_element=forward, backward_ops_per_element=backward
    )


def _loss(name: str, summary: str, patterns: tuple[Op, ...], forward: int, backward: int) -> Kernel:
    return Kernel(
        name=name,
        family="loss",
        summary=summary,
        patterns=patterns,
        dtypes=ALL_DTYPES,  # targets are integers
        cost=partial(_cost, forward=forward, backward=backward),
        sources=("operations counted from the formula; OPS_PER_EXP assumed",),
    )


_E = OPS_PER_EXP
# log_softmax: maximum, difference, exp, sum, difference. Backward: exp, product, difference.
_LOG_SOFTMAX_OPS = (_E + 4, _E + 2)

LOSS_KERNELS: tuple[Kernel, ...] = (
    _loss(
        "cross_entropy",
        "negative log likelihood of log_softmax(x)",
        (
            *(
                Op(nll, inner, _Y)
                for nll in ("aten.nll_loss_nd.default", "aten.nll_loss.default")
                for inner in _LOG_SOFTMAX
            ),
            Op("aten.cross_entropy_loss.default", _X, _Y),
        ),
        _E + 5,
        _E + 3,
    ),
    _loss("log_softmax", "x - log(sum(exp(x)))", _LOG_SOFTMAX, *_LOG_SOFTMAX_OPS),
    _loss(
        "nll_loss",
        "minus the log-probability of the target",
        tuple(
            Op(target, _X, _Y)
            for target in (
                "aten.nll_loss_nd.default",
                "aten.nll_loss.default",
                "aten.nll_loss_forward.default",
            )
        ),
        1,
        1,
    ),
    _loss("mse_loss", "(x - y)^2", (Op("aten.mse_loss.default", _X, _Y),), 3, 2),
    _loss("l1_loss", "|x - y|", (Op("aten.l1_loss.default", _X, _Y),), 3, 2),
    _loss(
        "binary_cross_entropy",
        "cross entropy of two classes, from logits or probabilities",
        (
            Op("aten.binary_cross_entropy_with_logits.default", _X, _Y),
            Op("aten.binary_cross_entropy.default", _X, _Y),
        ),
        2 * _E + 5,
        _E + 3,
    ),
)

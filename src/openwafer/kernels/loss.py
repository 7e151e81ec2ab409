"""Losses, and the log-softmax in front of them.

Losses that torch writes with other operations (cosine embedding, triplet, Gaussian likelihood) are
matched operation by operation.
"""

from __future__ import annotations

from functools import partial

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import ALL_DTYPES, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Const, Leaf, Op

__all__ = ["LOSS_KERNELS"]

_X, _Y = Leaf("input"), Leaf("target")
_LOG_SOFTMAX = Op("aten.log_softmax aten._log_softmax aten.special_log_softmax", _X)


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


def _of_two(name: str, summary: str, targets: str, forward: int, backward: int) -> Kernel:
    return _loss(name, summary, (Op(targets, _X, _Y),), forward, backward)


_E = OPS_PER_EXP
_NLL = "aten.nll_loss_nd aten.nll_loss aten.nll_loss2d"
_NLL_PAIR = "aten.nll_loss_forward aten.nll_loss2d_forward"
# log_softmax: maximum, difference, exp, sum, difference. Backward: exp, product, difference.
_LOG_SOFTMAX_OPS = (_E + 4, _E + 2)

LOSS_KERNELS: tuple[Kernel, ...] = (
    _loss(
        "cross_entropy",
        "negative log likelihood of log_softmax(x), with weights and label smoothing",
        (
            Op("getitem", Op(_NLL_PAIR, _LOG_SOFTMAX, _Y), Const(0)),
            Op(_NLL, _LOG_SOFTMAX, _Y),
            Op("aten.cross_entropy_loss", _X, _Y),
        ),
        _E + 5,
        _E + 3,
    ),
    _loss("log_softmax", "x - log(sum(exp(x)))", (_LOG_SOFTMAX,), *_LOG_SOFTMAX_OPS),
    _of_two("nll_loss", "minus the log-probability of the target", f"{_NLL} {_NLL_PAIR}", 1, 1),
    _of_two("mse_loss", "(x - y)^2", "aten.mse_loss", 3, 2),
    _of_two("l1_loss", "|x - y|", "aten.l1_loss", 3, 2),
    _of_two(
        "smooth_l1_loss",
        "squared near zero, linear far from it; Huber's with its factor",
        "aten.smooth_l1_loss aten.huber_loss",
        5,
        4,
    ),
    _of_two(
        "binary_cross_entropy",
        "cross entropy of two classes, from logits or probabilities",
        "aten.binary_cross_entropy_with_logits aten.binary_cross_entropy",
        2 * _E + 5,
        _E + 3,
    ),
    _of_two("kl_div", "y * (log(y) - x)", "aten.kl_div", _E + 3, _E + 2),
    _of_two("poisson_nll_loss", "exp(x) - y * x", "aten.poisson_nll_loss", _E + 3, _E + 1),
    _of_two(
        "margin_loss",
        "how far scores are on the wrong side of a margin",
        "aten.multi_margin_loss aten.multilabel_margin_loss aten.soft_margin_loss "
        "aten.hinge_embedding_loss aten.margin_ranking_loss aten.multilabel_margin_loss_forward",
        _E + 3,
        _E + 2,
    ),
    _of_two(
        "distance_loss",
        "distances of embeddings against a margin",
        "aten.cosine_embedding_loss aten.triplet_margin_loss",
        8,
        8,
    ),
)

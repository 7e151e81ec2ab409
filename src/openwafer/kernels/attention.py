"""Attention as one kernel: torch's own operation, and products with a softmax between them.

Decides which spellings fuse: scores by matmul, bmm, baddbmm or einsum; scaled, capped, masked or
biased in any order; softmax; dropout; a product with the values. Positions (rotary, ALiBi, relative
or learned) are operations before it or biases inside it. A spelling that does not fuse, or whose
probabilities are read elsewhere, is matched operation by operation.
"""

from __future__ import annotations

from torch import fx

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.dropout import OPS_PER_RANDOM
from openwafer.kernels.kernel import (
    ALL_DTYPES,
    CostContext,
    Kernel,
    KernelCost,
    Match,
    Work,
    specs_of,
)
from openwafer.kernels.pattern import (
    ANY,
    HOLE,
    Const,
    Either,
    Leaf,
    Number,
    Op,
    Pattern,
    Seq,
    Wrapped,
    op_stem,
    target_name,
)
from openwafer.kernels.product import product_macs

__all__ = ["ATTENTION_KERNELS", "VIEWS"]

SOFTMAX_OPS = OPS_PER_EXP + 4
"""Per score: maximum, difference, exp, sum, quotient."""

VIEWS = (
    Op("aten.view aten.reshape aten._unsafe_view aten.unsqueeze aten.squeeze aten.flatten", HOLE),
    Op("aten.transpose aten.permute aten.expand aten.clone aten.contiguous aten.alias", HOLE),
    Op("aten._to_copy aten.to aten.type_as aten.unflatten", HOLE),
)

_SCORE_LINKS = (
    *VIEWS,
    Op("aten.mul aten.multiply", HOLE, Number(), commutes=True),
    Op("aten.div aten.divide aten.true_divide", HOLE, Number()),
    Op("aten.add", HOLE, ANY, commutes=True),
    Op("aten.sub", HOLE, ANY),
    Op("aten.masked_fill", HOLE, ANY, ANY),
    Op("aten.where", ANY, HOLE, ANY),
    Op("aten.where", ANY, ANY, HOLE),
    Op("aten.tanh", HOLE),
    Op("aten.maximum", HOLE, Number(), commutes=True),
    Op("aten.max.other", HOLE, Number(), commutes=True),
    Op("aten.clamp aten.clamp_min", HOLE),
)
_PROBABILITY_LINKS = (
    *VIEWS,
    Op("aten.dropout", HOLE),
    Op("getitem", Op("aten.native_dropout", HOLE), Const(0)),
    Op("aten.mul", HOLE, ANY, commutes=True),
    Op("aten.masked_fill", HOLE, ANY, ANY),
    Op("aten.where", ANY, ANY, HOLE),
    Op("aten.nan_to_num", HOLE),
)
_Q, _K, _V = Leaf("query"), Leaf("key"), Leaf("value")
_SCORES = Wrapped(
    Either(
        (
            Op("aten.matmul aten.bmm", _Q, _K),
            Op("aten.baddbmm", ANY, _Q, _K),
            Op("aten.einsum", ANY, Seq((_Q, _K))),
        )
    ),
    _SCORE_LINKS,
)
_PROBABILITIES: Pattern = Wrapped(
    Op("aten.softmax aten._softmax aten._safe_softmax", _SCORES), _PROBABILITY_LINKS
)


def _spelled_cost(match: Match, context: CostContext) -> KernelCost:
    """Two products; the probabilities wait for the backward pass, beside query, key and value."""
    products = [node for node in match.nodes if op_stem(target_name(node)) in _PRODUCTS]
    scores = max(specs_of(node)[0].numel for node in match.nodes if _is_softmax(node))
    item = specs_of(match.anchor)[0].torch_dtype.itemsize
    links = sum(op_stem(target_name(node)) in _COUNTED for node in match.nodes)
    dropped = any("dropout" in target_name(node) for node in match.nodes)
    return _attention_cost(
        match,
        context,
        macs=sum(product_macs(node) for node in products),
        scores=scores,
        ops_per_score=SOFTMAX_OPS + links + (OPS_PER_RANDOM + 1) * dropped,
        score_bytes=item,
    )


def _sdpa_cost(match: Match, context: CostContext) -> KernelCost:
    """`query [..., L, E]`, `key [..., S, E]`, `value [..., S, Ev]`; a causal mask saves nothing
    here, since the upper half of a rectangle of PEs would idle."""
    query, key, result = match.spec("query"), match.spec("key"), match.output
    scores = query.numel // query.shape[-1] * key.shape[-2]
    dropped = len(match.anchor.args) > 4 and match.anchor.args[4] not in (0, 0.0)
    return _attention_cost(
        match,
        context,
        macs=scores * (query.shape[-1] + result.shape[-1]),
        scores=scores,
        ops_per_score=SOFTMAX_OPS + 2 + (OPS_PER_RANDOM + 1) * dropped,
        score_bytes=query.torch_dtype.itemsize,
    )


def _attention_cost(
    match: Match,
    context: CostContext,
    *,
    macs: int,
    scores: int,
    ops_per_score: int,
    score_bytes: int,
) -> KernelCost:
    has_gradient = bool(match.grad_inputs)
    return kernel_cost(
        match,
        context,
        forward=Work(macs=macs, elementwise_ops=scores * ops_per_score),
        backward=Work(
            macs=2 * macs * has_gradient,
            # Of softmax: a product, a sum, a difference and a product; one for each further step.
            elementwise_ops=scores * (ops_per_score - OPS_PER_EXP) * has_gradient,
        ),
        parallelism=per_sample(macs, context),
        saved=tuple(match.bound[leaf] for leaf in ("query", "key", "value")),
        inner_saved_bytes=scores * score_bytes,
    )


def _is_softmax(node: fx.Node) -> bool:
    return "softmax" in target_name(node)


_PRODUCTS = {"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum"}
_COUNTED = {
    f"aten.{name}"
    for name in [
        "mul",
        "div",
        "add",
        "sub",
        "masked_fill",
        "where",
        "tanh",
        "maximum",
        "max",
        "clamp",
    ]
}
_SOURCE = "count of multiply-accumulates: two products forward, four backward; OPS_PER_EXP assumed"

ATTENTION_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="attention",
        family="attention",
        summary="softmax(query @ key.T * scale + mask) @ value, by torch's own operation",
        patterns=(Op("aten.scaled_dot_product_attention", _Q, _K, _V),),
        dtypes=ALL_DTYPES,  # masks are boolean
        cost=_sdpa_cost,
        sources=(_SOURCE,),
    ),
    Kernel(
        name="attention_spelled_out",
        family="attention",
        summary="the same by matmul, bmm, baddbmm or einsum, with scale, cap, masks and biases",
        patterns=(
            Op("aten.matmul aten.bmm", _PROBABILITIES, _V),
            Op("aten.einsum", ANY, Seq((_PROBABILITIES, _V))),
        ),
        dtypes=ALL_DTYPES,
        cost=_spelled_cost,
        sources=(_SOURCE,),
    ),
)

"""Matrix products: with a weight (family `fc`) and between activations (family `matmul`).

Forward: one multiply-accumulate per element of the result and per element summed over. Backward:
the same again for each of the two operands that gets a gradient (twice the forward in general, once
for the first layer of a network, whose input needs none).
"""

from __future__ import annotations

from math import prod

from torch import fx

from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import (
    Candidate,
    CostContext,
    Kernel,
    KernelCost,
    Match,
    Rejection,
    Work,
    specs_of,
)
from openwafer.kernels.pattern import Leaf, Op

__all__ = ["MATMUL_KERNELS"]

_SOURCE = "count of multiply-accumulates; two products of the same size in the backward pass"


def _linear_cost(match: Match, context: CostContext) -> KernelCost:
    """`[..., in] x [out, in] (+ [out])`."""
    return _product_cost(match, context, summed=match.spec("input").shape[-1])


def _einsum_cost(match: Match, context: CostContext) -> KernelCost:
    return _product_cost(match, context, summed=_einsum_summed(match.anchor))


def _product_cost(match: Match, context: CostContext, *, summed: int) -> KernelCost:
    """`summed` is the number of products that make one element of the result."""
    operands = _operands(match)
    result = match.output.numel
    macs = result * summed
    bias = match.bound.get("bias")
    grads = sum(node in match.grad_inputs for node in operands)
    if len(operands) == 1:  # a tensor times itself: one gradient made of two products
        grads *= 2
    bias_grad = result if bias in match.grad_inputs else 0
    return kernel_cost(
        match,
        context,
        forward=Work(macs=macs, elementwise_ops=result if bias else 0),
        backward=Work(macs=macs * grads, elementwise_ops=bias_grad),
        parallelism=_parallelism(match, operands, macs, context),
        saved=_saved(match, operands),
    )


def _operands(match: Match) -> tuple[fx.Node, ...]:
    bias = match.bound.get("bias")
    return tuple(node for node in match.inputs if node is not bias)


def _saved(match: Match, operands: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Each operand's gradient reads the other operand."""
    if len(operands) == 1:
        return operands
    first, second = operands
    grads = match.grad_inputs
    return ((first,) if second in grads else ()) + ((second,) if first in grads else ())


def _parallelism(
    match: Match, operands: tuple[fx.Node, ...], macs: int, context: CostContext
) -> int:
    """With a weight, a PE holds at least one element of it and works on its products; without one,
    every product of a sample may have its own PE."""
    weights = [specs_of(node)[0].numel for node in operands if node in match.resident]
    return max(weights) if weights else per_sample(macs, context)


def _check_einsum(candidate: Candidate) -> Rejection | None:
    equation, operands = candidate.anchor.args[0], candidate.anchor.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return Rejection("einsum of other than two operands", "products of two operands each")
    if "." in str(equation) or "->" not in str(equation):
        return Rejection(
            f"einsum `{equation}` with an ellipsis or without `->`",
            "the equation written out, such as `bij,bjk->bik`",
        )
    if any(len(set(part)) != len(part) for part in str(equation).split("->")[0].split(",")):
        return Rejection(f"einsum `{equation}` takes a diagonal", "torch.diagonal before it")
    return None


def _einsum_summed(node: fx.Node) -> int:
    """Products per element of the result: the extents of the letters that are summed away."""
    equation, operands = node.args[0], node.args[1]
    terms, result = str(equation).replace(" ", "").split("->")
    assert isinstance(operands, (list, tuple))
    extents: dict[str, int] = {}
    for letters, operand in zip(terms.split(","), operands, strict=True):
        assert isinstance(operand, fx.Node)
        extents.update(zip(letters, specs_of(operand)[0].shape, strict=True))
    return prod(extent for letter, extent in extents.items() if letter not in result)


_X, _W, _B = Leaf("input"), Leaf("weight"), Leaf("bias")

MATMUL_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="linear",
        family="fc",
        summary="x @ weight.T + bias",
        patterns=(
            Op("aten.addmm.default", _B, _X, Op("aten.t.default", _W)),
            Op("aten.linear.default", _X, _W, _B),
            Op("aten.linear.default", _X, _W),
            Op("aten.addmm.default", _B, _X, _W),
        ),
        cost=_linear_cost,
        sources=(_SOURCE,),
    ),
    Kernel(
        name="matmul",
        family="matmul",
        summary="products of matrices and of batches of them",
        patterns=tuple(
            Op(target, _X, _W)
            for target in (
                "aten.mm.default",
                "aten.bmm.default",
                "aten.matmul.default",
                "aten.mv.default",
                "aten.dot.default",
            )
        ),
        cost=_linear_cost,
        sources=(_SOURCE,),
    ),
    Kernel(
        name="einsum",
        family="matmul",
        summary="einsum of two operands",
        patterns=(Op("aten.einsum.default"),),
        cost=_einsum_cost,
        check=_check_einsum,
        sources=(_SOURCE,),
    ),
)

"""Matrix products: with a weight (family `fc`) and between activations (family `matmul`).

Forward: one multiply-accumulate per element of the result and per element summed over. Backward:
the same again for each operand that gets a gradient (twice the forward in general, once for the
first layer of a network, whose input needs none).
"""

from __future__ import annotations

from torch import fx

from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import CostContext, Kernel, KernelCost, Match, Work, specs_of
from openwafer.kernels.pattern import Leaf, Op, op_stem, target_name
from openwafer.kernels.product import PRODUCTS, one_dtype, operand_nodes, product_macs

__all__ = ["MATMUL_KERNELS"]

_SOURCE = "count of multiply-accumulates; two products of the same size in the backward pass"


def _cost(match: Match, context: CostContext) -> KernelCost:
    """`[..., in] x [in, out] (+ [out])`, in whatever spelling."""
    product = next(node for node in match.nodes if _is_product(node))
    result = match.output.numel
    macs = product_macs(product)
    bias = next((node for node in match.inputs if _is_addend(product, node)), None)
    operands = tuple(node for node in match.inputs if node is not bias)
    grads = sum(node in match.grad_inputs for node in operands)
    if len(operands) == 1 and len(operand_nodes(product)) == 2:  # a tensor times itself
        grads *= 2
    return kernel_cost(
        match,
        context,
        forward=Work(macs=macs, elementwise_ops=result if bias else 0),
        backward=Work(
            macs=macs * grads, elementwise_ops=result if bias in match.grad_inputs else 0
        ),
        parallelism=_parallelism(match, operands, macs, context),
        saved=_saved(match, operands),
    )


def _is_product(node: fx.Node) -> bool:
    stem = op_stem(target_name(node))
    return stem in PRODUCTS or stem == "aten.einsum"


def _is_addend(product: fx.Node, node: fx.Node) -> bool:
    stem = op_stem(target_name(product))
    if stem == "aten.einsum":
        return False
    if stem == "aten.linear":
        return len(product.args) > 2 and product.args[2] is node
    return PRODUCTS[stem] == 1 and product.args[0] is node


def _saved(match: Match, operands: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Each operand's gradient reads the other operands."""
    if len(operands) == 1:
        return operands
    grads = match.grad_inputs
    return tuple(
        node for node in operands if any(other in grads for other in operands if other is not node)
    )


def _parallelism(
    match: Match, operands: tuple[fx.Node, ...], macs: int, context: CostContext
) -> int:
    """With a weight, a PE holds at least one element of it and works on its products; without one,
    every product of a sample may have its own PE."""
    weights = [specs_of(node)[0].numel for node in operands if node in match.resident]
    return max(weights) if weights else per_sample(macs, context)


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
        cost=_cost,
        check=one_dtype,
        sources=(_SOURCE,),
    ),
    Kernel(
        name="matmul",
        family="matmul",
        summary="products of matrices, of batches of them, and of vectors",
        patterns=(
            Op("aten.mm aten.bmm aten.matmul aten.mv aten.dot aten.vdot", _X, _W),
            Op("aten.inner aten.tensordot aten.linalg_vecdot", _X, _W),
        ),
        cost=_cost,
        check=one_dtype,
        sources=(_SOURCE,),
    ),
    Kernel(
        name="matmul_add",
        family="matmul",
        summary="beta * c + alpha * (a @ b)",
        patterns=(Op("aten.baddbmm aten.addbmm aten.addmv", _B, _X, _W),),
        cost=_cost,
        check=one_dtype,
        sources=(_SOURCE,),
    ),
    Kernel(
        name="einsum",
        family="matmul",
        summary="einsum of any number of operands, contracted from left to right",
        patterns=(Op("aten.einsum"),),
        cost=_cost,
        check=one_dtype,
        sources=(_SOURCE,),
    ),
)

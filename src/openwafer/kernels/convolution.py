"""Convolution and transposed convolution over one, two or three dimensions.

Forward: each element of the result (of the input, where transposed) takes a multiply-accumulate
for each element of a filter. Backward: the same again for each of input and weight.
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
from openwafer.kernels.pattern import Leaf, Op, target_name
from openwafer.kernels.product import one_dtype

__all__ = ["CONVOLUTION_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    """`input [batch, in, ...]`, `weight [out, in / groups, ...]` (`[in, out / groups, ...]` where
    transposed): the second and further extents of the weight are what one element takes part in."""
    transposed = _is_transposed(match.anchor)
    elements = match.spec("input").numel if transposed else match.output.numel
    macs = elements * prod(match.spec("weight").shape[1:])
    factors = (match.bound["input"], match.bound["weight"])
    bias = [node for node in match.inputs if node not in factors]
    result = match.output.numel
    grads = match.grad_inputs
    return kernel_cost(
        match,
        context,
        forward=Work(macs=macs, elementwise_ops=result * len(bias)),
        backward=Work(
            macs=macs * sum(node in grads for node in factors),
            elementwise_ops=result * sum(node in grads for node in bias),
        ),
        # A filter may be copied to many PEs, so that each product of a sample has its own.
        parallelism=per_sample(macs, context),
        saved=(factors[0],) if factors[1] in grads else (),
    )


def _is_transposed(node: fx.Node) -> bool:
    if "transpose" in target_name(node):
        return True
    generic = target_name(node) in ("aten.convolution.default", "aten._convolution.default")
    return generic and len(node.args) > 6 and bool(node.args[6])


def _check(candidate: Candidate) -> Rejection | None:
    weight = specs_of(candidate.bound["weight"])[0]
    if len(weight.shape) > 5:
        return Rejection(f"convolution over {len(weight.shape) - 2} dimensions", "one to three")
    return one_dtype(candidate)


def _convolution(name: str, summary: str, targets: str) -> Kernel:
    return Kernel(
        name=name,
        family="conv",
        summary=summary,
        patterns=(Op(targets, Leaf("input"), Leaf("weight")),),
        cost=_cost,
        check=_check,
        sources=("count of multiply-accumulates; one product of that size for each gradient",),
    )


CONVOLUTION_KERNELS: tuple[Kernel, ...] = (
    _convolution(
        "convolution",
        "filters slid over one to three dimensions, in groups or depthwise, dilated or strided",
        "aten.conv1d aten.conv2d aten.conv3d aten.convolution aten._convolution aten.conv_tbc "
        "aten.conv_depthwise3d aten._conv_depthwise2d",
    ),
    _convolution(
        "transposed_convolution",
        "each element spreads a filter over the result",
        "aten.conv_transpose1d aten.conv_transpose2d aten.conv_transpose3d",
    ),
)

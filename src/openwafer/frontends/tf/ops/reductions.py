"""Sums, means and extremes along axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import Operand, Table, integers, tensor, torch_dtype

__all__ = ["OPS"]

OPS = Table()

Reduction = Callable[[Tensor, list[int], bool], Tensor]

_REDUCTIONS: dict[str, Reduction] = {
    "All": lambda x, axes, keep: torch.all(x, axes, keep),
    "Any": lambda x, axes, keep: torch.any(x, axes, keep),
    "Max": lambda x, axes, keep: torch.amax(x, axes, keep),
    "Mean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "Min": lambda x, axes, keep: torch.amin(x, axes, keep),
    "Sum": lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype),
}


def _enter(kind: str, function: Reduction) -> None:
    def lower(node: Node, x: Operand, axes: Operand) -> Tensor:
        value, chosen = tensor(x), integers(axes, "axes")
        # torch takes no axes for all of them.
        return function(value, chosen, node.attribute("keep_dims")) if chosen else value

    OPS.enter(kind)(lower)


for _kind, _function in _REDUCTIONS.items():
    _enter(_kind, _function)


@OPS.enter("Prod")
def prod(node: Node, x: Tensor, axes: Operand) -> Tensor:
    """Along one axis after the other, the last one first."""
    for axis in sorted((a % x.dim() for a in integers(axes, "axes")), reverse=True):
        x = torch.prod(x, axis, keepdim=node.attribute("keep_dims"), dtype=x.dtype)
    return x


@OPS.enter("L2Loss")
def l2_loss(node: Node, x: Tensor) -> Tensor:
    return torch.square(x).sum() / 2


@OPS.enter("ArgMax")
def argmax(node: Node, x: Tensor, axis: Operand) -> Tensor:
    found = torch.argmax(x, integers(axis, "axis")[0])
    return found.to(torch_dtype(node.attribute("output_type")))


@OPS.enter("ArgMin")
def argmin(node: Node, x: Tensor, axis: Operand) -> Tensor:
    found = torch.argmin(x, integers(axis, "axis")[0])
    return found.to(torch_dtype(node.attribute("output_type")))


@OPS.enter("Cumsum")
def cumsum(node: Node, x: Tensor, axis: Operand) -> Tensor:
    along = integers(axis, "axis")[0]
    turned = torch.flip(x, [along]) if node.attribute("reverse") else x
    total = torch.cumsum(turned, along, dtype=x.dtype)
    if node.attribute("exclusive"):
        total = total - turned
    return torch.flip(total, [along]) if node.attribute("reverse") else total


@OPS.enter("TopKV2")
def top_k(node: Node, x: Tensor, count: Operand) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, integers(count, "number")[0])
    return values, indices.to(torch.int32)


@OPS.enter("InTopKV2", "InTopK")
def in_top_k(node: Node, predictions: Tensor, targets: Tensor, count: Operand) -> Tensor:
    """Whether fewer than `count` classes are above the target."""
    own = predictions.gather(1, targets.long().unsqueeze(1))
    return (predictions > own).sum(1) < integers(count, "number")[0]

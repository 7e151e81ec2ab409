"""Products of matrices.

`Dense` is `BiasAdd(MatMul(x, w), b)`, which rewriting.py puts together: one kernel takes it. Its
result has the shape of the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import Operand, Table, tensor

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("MatMul")
def matmul(node: Node, a: Operand, b: Operand) -> Tensor:
    return _linear(node, a, b)


@OPS.enter("Dense")
def dense(node: Node, a: Operand, b: Operand, bias: Operand) -> Tensor:
    return _linear(node, a, b, tensor(bias)).reshape(node.shape())


def _linear(node: Node, a: Operand, b: Operand, bias: Tensor | None = None) -> Tensor:
    """As the layers of PyTorch write it: one kernel takes it, and the fast form of a loss head."""
    left, right = tensor(a), tensor(b)
    if node.attribute("transpose_a"):
        left = left.t()
    return F.linear(left, right if node.attribute("transpose_b") else right.t(), bias)


@OPS.enter("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def batch_matmul(node: Node, a: Operand, b: Operand) -> Tensor:
    left, right = tensor(a), tensor(b)
    if node.attribute("adj_x"):
        left = left.transpose(-2, -1)
    if node.attribute("adj_y"):
        right = right.transpose(-2, -1)
    return torch.matmul(left, right)


@OPS.enter("Einsum")
def einsum(node: Node, *operands: Operand) -> Tensor:
    equation = node.attribute("equation")
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    return torch.einsum(text, *(tensor(operand) for operand in operands))


@OPS.enter("BiasAdd")
def bias_add(node: Node, x: Tensor, bias: Operand) -> Tensor:
    addend = tensor(bias)
    if node.attribute("data_format") == b"NCHW":
        addend = addend.reshape(-1, *([1] * (x.dim() - 2)))
    return x + addend

"""Softmax, and the cross entropies with it.

The second output of a cross entropy is its gradient, which only TensorFlow's own gradients read.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import Operand, Table, tensor

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("Softmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    return F.softmax(x, -1)


@OPS.enter("LogSoftmax")
def log_softmax(node: Node, x: Tensor) -> Tensor:
    return F.log_softmax(x, -1)


@OPS.enter("SparseSoftmaxCrossEntropyWithLogits")
def sparse_cross_entropy(node: Node, logits: Operand, labels: Operand) -> tuple[Tensor, None]:
    return F.cross_entropy(tensor(logits), tensor(labels).long(), reduction="none"), None


@OPS.enter("MeanSparseCrossEntropy")
def mean_sparse_cross_entropy(node: Node, logits: Operand, labels: Operand) -> Tensor:
    """The mean over the samples; of rewriting.py."""
    return F.cross_entropy(tensor(logits), tensor(labels).long())


@OPS.enter("SoftmaxCrossEntropyWithLogits")
def cross_entropy(node: Node, logits: Operand, labels: Operand) -> tuple[Tensor, None]:
    """With a probability for every class. TensorFlow's gradient takes for granted that they sum
    to 1, torch's does not: where they do not, the two differ."""
    return -(tensor(labels) * F.log_softmax(tensor(logits), -1)).sum(-1), None

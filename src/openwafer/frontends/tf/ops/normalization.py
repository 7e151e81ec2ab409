"""Batch normalization in one operation.

Keras' layer normalization uses it too, with the rows of its input as channels; rewriting.py turns
that back into a layer normalization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.convolution import to_channels_first, to_own_format
from openwafer.frontends.tf.ops.table import Operand, Table, tensor

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def fused_batch_norm(
    node: Node, x: Tensor, scale: Operand, offset: Operand, mean: Operand, variance: Operand
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and in training the batch's mean and unbiased variance."""
    image = to_channels_first(node, x)
    weight, bias = tensor(scale), tensor(offset)
    epsilon = node.attribute("epsilon")
    if not node.attribute("is_training"):
        old_mean, old_variance = tensor(mean), tensor(variance)
        result = F.batch_norm(image, old_mean, old_variance, weight, bias, False, 0.0, epsilon)
        return to_own_format(node, result), old_mean, old_variance
    result = F.batch_norm(image, None, None, weight, bias, True, 0.0, epsilon)
    over = [dimension for dimension in range(image.dim()) if dimension != 1]
    kept = node.attribute("exponential_avg_factor") if node.kind == "FusedBatchNormV3" else 1.0
    new_mean, new_variance = torch.mean(image, over), torch.var(image, over)
    if kept != 1.0:
        new_mean = tensor(mean) * (1 - kept) + new_mean * kept
        new_variance = tensor(variance) * (1 - kept) + new_variance * kept
    return to_own_format(node, result), new_mean, new_variance


@OPS.enter("LayerNorm")
def layer_norm(node: Node, x: Tensor, gamma: Operand, beta: Operand) -> Tensor:
    """Over the last dimension; of rewriting.py."""
    weight, bias, size = tensor(gamma), tensor(beta), [x.shape[-1]]
    if [*weight.shape] == size == [*bias.shape]:
        return F.layer_norm(x, size, weight, bias, node.attribute("epsilon"))
    return F.layer_norm(x, size, eps=node.attribute("epsilon")) * weight + bias

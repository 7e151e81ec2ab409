"""Pooling over windows of an image, in both data formats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.convolution import (
    padded,
    paddings_of,
    spatial,
    to_channels_first,
    to_own_format,
)
from openwafer.frontends.tf.ops.table import CannotLowerError, Operand, Table, integers

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    image = to_channels_first(node, x)
    windows, strides = spatial(node, "ksize"), spatial(node, "strides")
    pairs = paddings_of(node, image.shape[2:], windows, strides)
    return to_own_format(node, F.max_pool2d(padded(image, pairs, -math.inf), windows, strides))


@OPS.enter("AvgPool")
def avg_pool(node: Node, x: Tensor) -> Tensor:
    """The mean of the pixels in a window; those of the padding do not count."""
    image = to_channels_first(node, x)
    windows, strides = spatial(node, "ksize"), spatial(node, "strides")
    pairs = paddings_of(node, image.shape[2:], windows, strides)
    if not any(number for pair in pairs for number in pair):
        return to_own_format(node, F.avg_pool2d(image, windows, strides))
    sums = F.avg_pool2d(padded(image, pairs), windows, strides, divisor_override=1)
    inside = [
        [_count_inside(i * stride - before, window, size) for i in range(num)]
        for (before, _), window, stride, size, num in zip(
            pairs, windows, strides, image.shape[2:], sums.shape[2:], strict=True
        )
    ]
    counts = [[float(rows * columns) for columns in inside[1]] for rows in inside[0]]
    return to_own_format(node, sums / torch.tensor(counts, dtype=x.dtype))


@OPS.enter("ResizeNearestNeighbor")
def resize_nearest(node: Node, images: Tensor, size: Operand) -> Tensor:
    """Each pixel a whole number of times, in [batch, height, width, channels]."""
    height, width = integers(size, "size")
    _, old_height, old_width, _ = images.shape
    if height % old_height or width % old_width or node.attribute("align_corners"):
        raise CannotLowerError(
            "a pixel is not repeated a whole number of times",
            "tf.keras.layers.UpSampling2D, or a transposed convolution",
        )
    larger = F.interpolate(images.permute(0, 3, 1, 2), size=[height, width], mode="nearest")
    return larger.permute(0, 2, 3, 1)


def _count_inside(start: int, window: int, size: int) -> int:
    return min(start + window, size) - max(start, 0)

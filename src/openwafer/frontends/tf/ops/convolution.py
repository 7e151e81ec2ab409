"""Convolutions, in both data formats, and transposed.

torch holds images as [batch, channels, height, width]; for TensorFlow's other format there is a
permutation before and after, which the kernels take as free. Filters are [height, width, in, out].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import CannotLowerError, Operand, Table, integers, tensor

__all__ = [
    "OPS",
    "is_channels_last",
    "padded",
    "paddings_of",
    "spatial",
    "to_channels_first",
    "to_own_format",
]

OPS = Table()


def is_channels_last(node: Node) -> bool:
    return node.attribute("data_format") in (b"NHWC", b"NDHWC", b"NWC")


def to_channels_first(node: Node, x: Tensor) -> Tensor:
    return x.permute(0, x.dim() - 1, *range(1, x.dim() - 1)) if is_channels_last(node) else x


def to_own_format(node: Node, x: Tensor) -> Tensor:
    return x.permute(0, *range(2, x.dim()), 1) if is_channels_last(node) else x


def spatial(node: Node, attribute: str) -> list[int]:
    """The numbers for height and width in an attribute that has one for each dimension."""
    values = list(node.attribute(attribute))
    return values[1:-1] if is_channels_last(node) else values[2:]


def paddings_of(
    node: Node, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) in each spatial dimension. With SAME there is one window for each stride, and
    the odd element of padding comes after."""
    padding = node.attribute("padding")
    if padding == b"VALID":
        return [(0, 0) for _ in sizes]
    if padding == b"EXPLICIT":
        flat = list(node.attribute("explicit_paddings"))
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return pairs[1:-1] if is_channels_last(node) else pairs[2:]
    found: list[tuple[int, int]] = []
    for size, window, stride in zip(sizes, windows, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        found.append((total // 2, total - total // 2))
    return found


def padded(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with its last dimensions padded."""
    flat = [number for pair in reversed(pairs) for number in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _convolved(
    node: Node, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None
) -> Tensor:
    """`x` and the result in the node's format, `weight` as torch has it: [out, in, ...]."""
    image = to_channels_first(node, x)
    strides, dilations = spatial(node, "strides"), spatial(node, "dilations")
    windows = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pairs = paddings_of(node, image.shape[2:], windows, strides)
    even = all(before == after for before, after in pairs)
    result = F.conv2d(
        image if even else padded(image, pairs),
        weight,
        bias,
        strides,
        [before for before, _ in pairs] if even else 0,
        dilations,
        groups,
    )
    return to_own_format(node, result)


@OPS.enter("Conv2D", "BiasedConv2D")
def conv2d(node: Node, x: Tensor, filters: Operand, *biases: Operand) -> Tensor:
    """`biases` are those that rewriting.py puts in: one at most."""
    weight = tensor(filters)
    channels = x.shape[-1] if is_channels_last(node) else x.shape[1]
    groups = channels // weight.shape[2]
    return _convolved(node, x, weight.permute(3, 2, 0, 1), groups, *map(tensor, biases))


@OPS.enter("DepthwiseConv2dNative")
def depthwise_conv2d(node: Node, x: Tensor, filters: Operand) -> Tensor:
    """Each channel by itself with `multiplier` filters: [height, width, channels, multiplier]."""
    weight = tensor(filters)
    height, width, channels, multiplier = weight.shape
    grouped = weight.permute(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
    return _convolved(node, x, grouped, channels)


@OPS.enter("BiasedConv2DBackpropInput")
def biased_conv2d_transpose(
    node: Node, sizes: Operand, filters: Operand, grad: Tensor, bias: Operand
) -> Tensor:
    return _transposed(node, sizes, filters, grad, tensor(bias))


@OPS.enter("Conv2DBackpropInput")
def conv2d_transpose(node: Node, sizes: Operand, filters: Operand, grad: Tensor) -> Tensor:
    """The transposed convolution, whose output size is given: [height, width, out, in]."""
    return _transposed(node, sizes, filters, grad)


def _transposed(
    node: Node, sizes: Operand, filters: Operand, grad: Tensor, bias: Tensor | None = None
) -> Tensor:
    if spatial(node, "dilations") != [1, 1]:
        raise CannotLowerError("it is dilated", "use a stride, or a convolution that is not")
    wanted = integers(sizes, "output size")
    wanted = wanted[1:-1] if is_channels_last(node) else wanted[2:]
    image, strides = to_channels_first(node, grad), spatial(node, "strides")
    weight = tensor(filters).permute(3, 2, 0, 1)
    pairs = paddings_of(node, wanted, weight.shape[2:], strides)
    # All that the inputs reach; what the padding of the convolution would have added is cut off.
    reached = [
        (extent - 1) * stride + window
        for extent, stride, window in zip(image.shape[2:], strides, weight.shape[2:], strict=True)
    ]
    covers = all(
        before + size <= extent
        for (before, _), size, extent in zip(pairs, wanted, reached, strict=True)
    )
    whole = F.conv_transpose2d(image, weight, bias if covers else None, strides)
    for dimension, ((before, _), size) in enumerate(zip(pairs, wanted, strict=True), start=2):
        missing = before + size - whole.shape[dimension]
        if missing > 0:
            last = [(0, 0)] * (whole.dim() - 2)
            last[dimension - 2] = (0, missing)
            whole = padded(whole, last)
        if before or whole.shape[dimension] != size:
            whole = whole.narrow(dimension, before, size)
    if bias is not None and not covers:
        whole = whole + bias.reshape(-1, 1, 1)
    return to_own_format(node, whole)


@OPS.enter("Conv3D")
def conv3d(node: Node, x: Tensor, filters: Operand) -> Tensor:
    raise CannotLowerError("convolutions in three dimensions are not supported", "tf.nn.conv2d")


@OPS.enter("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Blocks of pixels into channels; the place in the block varies slower than the channel."""
    size = node.attribute("block_size")
    image = to_channels_first(node, x)
    batch, channels, height, width = image.shape
    blocks = image.reshape(batch, channels, height // size, size, width // size, size)
    moved = blocks.permute(0, 3, 5, 1, 2, 4)
    shape = (batch, channels * size * size, height // size, width // size)
    return to_own_format(node, moved.reshape(shape))


@OPS.enter("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    size = node.attribute("block_size")
    image = to_channels_first(node, x)
    batch, channels, height, width = image.shape
    blocks = image.reshape(batch, size, size, channels // (size * size), height, width)
    moved = blocks.permute(0, 3, 4, 1, 5, 2)
    shape = (batch, channels // (size * size), height * size, width * size)
    return to_own_format(node, torch.reshape(moved, shape))

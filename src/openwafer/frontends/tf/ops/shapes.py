"""Operations that move elements or give them other indices, and compute nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import (
    CannotLowerError,
    Operand,
    Table,
    constant,
    integers,
    tensor,
)

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("Reshape")
def reshape(node: Node, x: Operand, shape: Operand) -> Tensor:
    # The result's shape is known even where the operand's is computed from other shapes.
    return tensor(x).reshape(node.shape())


@OPS.enter("Transpose")
def transpose(node: Node, x: Tensor, order: Operand) -> Tensor:
    return x.permute(integers(order, "permutation"))


@OPS.enter("ExpandDims")
def expand_dims(node: Node, x: Operand, axis: Operand) -> Tensor:
    return tensor(x).unsqueeze(integers(axis, "axis")[0])


@OPS.enter("Squeeze")
def squeeze(node: Node, x: Tensor) -> Tensor:
    return x.reshape(node.shape())


@OPS.enter("ConcatV2")
def concat(node: Node, *operands: Operand) -> Tensor:
    *values, axis = operands
    return torch.cat([tensor(value) for value in values], integers(axis, "axis")[0])


@OPS.enter("Split")
def split(node: Node, axis: Operand, x: Tensor) -> tuple[Tensor, ...]:
    along = integers(axis, "axis")[0]
    return torch.split(x, x.shape[along] // node.attribute("num_split"), along)


@OPS.enter("SplitV")
def split_v(node: Node, x: Tensor, sizes: Operand, axis: Operand) -> tuple[Tensor, ...]:
    along = integers(axis, "axis")[0]
    parts = integers(sizes, "sizes")
    if -1 in parts:
        parts[parts.index(-1)] = x.shape[along] - sum(part for part in parts if part != -1)
    return torch.split(x, parts, along)


@OPS.enter("Pack")
def pack(node: Node, *values: Operand) -> Tensor:
    return torch.stack([tensor(value) for value in values], node.attribute("axis"))


@OPS.enter("Unpack")
def unpack(node: Node, x: Tensor) -> tuple[Tensor, ...]:
    return torch.unbind(x, node.attribute("axis"))


@OPS.enter("Tile")
def tile(node: Node, x: Operand, multiples: Operand) -> Tensor:
    return tensor(x).repeat(integers(multiples, "multiples"))


@OPS.enter("BroadcastTo")
def broadcast_to(node: Node, x: Operand, shape: Operand) -> Tensor:
    return tensor(x).expand(node.shape())


@OPS.enter("Fill")
def fill(node: Node, shape: Operand, value: Operand) -> Tensor:
    return tensor(value).expand(node.shape())


@OPS.enter("Pad")
def pad(node: Node, x: Tensor, paddings: Operand) -> Tensor:
    return F.pad(x, _flat(paddings))


@OPS.enter("PadV2")
def pad_v2(node: Node, x: Tensor, paddings: Operand, value: Operand) -> Tensor:
    return F.pad(x, _flat(paddings), value=float(constant(value, "value")))


def _flat(paddings: Operand) -> list[int]:
    """As torch has them: from the last dimension to the first."""
    return [int(n) for pair in reversed(constant(paddings, "paddings").tolist()) for n in pair]


@OPS.enter("MirrorPad")
def mirror_pad(node: Node, x: Tensor, paddings: Operand) -> Tensor:
    """Each dimension after the other, by indices; SYMMETRIC repeats the element at the edge."""
    mode = "reflect" if node.attribute("mode") == b"REFLECT" else "symmetric"
    for dimension, (before, after) in enumerate(constant(paddings, "paddings").tolist()):
        if before or after:
            order = np.pad(np.arange(x.shape[dimension]), (before, after), mode)
            x = x.index_select(dimension, torch.tensor(order))
    return x


@OPS.enter("ReverseV2")
def reverse(node: Node, x: Tensor, axes: Operand) -> Tensor:
    return torch.flip(x, integers(axes, "axes"))


@OPS.enter("Roll")
def roll(node: Node, x: Tensor, shifts: Operand, axes: Operand) -> Tensor:
    return torch.roll(x, integers(shifts, "shift"), integers(axes, "axis"))


@OPS.enter("Slice")
def slice_(node: Node, x: Operand, begin: Operand, size: Operand) -> Tensor:
    value = tensor(x)
    for dimension, start in enumerate(integers(begin, "start")):
        length = node.shape()[dimension]
        if length != value.shape[dimension]:
            value = value.narrow(dimension, start, length)
    return value


@OPS.enter("StridedSlice")
def strided_slice(node: Node, x: Operand, begin: Operand, end: Operand, strides: Operand) -> Tensor:
    """Python's indexing, with one entry of each operand for each index."""
    starts, ends = integers(begin, "start"), integers(end, "end")
    steps = integers(strides, "step")
    index: list[Any] = []
    flipped: list[int] = []
    value = tensor(x)
    num_new = bin(node.attribute("new_axis_mask")).count("1")
    for i, (start, stop, step) in enumerate(zip(starts, ends, steps, strict=True)):
        if _masked(node, "ellipsis_mask", i):
            index.append(...)
        elif _masked(node, "new_axis_mask", i):
            index.append(None)
        elif _masked(node, "shrink_axis_mask", i):
            index.append(start)
        else:
            first = None if _masked(node, "begin_mask", i) else start
            last = None if _masked(node, "end_mask", i) else stop
            if step < 0:
                if first is not None or last is not None or step != -1 or ... in index or num_new:
                    raise CannotLowerError("it counts backwards", "tf.reverse, then a slice")
                flipped.append(i)
                step = 1
            index.append(slice(first, last, step))
    return (torch.flip(value, flipped) if flipped else value)[tuple(index)]


def _masked(node: Node, mask: str, position: int) -> bool:
    return bool(node.attribute(mask) >> position & 1)


@OPS.enter("MatrixBandPart")
def matrix_band_part(node: Node, x: Tensor, lower: Operand, upper: Operand) -> Tensor:
    """The diagonals from `lower` below the main one to `upper` above; negative is all."""
    below, above = integers(lower, "width")[0], integers(upper, "width")[0]
    if below >= 0:
        x = torch.triu(x, -below)
    return torch.tril(x, above) if above >= 0 else x


@OPS.enter("SpaceToBatchND")
def space_to_batch(node: Node, x: Tensor, block: Operand, paddings: Operand) -> Tensor:
    """Older dilated convolutions are one convolution between this and its inverse."""
    sizes, rank = integers(block, "block"), x.dim()
    pairs = constant(paddings, "paddings").tolist()
    flat = [0, 0] * (rank - 1 - len(sizes))
    flat += [int(n) for pair in reversed(pairs) for n in pair]
    x = F.pad(x, flat)
    split_shape = [x.shape[0]]
    for dimension, size in enumerate(sizes, start=1):
        split_shape += [x.shape[dimension] // size, size]
    rest = list(range(1 + 2 * len(sizes), rank + len(sizes)))
    inner = [2 * i + 2 for i in range(len(sizes))]
    outer = [2 * i + 1 for i in range(len(sizes))]
    blocks = x.reshape(*split_shape, *x.shape[1 + len(sizes) :])
    return blocks.permute(*inner, 0, *outer, *rest).reshape(node.shape())


@OPS.enter("BatchToSpaceND")
def batch_to_space(node: Node, x: Tensor, block: Operand, crops: Operand) -> Tensor:
    sizes, count = integers(block, "block"), len(integers(block, "block"))
    batch = x.shape[0] // int(np.prod(sizes))
    blocks = x.reshape(*sizes, batch, *x.shape[1:])
    order = [count]
    for i in range(count):
        order += [count + 1 + i, i]
    rest = list(range(2 * count + 1, x.dim() + count))
    whole = blocks.permute(*order, *rest).reshape(
        batch,
        *(x.shape[1 + i] * sizes[i] for i in range(count)),
        *x.shape[1 + count :],
    )
    for i, (before, after) in enumerate(constant(crops, "crops").tolist(), start=1):
        if before or after:
            whole = whole.narrow(i, before, whole.shape[i] - before - after)
    return whole


@OPS.enter("Where")
def where(node: Node, condition: Tensor) -> Tensor:
    raise CannotLowerError(
        "how many elements it gives depends on the batch", "tf.where(condition, x, y), a mask"
    )


@OPS.enter("Range")
def range_(node: Node, start: Operand, limit: Operand, step: Operand) -> Tensor:
    raise CannotLowerError("its bounds are computed from the batch", "a constant tf.range")

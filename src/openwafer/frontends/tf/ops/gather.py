"""Rows and elements by index."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import (
    CannotLowerError,
    Operand,
    Table,
    integers,
    tensor,
    torch_dtype,
)

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("GatherV2")
def gather(node: Node, source: Operand, indices: Operand, axis: Operand) -> Tensor:
    """Whole slices of `source` along an axis, for each index, after `batch_dims` shared ones."""
    values, chosen = tensor(source), tensor(indices)
    along, shared = integers(axis, "axis")[0] % values.dim(), node.attribute("batch_dims")
    if shared < 0:
        shared += chosen.dim()
    if shared == 0:
        return _gather(values, chosen, along)
    if along != shared:
        raise CannotLowerError("its axis does not follow its batch dimensions", "axis=batch_dims")
    rest = values.shape[shared + 1 :]
    flat = values.reshape(-1, values.shape[shared], int(np.prod(rest)))
    rows = chosen.reshape(flat.shape[0], -1, 1).long().expand(-1, -1, flat.shape[2])
    return torch.gather(flat, 1, rows).reshape(node.shape())


@OPS.enter("Gather")
def gather_v1(node: Node, source: Operand, indices: Operand) -> Tensor:
    return _gather(tensor(source), tensor(indices), 0)


@OPS.enter("ResourceGather")
def resource_gather(node: Node, source: Operand, indices: Operand) -> Tensor:
    """Of a variable, which is not read as a whole before."""
    return _gather(tensor(source), tensor(indices), 0)


def _gather(values: Tensor, indices: Tensor, axis: int) -> Tensor:
    if axis == 0 and values.dim() == 2 and indices.dim():
        return F.embedding(indices, values)
    if not indices.dim():
        return values.index_select(axis, indices.reshape(1)).squeeze(axis)
    shape = (*values.shape[:axis], *indices.shape, *values.shape[axis + 1 :])
    return values.index_select(axis, indices.reshape(-1)).reshape(shape)


@OPS.enter("GatherNd")
def gather_nd(node: Node, source: Operand, indices: Operand) -> Tensor:
    values, chosen = tensor(source), tensor(indices)
    if not chosen.shape[-1]:
        raise CannotLowerError("its indices are empty")
    return values[tuple(part.long() for part in chosen.unbind(-1))]


@OPS.enter("OneHot")
def one_hot(node: Node, indices: Operand, depth: Operand, on: Operand, off: Operand) -> Tensor:
    """`on` at each class's place. An index that is no class gives a row of `off`."""
    classes = integers(depth, "depth")[0]
    value, dtype = tensor(indices), torch_dtype(node.attribute("T"))
    axis = node.attribute("axis")
    order = torch.arange(classes, dtype=value.dtype)
    if axis in (-1, value.dim()):
        hits = value.unsqueeze(-1) == order
    else:
        shape = [1] * (value.dim() + 1)
        shape[axis] = classes
        hits = value.unsqueeze(axis) == order.reshape(shape)
    if _is_number(on, 1) and _is_number(off, 0):
        return hits.to(dtype)
    return torch.where(hits, tensor(on), tensor(off))


def _is_number(value: Operand, number: float) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0 and float(value) == number


@OPS.enter("UnsortedSegmentSum")
def unsorted_segment_sum(node: Node, x: Tensor, segments: Operand, count: Operand) -> Tensor:
    """The sum of the rows of each segment."""
    rows = tensor(segments).reshape(-1).long()
    flat = x.reshape(rows.shape[0], -1)
    zeros = torch.zeros(integers(count, "number of segments")[0], flat.shape[1], dtype=x.dtype)
    return torch.index_add(zeros, 0, rows, flat).reshape(node.shape())


@OPS.enter("ScatterNd")
def scatter_nd(node: Node, indices: Operand, updates: Tensor, shape: Operand) -> Tensor:
    """Zeros, with `updates` added at the indices."""
    zeros = torch.zeros(integers(shape, "shape"), dtype=updates.dtype)
    places = tuple(part.long() for part in tensor(indices).unbind(-1))
    return zeros.index_put(places, updates, accumulate=True)

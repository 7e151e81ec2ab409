"""Random numbers.

TensorFlow's own numbers are not reproduced: here they come from (seed, step, layer, microbatch), as
in every way of running a model. `Dropout` is of rewriting.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import Operand, Table, integers, torch_dtype

__all__ = ["OPS"]

OPS = Table()


@OPS.enter("Dropout")
def dropout(node: Node, x: Tensor) -> Tensor:
    return F.dropout(x, node.attribute("rate"), True)


@OPS.enter("RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2")
def random_uniform(node: Node, shape: Operand, *seeds: Operand) -> Tensor:
    return torch.rand(integers(shape, "shape"), dtype=torch_dtype(node.attribute("dtype")))


@OPS.enter("RandomStandardNormal", "StatelessRandomNormal", "StatelessRandomNormalV2")
def random_normal(node: Node, shape: Operand, *seeds: Operand) -> Tensor:
    return torch.randn(integers(shape, "shape"), dtype=torch_dtype(node.attribute("dtype")))

"""A TensorFlow graph between TensorFlow and torch: what an operation is, without a session.

Decides the value that import, rewriting and lowering pass on. Does not decide which operations are
in it (importing.py) nor what they compute (ops/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openwafer.graph.program import Site

__all__ = ["Array", "BufferUpdate", "Node", "TensorGraph", "VariableInfo"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation.

    kind: TensorFlow's op type, or the name of a fused form (rewriting.py).
    inputs, outputs: tensors by TensorFlow's names, e.g. `dense/MatMul:0`.
    attributes: those that TensorFlow has, read when they are asked for, over `own`.
    shapes: of the outputs.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    site: Site
    operation: Any
    own: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def attribute(self, name: str) -> Any:
        return self.own[name] if name in self.own else self.operation.get_attr(name)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        shape = self.shapes[index]
        assert shape is not None, "an operation of unknown shape was refused"
        return shape


@dataclass(frozen=True, slots=True, kw_only=True)
class VariableInfo:
    """A variable that the forward graph reads. `dtype` is numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferUpdate:
    """The next value of a variable that no gradient changes: `how` is assign, add or sub."""

    variable: str
    how: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGraph:
    """The forward graph of a model: from a batch and variables to a loss and what else is wanted.

    nodes: in execution order. constants: tensors whose value no batch or variable changes.
    variables: by name. reads: tensor that is a variable's value → variable.
    inputs: tensor → path in the batch. results: the tensors wanted.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    variables: Mapping[str, VariableInfo]
    reads: Mapping[str, str]
    inputs: Mapping[str, str]
    results: tuple[str, ...]
    updates: tuple[BufferUpdate, ...]

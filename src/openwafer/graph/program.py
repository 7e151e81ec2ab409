"""Program: one captured model, as data.

Decides what a captured model is: one `torch.fx` graph of functional ATen operations up to the loss,
the parameters and buffers it reads, the batch entries it takes, and for each node the module path
and the user's file:line. Does not decide how it was captured (frontends/), which kernels cover it
(kernels/), or where it is cut (plan/).

Node metadata that every frontend sets:
    val   a fake tensor (or tuple of them): shape and dtype, never data
    site  a `Site`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

__all__ = [
    "Buffer",
    "GraphInput",
    "MetricOutput",
    "Parameter",
    "Program",
    "Site",
    "TensorSpec",
    "site_of",
    "tensor_specs",
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor; `dtype` is torch's name without the prefix, e.g. "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tuple(int(d) for d in tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{'×'.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operation comes from: module path and class, and the user's own line."""

    module: str = ""
    module_type: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "unknown line"
        return f"{self.module or '(top)'} at {place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A weight. `name` is the one in the user's state_dict; `node` the placeholder that reads it.

    `aliases` are the further state_dict names of the same tensor (tied weights).
    """

    name: str
    node: str
    spec: TensorSpec
    trainable: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A tensor that is read but not trained. `update` is the node of its next value, if it changes.

    A constant that the capture lifted out of the code has an empty `name`, and its `value`.
    """

    name: str
    node: str
    spec: TensorSpec
    persistent: bool = True
    update: str | None = None
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One tensor of the batch. `path` says which, as `[0]` or `['input_ids']`."""

    path: str
    node: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricOutput:
    """Tensors that a metric wants on the host after each step."""

    metric: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One captured model (see the module header). Treat `graph` as frozen too.

    `num_samples` is the batch size of the example batch: all shapes are for that many samples.
    """

    graph: fx.Graph
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[GraphInput, ...]
    loss: str
    metrics: tuple[MetricOutput, ...]
    training: bool
    num_samples: int
    model_name: str = "model"

    @property
    def operations(self) -> tuple[fx.Node, ...]:
        """The nodes that compute, in execution order."""
        return tuple(node for node in self.graph.nodes if node.op == "call_function")

    @property
    def num_parameters(self) -> int:
        """Number of distinct scalar weights; tied weights count once."""
        return sum(parameter.spec.numel for parameter in self.parameters)


def site_of(node: fx.Node) -> Site:
    """The site of a node; an empty one where the frontend knew none."""
    return node.meta.get("site") or Site()


def tensor_specs(value: Any) -> tuple[TensorSpec, ...]:
    """The specs of all tensors in a node's `val`, in order; non-tensors are passed over."""
    if isinstance(value, torch.Tensor):
        return (TensorSpec.of(value),)
    if isinstance(value, (tuple, list)):
        return tuple(spec for item in value for spec in tensor_specs(item))
    return ()

"""Kernel: one entry of the library as a value, and what its match costs.

Decides what a kernel states about itself and in which units. Does not decide which kernel covers
an operation (match.py) or how many PEs it gets (plan/fabric/).

All costs are for one batch of `Program.num_samples` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from openwafer.graph.program import Parameter, TensorSpec, tensor_specs
from openwafer.kernels.pattern import Op

__all__ = [
    "ADAM",
    "ALL_DTYPES",
    "BOTH_MODES",
    "FLOATS",
    "INTEGERS",
    "SGD",
    "Candidate",
    "CostContext",
    "ExecutionMode",
    "Kernel",
    "KernelCost",
    "Match",
    "OptimizerCost",
    "Rejection",
    "Work",
    "specs_of",
]

ExecutionMode = Literal["layer_pipelined", "weight_streaming"]
BOTH_MODES: tuple[ExecutionMode, ...] = ("layer_pipelined", "weight_streaming")
FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
ALL_DTYPES = FLOATS + INTEGERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one phase of a kernel does. Bytes are activations that cross the kernel's boundary."""

    macs: int = 0
    elementwise_ops: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            macs=self.macs + other.macs,
            elementwise_ops=self.elementwise_ops + other.elementwise_ops,
            bytes_in=self.bytes_in + other.bytes_in,
            bytes_out=self.bytes_out + other.bytes_out,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerCost:
    """What an optimizer keeps and does for each scalar weight."""

    name: str
    state_bytes_per_parameter: int
    ops_per_parameter: int


SGD = OptimizerCost(name="sgd", state_bytes_per_parameter=0, ops_per_parameter=2)
"""w -= lr * g: a product and a difference."""

ADAM = OptimizerCost(name="adam", state_bytes_per_parameter=8, ops_per_parameter=12)
"""Two fp32 moments. Operations counted from the update rule: 3 for the first moment, 4 for the
second, then square root, add epsilon, divide, scale and subtract."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostContext:
    """What a cost depends on besides the match. Without `training` only the forward counts."""

    num_samples: int
    training: bool
    optimizer: OptimizerCost = ADAM


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """What one match of a kernel costs for one batch.

    forward, backward: with the batch; backward is empty where no gradient passes.
    update: the optimizer on the weights that this kernel owns.
    weight_bytes: the weights it reads, as it reads them (a tied weight counts at each reader).
    gradient_bytes: the weight gradients it gives.
    owned_bytes: what else it keeps for the weights it owns: optimizer state, and an fp32 copy where
        it computes in 16 bits.
    saved_bytes: activations that wait for the backward pass.
    parallelism: the most PEs that can compute on one sample at once; 0 where there is no work.
    dtype: the arithmetic that the work runs in.
    """

    forward: Work
    backward: Work
    update: Work
    weight_bytes: int
    gradient_bytes: int
    owned_bytes: int
    saved_bytes: int
    parallelism: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a kernel does not take an operation whose pattern fits, and what it would take."""

    reason: str
    alternative: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place where a pattern of a kernel lies: what `check` sees. The last node is the result."""

    nodes: tuple[fx.Node, ...]
    bound: Mapping[str, fx.Node]

    @property
    def anchor(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes read from outside, each once, in the order in which they are read."""
        inside = set(self.nodes)
        read = (source for node in self.nodes for source in node.all_input_nodes)
        return tuple(dict.fromkeys(node for node in read if node not in inside))


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A kernel laid on its operations.

    name: `<family><n>`, numbered in execution order.
    nodes: the covered operations in execution order; the last one is the result.
    bound: the nodes at the pattern's leaves.
    inputs: the nodes read from outside.
    resident: those of the inputs that do not depend on the batch (weights, buffers, constants).
    parameters: the weights read, through casts and views too.
    owned: the trainable ones that this match updates: those of which it is the first reader.
    grad_inputs: the inputs that get a gradient from this match in a backward pass.
    """

    name: str
    kernel: Kernel
    nodes: tuple[fx.Node, ...]
    bound: Mapping[str, fx.Node]
    inputs: tuple[fx.Node, ...]
    resident: frozenset[fx.Node]
    parameters: tuple[Parameter, ...]
    owned: tuple[Parameter, ...]
    grad_inputs: frozenset[fx.Node]

    @property
    def anchor(self) -> fx.Node:
        return self.nodes[-1]

    def spec(self, leaf: str) -> TensorSpec:
        """Shape and dtype at a leaf of the pattern."""
        return specs_of(self.bound[leaf])[0]

    @property
    def output(self) -> TensorSpec:
        """Shape and dtype of the (first) result."""
        return specs_of(self.anchor)[0]

    def cost(self, context: CostContext) -> KernelCost:
        """What this match costs for one batch."""
        return self.kernel.cost(self, context)


def _accept(candidate: Candidate) -> Rejection | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One entry of the library.

    name, family: the kernel, and the word that its matches are numbered under.
    summary: one line for the printed library.
    patterns: where it can lie; a larger pattern is preferred over all smaller ones.
    dtypes: all tensors that it reads or gives have one of these.
    cost: what a match costs.
    modes: the execution modes that have it.
    check: a reason for not taking a place that fits pattern, dtypes and mode; None to take it.
    sources: where its cost formula comes from.
    """

    name: str
    family: str
    summary: str
    patterns: tuple[Op, ...]
    cost: Callable[[Match, CostContext], KernelCost]
    dtypes: tuple[str, ...] = FLOATS
    modes: tuple[ExecutionMode, ...] = BOTH_MODES
    check: Callable[[Candidate], Rejection | None] = _accept
    sources: tuple[str, ...] = ()

    @property
    def is_free(self) -> bool:
        """True for kernels that move nothing and compute nothing (views, constants)."""
        return self.family == "shape"


def specs_of(node: fx.Node) -> tuple[TensorSpec, ...]:
    """Shapes and dtypes of a node's results."""
    value: Any = node.meta.get("val")
    return tensor_specs(value)

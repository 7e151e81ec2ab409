"""What matching and costs must know of a whole program.

Decides which nodes depend on the batch, which parameters a node stands for, and where gradients
pass. Reads the graph only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from openwafer.graph.program import Parameter, Program
from openwafer.kernels.kernel import FLOATS, specs_of
from openwafer.kernels.pattern import target_name

__all__ = ["GraphFacts", "constant_nodes", "graph_facts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """Facts by node.

    resident: nodes that do not depend on the batch; they are computed or held, never streamed in.
    parameters: for placeholders of weights, and for casts and views of them, the weights.
    gradients: nodes whose gradient a backward pass computes: float, downstream of a trainable
        weight, and upstream of the loss.
    """

    resident: frozenset[fx.Node]
    parameters: dict[fx.Node, tuple[Parameter, ...]]
    gradients: frozenset[fx.Node]


def graph_facts(program: Program, free: Collection[fx.Node]) -> GraphFacts:
    """`free` are the operations covered by kernels that compute nothing."""
    by_node = {parameter.node: parameter for parameter in program.parameters}
    batch = {entry.node for entry in program.inputs}
    trainable = {p.node for p in program.parameters if p.trainable}
    resident: set[fx.Node] = set()
    parameters: dict[fx.Node, tuple[Parameter, ...]] = {}
    differentiable: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        held = node.name not in batch and not _is_draw(node)
        if held and all(source in resident for source in sources):
            resident.add(node)
        if node.name in by_node:
            parameters[node] = (by_node[node.name],)
        elif node in free and node in resident:
            read = (parameter for source in sources for parameter in parameters.get(source, ()))
            parameters[node] = tuple(dict.fromkeys(read))
        reached = node.name in trainable or any(source in differentiable for source in sources)
        if reached and _is_float(node) and target_name(node) != "aten.detach.default":
            differentiable.add(node)
    return GraphFacts(
        resident=frozenset(resident),
        parameters=parameters,
        gradients=frozenset(_upstream_of_loss(program, differentiable)),
    )


def constant_nodes(program: Program) -> frozenset[fx.Node]:
    """Operations whose results no batch, no weight, no step and no random number changes: a mask of
    the future, the buckets of relative positions. They are computed once, before the run."""
    changing = {entry.node for entry in (*program.inputs, *program.parameters)}
    changing |= {buffer.node for buffer in program.buffers if buffer.update}
    moving: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.name in changing or _is_draw(node) or any(s in moving for s in sources):
            moving.add(node)
    return frozenset(node for node in program.operations if node not in moving)


def _upstream_of_loss(program: Program, differentiable: set[fx.Node]) -> set[fx.Node]:
    loss = next(node for node in program.graph.nodes if node.name == program.loss)
    reached: set[fx.Node] = set()
    waiting = [loss] if loss in differentiable else []
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        waiting.extend(source for source in node.all_input_nodes if source in differentiable)
    return reached


def _is_draw(node: fx.Node) -> bool:
    """Random numbers are new for every batch, even where they depend on no input."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_float(node: fx.Node) -> bool:
    return any(spec.dtype in (*FLOATS, "float64") for spec in specs_of(node))

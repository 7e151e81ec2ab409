"""A layer's backward pass in two parts: gradients of its inputs first, of its weights later.

Decides which operations each part runs, so that a zero-bubble schedule may put the second part off:
the first has all that the inputs' gradients depend on, the second has the rest and is given what
it needs of the first. Together they run each operation once, the same ones as the whole pass, so
that the gradients have the same bits. Does not decide when either runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from openwafer.runtime.lower import LayerFunctions, as_traced

__all__ = ["SplitBackward", "split_backward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBackward:
    """The two parts. Either graph is None where there is no such gradient."""

    functions: LayerFunctions
    inputs_graph: fx.GraphModule | None
    weights_graph: fx.GraphModule | None

    def inputs(
        self,
        weights: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
    ) -> tuple[Sequence[torch.Tensor | None], Sequence[Any]]:
        """Gradients of the inputs, and what `weights` is to be given."""
        if self.inputs_graph is None:
            return [None] * len(self.functions.grad_inputs), []
        held = as_traced(weights, self.functions.arguments[: self.functions.num_weights])
        incoming = as_traced(grad_outputs, self.functions.tangents)
        results = self.inputs_graph(*held, *saved, *incoming)
        count = len(self.functions.grad_inputs)
        return results[:count], results[count:]

    def weights(
        self, weights: Sequence[torch.Tensor], kept: Sequence[Any]
    ) -> Sequence[torch.Tensor | None]:
        """Gradients of the weights."""
        if self.weights_graph is None:
            return [None] * self.functions.num_weights
        held = as_traced(weights, self.functions.arguments[: self.functions.num_weights])
        return self.weights_graph(*held, *kept)


def split_backward(functions: LayerFunctions) -> SplitBackward:
    """Part the backward pass of a layer."""
    whole = functions.backward_graph
    if whole is None:
        return SplitBackward(functions=functions, inputs_graph=None, weights_graph=None)
    nodes = list(whole.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"]
    own, others = arguments[: functions.num_weights], arguments[functions.num_weights :]
    returned: Sequence[Any] = nodes[-1].args[0]
    grad_weights = list(returned[: functions.num_weights])
    grad_inputs = list(returned[functions.num_weights :])
    first = _needed_for(grad_inputs)
    # One element of an operation with several results is taken where the operation runs.
    first |= {n for n in nodes if n.target is operator.getitem and n.args[0] in first}
    second = _needed_for(grad_weights) - first
    read = {n for node in second for n in node.all_input_nodes}
    read |= {n for n in grad_weights if n is not None}
    kept = [node for node in nodes if node in read and (node in first or node in others)]
    weights_graph = None
    if any(node is not None for node in grad_weights):
        weights_graph = _part([*own, *kept], second, grad_weights, nodes)
    return SplitBackward(
        functions=functions,
        inputs_graph=_part(arguments, first, [*grad_inputs, *kept], nodes),
        weights_graph=weights_graph,
    )


def _needed_for(results: Sequence[Any]) -> set[fx.Node]:
    """All computing nodes that `results` depend on."""
    needed: set[fx.Node] = set()
    stack = [node for node in results if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in needed and node.op != "placeholder":
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _part(
    arguments: Sequence[fx.Node],
    inside: set[fx.Node],
    results: Sequence[fx.Node | None],
    order: Sequence[fx.Node],
) -> fx.GraphModule:
    """A function of `arguments` that computes `results` with the nodes in `inside`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"arg_{i}") for i, node in enumerate(arguments)}
    for node in order:
        if node in inside:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output([None if node is None else copies[node] for node in results])
    return fx.GraphModule({}, graph)

"""From a layer's joint graph to two pure functions.

Decides where the joint forward-backward graph (trace.py) is cut (design decision 4):

    forward(key, weights, inputs)          -> outputs, saved
    backward(weights, saved, grad_outputs) -> grad_weights, grad_inputs

Weights are arguments of both and never among `saved`: what the backward pass needs of a weight (a
transpose, a slice, a cast) is derived from the weight again. Does not decide when a layer runs or
where its weights are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from openwafer.graph.program import tensor_specs
from openwafer.runtime.randomness import (
    DrawKey,
    dropout_backward,
    has_keyed_draw,
    keyed_draw,
    keyed_dropout,
)
from openwafer.runtime.trace import JointGraph, TensorFact

__all__ = ["LayerFunctions", "as_traced", "cut_joint_graph", "memory_root"]

_aten = torch.ops.aten

_IDENTITIES = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)

_SILENT_VIEWS = (
    _aten._unsafe_view.default,
    _aten.unsafe_chunk.default,
    _aten.unsafe_split.Tensor,
    _aten.unsafe_split_with_sizes.default,
)
"""Operations whose results share memory with their argument although their schema is silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFunctions:
    """The compiled form of a layer's structure; one serves all its copies.

    arguments: facts of weights and inputs that the functions were traced for.
    tangents: of the gradients that backward takes.
    grad_weights, grad_inputs: for each weight and input, whether backward gives its gradient.
    grad_outputs: for each output, whether backward takes its gradient.
    saved_specs: text of what forward keeps for backward, per microbatch (shape and dtype).
    saved_bytes: its size; an input that is saved counts, since it must stay alive.
    num_draws: random draws in one forward pass; the next layer's keys begin after them.
    forward_graph, backward_graph: what is computed, operation by operation.
    run_forward, run_backward: what computes it: the graphs, or their compiled forms.
    """

    num_weights: int
    num_outputs: int
    arguments: tuple[TensorFact, ...]
    tangents: tuple[TensorFact, ...]
    grad_weights: tuple[bool, ...]
    grad_inputs: tuple[bool, ...]
    grad_outputs: tuple[bool, ...]
    saved_specs: tuple[str, ...]
    saved_bytes: int
    num_draws: int
    forward_graph: fx.GraphModule
    backward_graph: fx.GraphModule | None
    run_forward: Callable[..., Sequence[Any]]
    run_backward: Callable[..., Sequence[Any]] | None

    def forward(
        self, key: DrawKey, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Outputs, and what `backward` needs besides the weights."""
        results = self.run_forward(key, *as_traced([*weights, *inputs], self.arguments))
        return results[: self.num_outputs], results[self.num_outputs :]

    def backward(
        self,
        weights: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
    ) -> tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]]:
        """Gradients of weights and inputs, None where there is none.

        `grad_outputs` has one tensor for each output marked in `self.grad_outputs`.
        """
        if self.run_backward is None:
            return [None] * self.num_weights, [None] * len(self.grad_inputs)
        held = as_traced(weights, self.arguments[: self.num_weights])
        incoming = as_traced(grad_outputs, self.tangents)
        results = self.run_backward(*held, *saved, *incoming)
        return results[: self.num_weights], results[self.num_weights :]


def as_traced(tensors: Sequence[torch.Tensor], facts: Sequence[TensorFact]) -> list[torch.Tensor]:
    """The tensors in the dtype and memory layout of the trace, which its views rely on."""
    return [
        tensor
        if tensor.dtype == fact.dtype and (tensor.stride() == fact.strides or not fact.is_dense)
        else torch.empty_strided(
            fact.shape, fact.strides, dtype=fact.dtype, device=tensor.device
        ).copy_(tensor)
        for tensor, fact in zip(tensors, facts, strict=True)
    ]


def cut_joint_graph(
    joint: JointGraph,
    num_weights: int,
    arguments: Sequence[TensorFact],
    heads: Sequence[bool],
) -> LayerFunctions:
    """Cut a joint graph in two. `arguments`, `heads`: what it was traced for."""
    graph, num_outputs = joint.graph, joint.num_outputs
    draws = {node: i for i, node in enumerate(n for n in graph.nodes if _is_draw(n))}
    _drop_identities(graph)
    _merge_casts(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = placeholders[: joint.num_arguments]
    tangents = placeholders[joint.num_arguments :]
    returned: Sequence[Any] = graph.find_nodes(op="output")[0].args[0]
    outputs, grads = returned[:num_outputs], returned[num_outputs:]

    forward_nodes = _with_elements(graph, _needed_for(outputs))
    rederived = _weight_views(graph, inputs[:num_weights], forward_nodes)
    saved = _crossing(graph, grads, forward_nodes, rederived, inputs, num_weights)

    forward_graph = _extract(graph, inputs, [*outputs, *saved], forward_nodes, draws)
    backward_nodes = (_needed_for(grads, stop=set(saved)) - forward_nodes) | rederived
    backward_graph = None
    if any(grad is not None for grad in grads):
        backward_graph = _extract(
            graph, [*inputs[:num_weights], *saved, *tangents], list(grads), backward_nodes
        )
        _own_memory(backward_graph, num_weights)
    specs = [spec for node in saved for spec in tensor_specs(node.meta.get("val"))]
    return LayerFunctions(
        num_weights=num_weights,
        num_outputs=num_outputs,
        arguments=tuple(arguments),
        tangents=joint.tangents,
        grad_weights=tuple(grad is not None for grad in grads[:num_weights]),
        grad_inputs=tuple(grad is not None for grad in grads[num_weights:]),
        grad_outputs=tuple(heads),
        saved_specs=tuple(map(str, specs)),
        saved_bytes=sum(spec.num_bytes for spec in specs),
        num_draws=len(draws),
        forward_graph=forward_graph,
        backward_graph=backward_graph,
        run_forward=forward_graph,
        run_backward=backward_graph,
    )


def _is_draw(node: fx.Node) -> bool:
    if node.target is _aten.native_dropout.default:
        return node.args[2] is not False
    return has_keyed_draw(node.target)


def _drop_identities(graph: fx.Graph) -> None:
    """Below autograd a detach is its argument."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _merge_casts(graph: fx.Graph) -> None:
    """Autocast casts a value again for each operation that reads it: one copy is enough to keep.

    Casts to more bits and other operations that occur twice are left alone: what a backward pass
    computes again, it was written so in order not to keep.
    """
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is _aten._to_copy.default and _narrows(node):
            same = first.setdefault((node.args, tuple(sorted(node.kwargs.items()))), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def _narrows(node: fx.Node) -> bool:
    before, after = (n.meta["val"].dtype for n in (node.all_input_nodes[0], node))
    return after.itemsize < before.itemsize


def _needed_for(results: Sequence[Any], stop: set[fx.Node] | None = None) -> set[fx.Node]:
    """All computing nodes that `results` depend on, without going past `stop`."""
    stop = stop or set()
    needed: set[fx.Node] = set()
    stack = [node for node in results if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in needed or node in stop or node.op == "placeholder":
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
    return needed


def _with_elements(graph: fx.Graph, nodes: set[fx.Node]) -> set[fx.Node]:
    """`nodes`, and the elements of those that have several results."""
    elements = {
        node for node in graph.nodes if node.target is operator.getitem and node.args[0] in nodes
    }
    return nodes | elements


def _shares_memory(node: fx.Node) -> bool:
    """Whether a result is a view of the first argument (or one element of such a result)."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or node.target in _SILENT_VIEWS:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info for result in schema.returns)


def _weight_views(
    graph: fx.Graph, weights: Sequence[fx.Node], forward_nodes: set[fx.Node]
) -> set[fx.Node]:
    """Forward nodes that are views or casts of weights alone: cheap to have a second time."""
    derived: set[fx.Node] = set()
    sources = set(weights)
    for node in graph.nodes:
        if (
            node in forward_nodes
            and (_shares_memory(node) or node.target is _aten._to_copy.default)
            and all(argument in sources for argument in node.all_input_nodes)
        ):
            derived.add(node)
            sources.add(node)
    return derived


def _crossing(
    graph: fx.Graph,
    grads: Sequence[Any],
    forward_nodes: set[fx.Node],
    rederived: set[fx.Node],
    arguments: Sequence[fx.Node],
    num_weights: int,
) -> list[fx.Node]:
    """What the backward pass reads of the forward pass, in graph order, weights left out.

    One element of a forward node with several results is taken as that element.
    """
    backward = _needed_for(grads, stop=forward_nodes)
    weights = set(arguments[:num_weights])
    available = forward_nodes | set(arguments)
    read: set[fx.Node] = {n for n in grads if isinstance(n, fx.Node) and n in available}
    for node in backward:
        read.update(argument for argument in node.all_input_nodes if argument in available)
    read -= rederived | weights
    return [node for node in graph.nodes if node in read]


def _extract(
    graph: fx.Graph,
    arguments: Sequence[fx.Node],
    results: Sequence[fx.Node | None],
    inside: set[fx.Node],
    draws: Mapping[fx.Node, int] | None = None,
) -> fx.GraphModule:
    """A function of `arguments` that computes `results` with the nodes in `inside`; with `draws`,
    of a draw key before them, and with that draw's number for each random operation."""
    extracted = fx.Graph()
    key = None if draws is None else extracted.placeholder("key")
    environment: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(arguments):
        environment[node] = extracted.placeholder(f"arg_{index}")
    for node in graph.nodes:
        if node not in inside or node in environment:
            continue
        if draws and key is not None and node in draws:
            environment[node] = _keyed(extracted, key, draws[node], node, environment)
            continue
        _refuse_other_randomness(node)
        environment[node] = copy = extracted.node_copy(node, lambda n: environment[n])
        if copy.target is _aten.native_dropout_backward.default:
            copy.target = dropout_backward
    extracted.output([None if node is None else environment[node] for node in results])
    extracted.eliminate_dead_code()
    return fx.GraphModule({}, extracted)


def _own_memory(module: fx.GraphModule, num_weights: int) -> None:
    """Give every weight's gradient memory of its own, since updates work on it in place.

    A gradient may be an argument passed through, or show the same memory as another result.
    """
    output = module.graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    roots = [None if node is None else memory_root(node) for node in results]
    for index in range(num_weights):
        root = roots[index]
        if root is None or (root.op != "placeholder" and roots.count(root) == 1):
            continue
        with module.graph.inserting_before(output):
            results[index] = module.graph.call_function(_aten.clone.default, (results[index],))
    output.args = (results,)
    module.recompile()


def memory_root(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while _shares_memory(node) and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and not _shares_memory(source):
            return node
        node = source
    return node


def _keyed(
    extracted: fx.Graph,
    key: fx.Node,
    offset: int,
    node: fx.Node,
    environment: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """The keyed draw in place of one of torch's random operations."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: environment[n])
    if node.target is _aten.native_dropout.default:
        drawn = extracted.call_function(keyed_dropout, (key, offset, args[0], args[1]))
    else:
        given: Any = (key, offset, node.target, *args)
        drawn = extracted.call_function(keyed_draw, given, kwargs)
    drawn.meta = dict(node.meta)
    return drawn


def _refuse_other_randomness(node: fx.Node) -> None:
    """Kernels refuse random operations without a keyed draw; attention without dropout is none."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return
    if target is _aten.native_dropout.default:
        return
    named = {argument.name: i for i, argument in enumerate(target._schema.arguments)}
    position = named.get("dropout_p")
    assert position is not None, f"no keyed draw for {target}"
    given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    assert given == 0.0, f"no keyed draw for {target} with dropout"

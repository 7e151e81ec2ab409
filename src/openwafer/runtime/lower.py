"""From a layer of the Program to two pure functions.

Decides how a layer's joint forward-backward graph is made and where it is cut (design decision 4):

    forward(key, weights, inputs)          -> outputs, saved
    backward(weights, saved, grad_outputs) -> grad_weights, grad_inputs

Weights are arguments of both and never among `saved`: what the backward pass needs of a weight (a
transpose, a cast) is derived from the weight again. Does not decide when a layer runs or where its
weights are.

The joint graph comes from torch's own tracer (`make_fx` over `torch.autograd.grad`), functional
and below autograd and autocast, so it holds exactly the kernels that eager PyTorch would call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from openwafer.graph.program import Program, tensor_specs
from openwafer.plan.layers import Layer, differentiable_nodes
from openwafer.runtime.randomness import DrawKey, draw_bernoulli, keyed_dropout

__all__ = ["LayerFunctions", "lower_layer"]

_aten = torch.ops.aten

_IDENTITIES = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)

_CHEAP_VIEWS = frozenset(
    {
        _aten.t.default,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.reshape.default,
        _aten.expand.default,
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.default,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten._to_copy.default,
    }
)
"""What may be derived from a weight a second time instead of being saved."""


_DRAWS = (draw_bernoulli, keyed_dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFunctions:
    """The compiled form of a layer's structure; one serves all its copies.

    grad_weights, grad_inputs: for each weight and input, whether backward gives its gradient.
    grad_outputs: for each output, whether backward takes its gradient.
    saved_specs: text of what forward keeps for backward, per microbatch (shape and dtype).
    saved_bytes: its size; an input that is saved counts, since it must stay alive.
    num_draws: random draws in one forward pass; the next layer's keys begin after them.
    """

    num_weights: int
    num_outputs: int
    grad_weights: tuple[bool, ...]
    grad_inputs: tuple[bool, ...]
    grad_outputs: tuple[bool, ...]
    saved_specs: tuple[str, ...]
    saved_bytes: int
    num_draws: int
    forward_graph: fx.GraphModule
    backward_graph: fx.GraphModule | None

    def forward(
        self, key: DrawKey, weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Outputs, and what `backward` needs besides the weights."""
        results = self.forward_graph(key, *weights, *inputs)
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
        if self.backward_graph is None:
            return [None] * self.num_weights, [None] * len(self.grad_inputs)
        results = self.backward_graph(*weights, *saved, *grad_outputs)
        return results[: self.num_weights], results[self.num_weights :]


Autocast = Callable[[], AbstractContextManager[Any]]


def lower_layer(
    program: Program, layer: Layer, *, autocast: Autocast | None = None
) -> LayerFunctions:
    """Trace a layer (shapes and dtypes alone, nothing is computed) and cut it in two.

    Args:
        autocast: makes the context that inserts the casts of mixed precision.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    weight_nodes = [_weight_node(program, name) for name in layer.parameters]
    input_nodes = [*layer.buffers, *layer.inputs]
    arguments = [*weight_nodes, *input_nodes]
    differentiable = differentiable_nodes(program) if program.training else frozenset[str]()
    run = _layer_callable(nodes, layer, arguments)
    fake_mode = _fake_mode(nodes, arguments)
    examples = [nodes[name].meta["val"] for name in arguments]
    wants_grad = [name in differentiable for name in arguments]
    traced = _trace_joint(run, examples, wants_grad, fake_mode, autocast)
    return _cut(traced, len(weight_nodes))


def _weight_node(program: Program, name: str) -> str:
    return next(p.node for p in program.parameters if p.name == name)


def _fake_mode(nodes: Mapping[str, fx.Node], arguments: Sequence[str]) -> FakeTensorMode:
    for name in arguments:
        mode = getattr(nodes[name].meta["val"], "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode()


def _layer_callable(
    nodes: Mapping[str, fx.Node], layer: Layer, arguments: Sequence[str]
) -> Callable[..., list[torch.Tensor]]:
    """The layer's operations as a function of its weights, buffers and inputs."""
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    for name in arguments:
        environment[nodes[name]] = graph.placeholder(name)
    for name in layer.nodes:
        source = nodes[name]
        environment[source] = graph.node_copy(source, lambda n: environment[n])
    graph.output([environment[nodes[name]] for name in layer.outputs])
    return fx.GraphModule({}, graph)


@dataclass(frozen=True, slots=True)
class _Traced:
    """A joint graph: placeholders weights, inputs, tangents; outputs, then gradients."""

    graph: fx.Graph
    num_arguments: int
    gives_grad: tuple[bool, ...]


def _trace_joint(
    run: Callable[..., list[torch.Tensor]],
    examples: Sequence[torch.Tensor],
    wants_grad: Sequence[bool],
    fake_mode: FakeTensorMode,
    autocast: Autocast | None,
) -> _Traced:
    def forward(arguments: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
        leaves = [
            value.detach().requires_grad_(wanted)
            for value, wanted in zip(arguments, wants_grad, strict=True)
        ]
        with autocast() if autocast else nullcontext():
            return leaves, list(run(*leaves))

    def joint(arguments: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[Any]:
        with torch.enable_grad():
            leaves, outputs = forward(arguments)
            heads = [output for output in outputs if output.requires_grad]
            roots = [leaf for leaf in leaves if leaf.requires_grad]
            grads = torch.autograd.grad(heads, roots, tangents, allow_unused=True) if heads else ()
        found = iter(grads)
        all_grads = [next(found, None) if leaf.requires_grad else None for leaf in leaves]
        return [*(output.detach() for output in outputs), *all_grads]

    with fake_mode, torch.enable_grad():
        _, outputs = forward(examples)
        gives_grad = tuple(output.requires_grad for output in outputs)
    with fake_mode, torch.no_grad():
        tangents = [torch.empty_like(output) for output in outputs if output.requires_grad]
        module = make_fx(joint)(list(examples), tangents)
        if any(_mutates(node) for node in module.graph.nodes):
            # Some composites (attention's dropout on CPU) work in place inside.
            module = make_fx(functionalize(module, remove="mutations"))(list(examples), tangents)
    return _Traced(module.graph, len(examples), gives_grad)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _cut(traced: _Traced, num_weights: int) -> LayerFunctions:
    graph, num_outputs = traced.graph, len(traced.gives_grad)
    _drop_identities(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    arguments = placeholders[: traced.num_arguments]
    tangents = placeholders[traced.num_arguments :]
    returned: Sequence[Any] = graph.find_nodes(op="output")[0].args[0]
    outputs, grads = returned[:num_outputs], returned[num_outputs:]

    forward_nodes = _needed_for(outputs)
    rederived = _weight_views(graph, arguments[:num_weights], forward_nodes)
    saved = _crossing(graph, grads, forward_nodes, rederived, arguments, num_weights)

    forward_graph = _extract(graph, [*arguments], [*outputs, *saved], forward_nodes, with_key=True)
    backward_nodes = (_needed_for(grads, stop=set(saved)) - forward_nodes) | rederived
    backward_graph = None
    if any(grad is not None for grad in grads):
        backward_graph = _extract(
            graph, [*arguments[:num_weights], *saved, *tangents], list(grads), backward_nodes
        )
        _own_memory(backward_graph, num_weights)
    specs = [spec for node in saved for spec in tensor_specs(node.meta.get("val"))]
    return LayerFunctions(
        num_weights=num_weights,
        num_outputs=num_outputs,
        grad_weights=tuple(grad is not None for grad in grads[:num_weights]),
        grad_inputs=tuple(grad is not None for grad in grads[num_weights:]),
        grad_outputs=traced.gives_grad,
        saved_specs=tuple(map(str, specs)),
        saved_bytes=sum(spec.num_bytes for spec in specs),
        num_draws=sum(n.target in _DRAWS for n in forward_graph.graph.nodes),
        forward_graph=forward_graph,
        backward_graph=backward_graph,
    )


def _drop_identities(graph: fx.Graph) -> None:
    """Below autograd a detach is its argument."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


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


def _weight_views(
    graph: fx.Graph, weights: Sequence[fx.Node], forward_nodes: set[fx.Node]
) -> set[fx.Node]:
    """Forward nodes that are views or casts of weights alone."""
    derived: set[fx.Node] = set()
    sources = set(weights)
    for node in graph.nodes:
        if (
            node in forward_nodes
            and node.target in _CHEAP_VIEWS
            and all(arg in sources for arg in node.all_input_nodes)
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
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.args[0] in forward_nodes:
            forward_nodes.add(node)
    backward = _needed_for(grads, stop=forward_nodes)
    weights = set(arguments[:num_weights])
    available = forward_nodes | set(arguments)
    read: set[fx.Node] = {n for n in grads if isinstance(n, fx.Node) and n in available}
    for node in backward:
        read.update(arg for arg in node.all_input_nodes if arg in available)
    read -= rederived | weights
    return [node for node in graph.nodes if node in read]


def _extract(
    graph: fx.Graph,
    arguments: Sequence[fx.Node],
    results: Sequence[fx.Node | None],
    inside: set[fx.Node],
    *,
    with_key: bool = False,
) -> fx.GraphModule:
    """A function of `arguments` that computes `results` with the nodes in `inside`."""
    extracted = fx.Graph()
    key = extracted.placeholder("key") if with_key else None
    environment: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(arguments):
        environment[node] = extracted.placeholder(f"arg_{index}")
    offset = 0
    for node in graph.nodes:
        if node not in inside or node in environment:
            continue
        drawn = _keyed(extracted, key, offset, node, environment) if key else None
        offset += drawn is not None
        environment[node] = drawn or extracted.node_copy(node, lambda n: environment[n])
    extracted.output([None if node is None else environment[node] for node in results])
    extracted.eliminate_dead_code()
    return fx.GraphModule({}, extracted)


def _own_memory(module: fx.GraphModule, num_weights: int) -> None:
    """Give every weight's gradient memory of its own, since updates work on it in place.

    A gradient may be an argument passed through, or the same tensor as another result.
    """
    output = module.graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    roots = [None if node is None else _root(node) for node in results]
    for index in range(num_weights):
        root = roots[index]
        if root is None or (root.op != "placeholder" and roots.count(root) == 1):
            continue
        with module.graph.inserting_before(output):
            results[index] = module.graph.call_function(_aten.clone.default, (results[index],))
    output.args = (results,)
    module.recompile()


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while node.op == "call_function" and node.target in _CHEAP_VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _keyed(
    extracted: fx.Graph,
    key: fx.Node,
    offset: int,
    node: fx.Node,
    environment: Mapping[fx.Node, fx.Node],
) -> fx.Node | None:
    """The keyed draw in place of one of torch's random operations; None for any other node."""
    if node.target is _aten.native_dropout.default and node.args[2] is not False:
        value, probability = environment[node.args[0]], node.args[1]  # pyright: ignore
        return extracted.call_function(keyed_dropout, (key, offset, value, probability))
    if node.target in (_aten.bernoulli.p, _aten.bernoulli_.float):
        value = environment[node.args[0]]  # pyright: ignore
        probability = node.args[1] if len(node.args) > 1 else 0.5
        return extracted.call_function(draw_bernoulli, (key, offset, value, probability))
    tags = getattr(node.target, "tags", ())
    assert torch.Tag.nondeterministic_seeded not in tags, f"no keyed draw for {node.target}"
    return None

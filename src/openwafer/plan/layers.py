"""Where the model is cut into layers.

Decides which operations form a layer, what crosses its boundary, and which layers are copies of one
another. A layer is a contiguous range of operations in the order the model runs them, so any cut
is valid, with skips and several inputs too. Does not decide what a layer costs or when it runs.

The rule: a new layer begins with each element of a module list (`h.0`, `h.1`, ...) that holds
weights, and with each other module that does; everything else joins the layer it follows.
Neighbours outside any list are joined when one of them has no matrix product (two embeddings; a
final norm and the head). A list element that holds more than half of all weights is cut at the next
list inside.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from openwafer.graph.program import Program, TensorSpec, site_of, tensor_specs
from openwafer.graph.text import node_text, sha256_of

__all__ = ["Layer", "cut_layers"]

_MATRIX_PRODUCTS = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear"),
    *("conv", "lstm", "gru", "rnn", "scaled_dot_product"),
)
"""Beginnings of the names of operations whose work is matrix products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A contiguous range of a Program's operations, run as one function.

    name: the module path that its weights share, or the first and last one.
    nodes: its operations, in order.
    parameters: state_dict names it reads; a tied weight is listed by each layer that reads it.
    buffers: placeholder nodes of the buffers and constants it reads.
    inputs: nodes it reads from the batch or from earlier layers.
    outputs: its nodes that later layers, the loss, a metric or a buffer update need.
    structure: hash of everything but names; equal for copies.
    input_bytes, output_bytes: activations that cross its boundary in one forward pass of the
        example batch.
    """

    name: str
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    structure: str
    input_bytes: int
    output_bytes: int


def cut_layers(program: Program) -> tuple[Layer, ...]:
    """The layers of a Program, in execution order; together they hold every operation once."""
    segments = _segments(program)
    facts = _Facts.of(program)
    layers = [_layer(program, facts, name, nodes) for name, nodes in segments]
    return tuple(_unique_names(layers))


def _differentiable(program: Program) -> frozenset[str]:
    """Names of the nodes that some trainable weight has an influence on."""
    trainable = {p.node for p in program.parameters if p.trainable}
    reached: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in trainable:
            reached.add(node.name)
        elif node.op == "call_function":
            if node.target is torch.ops.aten.detach.default:
                continue
            floating = any(s.torch_dtype.is_floating_point for s in tensor_specs(node.meta["val"]))
            if floating and any(arg.name in reached for arg in node.all_input_nodes):
                reached.add(node.name)
    return frozenset(reached)


@dataclass(frozen=True, slots=True)
class _Facts:
    """Look-ups shared by all layers of one Program."""

    parameter_of: Mapping[str, str]
    buffer_nodes: frozenset[str]
    wanted: frozenset[str]
    differentiable: frozenset[str]
    node_of: Mapping[str, fx.Node]

    @classmethod
    def of(cls, program: Program) -> _Facts:
        updates = {b.update for b in program.buffers if b.update}
        metrics = {node for metric in program.metrics for node in metric.nodes}
        return cls(
            parameter_of={p.node: p.name for p in program.parameters},
            buffer_nodes=frozenset(b.node for b in program.buffers),
            wanted=frozenset({program.loss} | updates | metrics),
            differentiable=_differentiable(program),
            node_of={node.name: node for node in program.graph.nodes},
        )


_Segment = tuple[str, list[fx.Node]]


def _segments(program: Program) -> list[_Segment]:
    weights = {p.node: p.spec.numel for p in program.parameters}
    depths = _cut_depths(program, weights)
    holders = _holders(program, weights, depths)
    segments: list[_Segment] = []
    for node in program.operations:
        module = _module_of(node)
        anchor = _anchor(module, depths) or module
        reads_weights = any(arg.name in weights for arg in node.all_input_nodes)
        is_part = node.target is operator.getitem  # of the result before it
        begins = anchor in holders or (reads_weights and _anchor(module, depths) is None)
        name = (anchor or "(top)") if begins else "(inputs)"
        if segments and (is_part or not begins or name == segments[-1][0]):
            segments[-1][1].append(node)
        else:
            segments.append((name, [node]))
    return _join_leading(_join_unlisted(segments, depths), weights)


def _holders(
    program: Program, weights: Mapping[str, int], depths: Mapping[str, int]
) -> frozenset[str]:
    """List elements that hold weights, and modules outside lists that do and have no modules
    inside: what is cut out whole."""
    modules = {_module_of(node) for node in program.operations}
    parents = {
        module[:position]
        for module in modules
        for position, character in enumerate(module)
        if character == "."
    }
    found: set[str] = set()
    for node in program.operations:
        if any(arg.name in weights for arg in node.all_input_nodes):
            module = _module_of(node)
            element = _anchor(module, depths)
            if element is not None:
                found.add(element)
            elif module and module not in parents:
                found.add(module)
    return frozenset(found)


def _module_of(node: fx.Node) -> str:
    """The module an operation belongs to; a parametrized weight is made in the module it is of."""
    return site_of(node).module.partition(".parametrizations.")[0]


def _anchor(module: str, depths: Mapping[str, int]) -> str | None:
    """The list element that a module path lies in: the path up to its first number, or a later one
    where the element at the first was found too large."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return None
    index = 0
    while index + 1 < len(numbers) and depths.get(".".join(parts[: numbers[index] + 1]), 0):
        index += 1
    return ".".join(parts[: numbers[index] + 1])


def _cut_depths(program: Program, weights: Mapping[str, int]) -> dict[str, int]:
    """List elements that hold more than half of all weights and contain a list themselves."""
    held: dict[str, set[str]] = {}
    nested: set[str] = set()
    for node in program.operations:
        parts = _module_of(node).split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        read = {arg.name for arg in node.all_input_nodes if arg.name in weights}
        for order, position in enumerate(numbers):
            prefix = ".".join(parts[: position + 1])
            held.setdefault(prefix, set()).update(read)
            if order + 1 < len(numbers):
                nested.add(prefix)
    total = sum(weights.values())
    return {
        prefix: 1
        for prefix, names in held.items()
        if prefix in nested and 2 * sum(weights[name] for name in names) > total
    }


def _join_unlisted(segments: list[_Segment], depths: Mapping[str, int]) -> list[_Segment]:
    """Join neighbours outside any list where one of the two has no matrix product."""
    joined: list[_Segment] = []
    for name, nodes in segments:
        both_unlisted = joined and not (
            _anchor(name, depths) or _anchor(joined[-1][0].split(" … ")[-1], depths)
        )
        if both_unlisted and not (_has_product(nodes) and _has_product(joined[-1][1])):
            first = joined[-1][0]
            label = name if first == "(inputs)" else f"{first.split(' … ')[0]} … {name}"
            joined[-1] = (label, joined[-1][1] + nodes)
        else:
            joined.append((name, list(nodes)))
    return joined


def _join_leading(segments: list[_Segment], weights: Mapping[str, int]) -> list[_Segment]:
    """Operations on the batch alone, before any weight, belong to the first layer with weights."""
    if len(segments) > 1 and not any(
        arg.name in weights for node in segments[0][1] for arg in node.all_input_nodes
    ):
        (_, leading), (name, nodes), *rest = segments
        return [(name, leading + nodes), *rest]
    return segments


def _has_product(nodes: Sequence[fx.Node]) -> bool:
    names = {str(node.target).removeprefix("aten.").split(".")[0] for node in nodes}
    return any(name.startswith(product) for name in names for product in _MATRIX_PRODUCTS)


def _layer(program: Program, facts: _Facts, name: str, nodes: Sequence[fx.Node]) -> Layer:
    inside = {node.name for node in nodes}
    read = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes))
    parameters = [a.name for a in read if a.name in facts.parameter_of]
    buffers = [a.name for a in read if a.name in facts.buffer_nodes]
    known = {*parameters, *buffers, *inside}
    inputs = [a.name for a in read if a.name not in known]
    outputs = [
        node.name
        for node in nodes
        if node.name in facts.wanted
        or any(u.op == "call_function" and u.name not in inside for u in node.users)
    ]
    order = [*parameters, *buffers, *inputs]
    return Layer(
        name=name,
        nodes=tuple(node.name for node in nodes),
        parameters=tuple(facts.parameter_of[node] for node in parameters),
        buffers=tuple(buffers),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        structure=_structure(facts, order, nodes, outputs),
        input_bytes=_bytes(facts, inputs),
        output_bytes=_bytes(facts, outputs),
    )


def _bytes(facts: _Facts, names: Sequence[str]) -> int:
    return sum(
        spec.num_bytes
        for name in names
        for spec in tensor_specs(facts.node_of[name].meta.get("val"))
    )


def _structure(
    facts: _Facts, arguments: Sequence[str], nodes: Sequence[fx.Node], outputs: Sequence[str]
) -> str:
    """Hash of the layer with its nodes numbered by position, so that names do not matter."""
    number = {name: f"%{i}" for i, name in enumerate([*arguments, *(n.name for n in nodes)])}
    lines = [
        f"{number[name]} : {', '.join(map(str, _specs(facts, name)))}"
        f" grad={name in facts.differentiable} weight={name in facts.parameter_of}"
        for name in arguments
    ]
    lines += [node_text(node, lambda n: number[n.name]) for node in nodes]
    lines += [f"out {number[name]} grad={name in facts.differentiable}" for name in outputs]
    return sha256_of("\n".join(lines))


def _specs(facts: _Facts, name: str) -> tuple[TensorSpec, ...]:
    return tensor_specs(facts.node_of[name].meta.get("val"))


def _unique_names(layers: Sequence[Layer]) -> Iterator[Layer]:
    """A module that runs twice gives two layers; the second is called `name#2`."""
    seen: dict[str, int] = {}
    for layer in layers:
        count = seen[layer.name] = seen.get(layer.name, 0) + 1
        yield layer if count == 1 else replace(layer, name=f"{layer.name}#{count}")

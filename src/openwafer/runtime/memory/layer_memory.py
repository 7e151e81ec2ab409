"""How much device memory each layer takes, from the graphs that it was lowered to.

Decides which blocks of memory a layer's functions make, how long each is alive, and which of them
the saved tensors show. Does not decide what a step adds up to (step_memory.py).

A compiled form of a layer has fewer temporaries than its graph, and none that the graph lacks; what
an operation takes inside shows in neither.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from openwafer.graph.program import tensor_specs
from openwafer.runtime.compiled import CompiledLayer, CompiledModel
from openwafer.runtime.lower import LayerFunctions, memory_root

__all__ = ["LayerMemory", "ModelMemory", "model_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """Bytes of one layer; all but weights and gradients are for one microbatch.

    weight_bytes: as they are streamed. gradient_bytes: the sums in fp32, by weight.
    saved_values: values that its saved tensors show; saved_bytes: what they take besides.
    inputs, outputs, spent: see `Layer` and `CompiledLayer`.
    grad_outputs, grad_inputs: values whose gradients backward takes, and gives.
    forward_peak, backward_peak: the most that is alive of what a function makes, its results
        included.
    """

    name: str
    weight_bytes: int
    gradient_bytes: Mapping[str, int]
    saved_values: tuple[str, ...]
    saved_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]
    grad_outputs: tuple[str, ...]
    grad_inputs: tuple[str, ...]
    forward_peak: int
    backward_peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """The layers of a model; `value_bytes` by node, `batch` the nodes of the batch's entries."""

    layers: tuple[LayerMemory, ...]
    value_bytes: Mapping[str, int]
    batch: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What copies of a layer share. shown: arguments (from 0: buffers, then inputs) and outputs
    (-1 is the first) whose memory saved tensors show."""

    shown: tuple[int, ...]
    saved_bytes: int
    forward_peak: int
    backward_peak: int


def model_memory(model: CompiledModel) -> ModelMemory:
    """The sizes of every layer; what copies share is worked out once."""
    trained = {p.name for p in model.program.parameters if p.trainable}
    forms: dict[int, _Form] = {}
    layers: list[LayerMemory] = []
    for compiled in model.layers:
        functions = compiled.functions
        form = forms.setdefault(id(functions), _form(functions))
        layers.append(_layer(compiled, form, trained))
    return ModelMemory(
        layers=tuple(layers),
        value_bytes={node.name: _node_bytes(node) for node in model.program.graph.nodes},
        batch=tuple(entry.node for entry in model.program.inputs),
    )


def _layer(compiled: CompiledLayer, form: _Form, trained: set[str]) -> LayerMemory:
    layer, functions = compiled.layer, compiled.functions
    read = [*layer.buffers, *layer.inputs]
    shapes = {
        name: fact.shape for name, fact in zip(layer.parameters, functions.arguments, strict=False)
    }
    shown = [read[i] if i >= 0 else layer.outputs[-1 - i] for i in form.shown]
    return LayerMemory(
        name=layer.name,
        weight_bytes=sum(prod(shapes[w.name]) * w.dtype.itemsize for w in compiled.streamed),
        gradient_bytes={
            name: 4 * prod(shapes[name])
            for name, given in zip(layer.parameters, functions.grad_weights, strict=True)
            if given and name in trained
        },
        saved_values=tuple(name for name in shown if name not in layer.buffers),
        saved_bytes=form.saved_bytes,
        inputs=layer.inputs,
        outputs=layer.outputs,
        spent=compiled.spent,
        grad_outputs=_chosen(layer.outputs, functions.grad_outputs),
        grad_inputs=_chosen(read, functions.grad_inputs),
        forward_peak=form.forward_peak,
        backward_peak=form.backward_peak,
    )


def _chosen(names: Sequence[str], marks: Sequence[bool]) -> tuple[str, ...]:
    return tuple(name for name, mark in zip(names, marks, strict=True) if mark)


def _form(functions: LayerFunctions) -> _Form:
    graph = functions.forward_graph.graph
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    first = 1 + functions.num_weights  # after the draw key
    results = _results(graph)
    outputs = [memory_root(node) for node in results[: functions.num_outputs]]
    shown: dict[int, None] = {}
    own: dict[fx.Node, None] = {}
    for node in results[functions.num_outputs :]:
        root = memory_root(node)
        if root in outputs:
            shown[-1 - outputs.index(root)] = None
        elif root in arguments:
            shown[arguments.index(root) - first] = None
        else:
            own[root] = None
    backward = functions.backward_graph
    return _Form(
        shown=tuple(i for i in shown if i < 0 or i < len(arguments)),
        saved_bytes=sum(map(_node_bytes, own)),
        forward_peak=_peak_bytes(graph),
        backward_peak=_peak_bytes(backward.graph) if backward is not None else 0,
    )


def _results(graph: fx.Graph) -> list[fx.Node]:
    output: Any = graph.find_nodes(op="output")[0]
    return [node for node in output.args[0] if isinstance(node, fx.Node)]


def _peak_bytes(graph: fx.Graph) -> int:
    """The most bytes alive at a time of what the graph makes; results stay alive to the end."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in graph.nodes:
        root = memory_root(node)
        last[root] = max(last.get(root, 0), order[node], *(order[user] for user in node.users))
    ends: dict[int, int] = {}
    alive = peak = 0
    for node, position in order.items():
        if node.op == "call_function" and memory_root(node) is node:
            # Of an operation with several results, each that is used is a node of its own.
            several = any(user.target is operator.getitem for user in node.users)
            size = 0 if several else _node_bytes(node)
            alive += size
            peak = max(peak, alive)
            ends[last[node]] = ends.get(last[node], 0) + size
        alive -= ends.pop(position, 0)
    return peak


def _node_bytes(node: fx.Node) -> int:
    return sum(spec.num_bytes for spec in tensor_specs(node.meta.get("val")))

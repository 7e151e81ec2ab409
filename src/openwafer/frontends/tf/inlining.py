"""Functions that are called in a graph, put in the place of their calls.

Decides which calls: `tf.function` always, a condition where its predicate is a constant (Keras
layers that are called without `training` have one). A condition on values stays, and is refused
like any operation that is not taken. Does not decide what becomes of the operations.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = ["Bodies", "inline_calls"]

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_CONDITIONS = ("If", "StatelessIf")


@dataclass(slots=True)
class Bodies:
    """What stands for calls.

    results: of a call, the tensors of its body that are its outputs. callers: of an operation in a
    body, the call.
    """

    results: dict[Any, list[Any]] = field(default_factory=dict[Any, list[Any]])
    callers: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def sources(self, operation: Any) -> list[Any]:
        """What an operation reads; a call, the results of its body."""
        found = self.results.get(operation)
        return list(operation.inputs) if found is None else found

    def ancestors(self, tensors: Iterable[Any]) -> set[Any]:
        """The operations that `tensors` are computed from, calls and their bodies among them."""
        found: set[Any] = set()
        waiting = [tensor.op for tensor in tensors]
        while waiting:
            operation = waiting.pop()
            if operation not in found:
                found.add(operation)
                waiting += [tensor.op for tensor in self.sources(operation)]
        return found


def inline_calls(graph: Any, tensors: Iterable[Any]) -> Bodies:
    """Copy into `graph` the functions that `tensors` are computed by."""
    wanted, bodies = list(tensors), Bodies()
    while True:
        open_calls = {
            operation: name
            for operation in bodies.ancestors(wanted)
            if operation not in bodies.results and (name := _function_of(operation))
        }
        if not open_calls:
            return bodies
        for operation in sorted(open_calls, key=lambda call: str(call.name)):
            _inline(graph, operation, open_calls[operation], bodies)


def _function_of(operation: Any) -> str:
    """Name of the function that a call runs; empty where that is no call, or not known yet."""
    if operation.type in _CALLS:
        return str(operation.get_attr("f").name)
    if operation.type not in _CONDITIONS:
        return ""
    predicate = operation.inputs[0]
    if predicate.op.type == "PlaceholderWithDefault":
        predicate = predicate.op.inputs[0]
    value = tf.get_static_value(predicate)
    if value is None:
        return ""
    return str(operation.get_attr("then_branch" if value else "else_branch").name)


def _inline(graph: Any, call: Any, name: str, bodies: Bodies) -> None:
    # No public function gives a graph's functions as graphs.
    converter: Any = importlib.import_module("tensorflow.python.framework.function_def_to_graph")
    library = graph.as_graph_def().library
    definition = next(f for f in library.function if f.signature.name == name)
    arguments = list(call.inputs)[1:] if call.type in _CONDITIONS else list(call.inputs)
    before = len(graph.get_operations())
    with graph.as_default():
        body = converter.function_def_to_graph(definition)
        places = {p.name: value for p, value in zip(body.inputs, arguments, strict=True)}
        names = [tensor.name for tensor in body.outputs]
        bodies.results[call] = tf.import_graph_def(
            body.as_graph_def(), input_map=places, return_elements=names, name=f"{call.name}/body"
        )
    for operation in graph.get_operations()[before:]:
        bodies.callers[operation] = call

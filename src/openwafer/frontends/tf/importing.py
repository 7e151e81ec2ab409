"""From a model's graph in TensorFlow to the operations that the compiler is given.

Decides which operations belong to the model (all that the loss and the other wanted tensors are
computed from), which tensors are constants, and which are variables. Does not decide what an
operation computes (ops/) or whether it is taken (lowering.py).

A tensor that depends on no batch, no variable and no random number is a constant, shapes of tensors
included. TensorFlow computes those that are read; most of what Keras layers emit around a reshape
or a mask goes away here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from openwafer.frontends.tf.inlining import Bodies, inline_calls
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import ModelGraph
from openwafer.frontends.tf.nodes import Array, BufferUpdate, Node, TensorGraph, VariableInfo
from openwafer.frontends.tf.places import ModulePaths, site_of_operation

__all__ = ["ancestors", "handle_names", "import_graph"]

_HANDLES = ("VarHandleOp", "VariableV2", "Variable")
_READS = ("ReadVariableOp",)
_SHAPES = ("Shape", "ShapeN", "Size", "Rank")


def ancestors(tensors: Iterable[Any], *, control: bool = False) -> set[Any]:
    """The operations that `tensors` (or operations) are computed from, with those that only have to
    run before them if `control` is set."""
    found: set[Any] = set()
    waiting = [getattr(tensor, "op", tensor) for tensor in tensors]
    while waiting:
        operation = waiting.pop()
        if operation in found:
            continue
        found.add(operation)
        waiting += [tensor.op for tensor in operation.inputs]
        if control:
            waiting += list(operation.control_inputs)
    return found


def handle_names(graph: Any) -> dict[str, Any]:
    """Variables of a graph by the name of the tensor that is their handle."""
    keys = tf.compat.v1.GraphKeys
    variables = [*graph.get_collection(keys.GLOBAL_VARIABLES)]
    variables += graph.get_collection(keys.LOCAL_VARIABLES)
    return {(v.handle.name if hasattr(v, "handle") else v._variable.name): v for v in variables}


def import_graph(
    model: ModelGraph,
    results: Sequence[Any],
    *,
    trained: frozenset[str],
    updates: Sequence[tuple[Any, str, Any]] = (),
) -> TensorGraph:
    """The operations between the batch and `results`.

    Args:
        trained: names of the variables that gradients change.
        updates: (variable, "assign", "add" or "sub", tensor) of the others that a step changes.
    """
    wanted = [*results, *(value for _, _, value in updates)]
    bodies = inline_calls(model.graph, wanted)
    order = _in_order(model.graph, bodies, bodies.ancestors(wanted))
    handles = handle_names(model.graph)
    inputs = {placeholder.name: path for path, placeholder in model.inputs.items()}
    reads = _reads(order, handles)
    constant = _constant_operations(order, frozenset(inputs), reads)
    paths = ModulePaths((operation.name for operation in order), reads.values())
    nodes = tuple(
        node
        for operation in order
        if operation not in constant and not _is_source(operation, inputs)
        for node in _nodes(operation, paths, bodies)
    )
    needed = {name for node in nodes for name in node.inputs} | {t.name for t in wanted}
    return TensorGraph(
        nodes=nodes,
        constants=_values(model.graph, constant, needed),
        variables=_variables(reads, handles, needed | _changed(updates), trained),
        reads=reads,
        inputs=inputs,
        results=tuple(tensor.name for tensor in results),
        updates=tuple(
            BufferUpdate(variable=_name(variable), how=how, value=value.name)
            for variable, how, value in updates
        ),
    )


def _name(variable: Any) -> str:
    return str(variable.op.name)


def _changed(updates: Sequence[tuple[Any, str, Any]]) -> set[str]:
    return {_name(variable) for variable, _, _ in updates}


def _is_source(operation: Any, inputs: Mapping[str, str]) -> bool:
    """Whether an operation only names a variable or a part of the batch."""
    return operation.type in (*_HANDLES, *_READS) or (
        operation.type == "Placeholder" and operation.outputs[0].name in inputs
    )


def _reads(order: Sequence[Any], handles: Mapping[str, Any]) -> dict[str, str]:
    """Tensor → variable, for handles and what is read from them."""
    reads: dict[str, str] = {}
    for operation in order:
        if operation.type in _HANDLES and operation.outputs[0].name in handles:
            reads[operation.outputs[0].name] = _name(handles[operation.outputs[0].name])
        elif operation.type in _READS and operation.inputs[0].name in reads:
            reads[operation.outputs[0].name] = reads[operation.inputs[0].name]
    return reads


def _constant_operations(
    order: Sequence[Any], inputs: frozenset[str], reads: Mapping[str, str]
) -> set[Any]:
    constant: set[Any] = set()
    for operation in order:
        if any(tensor.name in inputs or tensor.name in reads for tensor in operation.outputs):
            continue
        if operation.type in _SHAPES and all(
            tensor.shape.is_fully_defined() for tensor in operation.inputs
        ):
            constant.add(operation)
        elif operation.op_def.is_stateful or operation.type in (*_HANDLES, "Placeholder"):
            continue
        elif any(tensor.dtype.name in ("variant", "resource") for tensor in operation.outputs):
            continue  # no arrays
        elif all(tensor.op in constant for tensor in operation.inputs):
            constant.add(operation)
    return constant


def _values(graph: Any, constant: set[Any], needed: set[str]) -> dict[str, Array]:
    """Values of the constant tensors that are read."""
    tensors = [t for op in constant for t in op.outputs if t.name in needed]
    if not tensors:
        return {}
    shapes = {
        output: _shape_value(operation, source)
        for operation in constant
        if operation.type in _SHAPES
        for output, source in zip(operation.outputs, operation.inputs, strict=True)
    }
    on_cpu = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.compat.v1.Session(graph=graph, config=on_cpu) as session:
        values = session.run(tensors, feed_dict=shapes)
    return {t.name: np.asarray(value) for t, value in zip(tensors, values, strict=True)}


def _shape_value(operation: Any, source: Any) -> Array:
    """What a shape operation gives; fed, since TensorFlow would compute the tensor first."""
    dims = source.shape.as_list()
    value: Any = {"Size": int(np.prod(dims)), "Rank": len(dims)}.get(operation.type, dims)
    return np.asarray(value, dtype=operation.outputs[0].dtype.as_numpy_dtype)


def _variables(
    reads: Mapping[str, str], handles: Mapping[str, Any], needed: set[str], trained: frozenset[str]
) -> dict[str, VariableInfo]:
    by_name = {_name(variable): variable for variable in handles.values()}
    used = dict.fromkeys(reads[name] for name in reads if name in needed)
    used |= dict.fromkeys(name for name in by_name if name in needed)
    return {
        name: VariableInfo(
            name=name,
            shape=tuple(by_name[name].shape.as_list()),
            dtype=by_name[name].dtype.base_dtype.name,
            trained=name in trained,
        )
        for name in used
    }


def _in_order(graph: Any, bodies: Bodies, cone: set[Any]) -> list[Any]:
    """As they were made; the body of a call just before the call."""
    places = {operation: place for place, operation in enumerate(graph.get_operations())}

    def key(operation: Any) -> tuple[int, ...]:
        caller = bodies.callers.get(operation)
        own = (places[operation], 1)
        return own if caller is None else (*key(caller)[:-1], 0, *own)

    return sorted(cone, key=key)


def _nodes(operation: Any, paths: ModulePaths, bodies: Bodies) -> list[Node]:
    """The node of an operation. Of a call, one for each output, which only passes on what the body
    gave: functions have outputs that nothing but TensorFlow's gradients reads."""
    made_by = operation
    while made_by in bodies.callers:
        made_by = bodies.callers[made_by]
    whole = Node(
        kind=operation.type,
        name=operation.name,
        inputs=tuple(tensor.name for tensor in operation.inputs),
        outputs=tuple(tensor.name for tensor in operation.outputs),
        shapes=tuple(
            tuple(tensor.shape.as_list()) if tensor.shape.is_fully_defined() else None
            for tensor in operation.outputs
        ),
        site=site_of_operation(made_by, paths),
        operation=operation,
    )
    results = bodies.results.get(operation)
    if results is None:
        return [whole]
    return [
        replace(whole, kind="Identity", inputs=(result.name,), outputs=(name,), shapes=(shape,))
        for result, name, shape in zip(results, whole.outputs, whole.shapes, strict=True)
    ]

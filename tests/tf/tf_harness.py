"""One operation, or a few, run by TensorFlow and by the frontend on the same numbers.

The reference is TensorFlow's own session, for the results and for the gradients of a weighted sum
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from openwafer.frontends.tf.importing import import_graph
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.lowering import GraphModule, refuse_unknown
from openwafer.frontends.tf.model_graph import ModelGraph
from openwafer.frontends.tf.nodes import TensorGraph
from openwafer.frontends.tf.recording import Recording
from openwafer.frontends.tf.rewriting import fuse

Build = Callable[..., Any]


def graph_of(build: Build, arrays: Mapping[str, np.ndarray]) -> tuple[ModelGraph, list[Any]]:
    """`build(**placeholders)` in a graph, and the tensors that it gave."""
    graph = tf.Graph()
    with graph.as_default():
        tf.compat.v1.set_random_seed(1)
        places = {
            name: tf.compat.v1.placeholder(array.dtype, array.shape, name=name)
            for name, array in arrays.items()
        }
        outputs = build(**places)
        initializer = tf.compat.v1.global_variables_initializer()
    model = ModelGraph(
        graph=graph,
        spec=None,
        mode="train",
        inputs={f"['{name}']": place for name, place in places.items()},
        global_step=None,
        initializer=initializer,
        recording=Recording(),
    )
    return model, list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def imported(
    model: ModelGraph, outputs: Sequence[Any], batch: Mapping[str, torch.Tensor]
) -> TensorGraph:
    graph = fuse(import_graph(model, outputs, trained=frozenset(trained_names(model))))
    refuse_unknown(graph, batch)
    return graph


def trained_names(model: ModelGraph) -> list[str]:
    keys = tf.compat.v1.GraphKeys
    return [v.op.name for v in model.graph.get_collection(keys.TRAINABLE_VARIABLES)]


def batch_of(arrays: Mapping[str, np.ndarray], *, grad: bool = False) -> dict[str, torch.Tensor]:
    batch = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    if grad:
        for tensor in batch.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()
    return batch


def check_alike(
    build: Build,
    arrays: Mapping[str, np.ndarray],
    *,
    gradients: bool = True,
    rtol: float = 2e-5,
    atol: float = 1e-5,
) -> TensorGraph:
    """Results and gradients by inputs and variables are TensorFlow's; gives the imported graph."""
    model, outputs = graph_of(build, arrays)
    keys = tf.compat.v1.GraphKeys
    variables = model.graph.get_collection(keys.GLOBAL_VARIABLES)
    trained = model.graph.get_collection(keys.TRAINABLE_VARIABLES)
    feed = {place: arrays[path[2:-2]] for path, place in model.inputs.items()}
    with model.graph.as_default(), tf.compat.v1.Session() as session:
        session.run(model.initializer)
        values = dict(zip([v.op.name for v in variables], session.run(variables), strict=True))
        expected = session.run(outputs, feed)
        weights = [_weights(array) for array in expected]
        by = [p for p in model.inputs.values() if p.dtype.is_floating] + list(trained)
        expected_gradients = (
            session.run(_gradients(outputs, weights, by), feed) if gradients else []
        )
    batch = batch_of(arrays, grad=gradients)
    graph = imported(model, outputs, batch)
    module = GraphModule(graph, {n: torch.from_numpy(np.array(v)) for n, v in values.items()})
    found = module.run(batch)
    for ours, theirs in zip(found, expected, strict=True):
        _close(ours, theirs, rtol, atol, "a result")
    if gradients:
        _check_gradients(module, batch, found, weights, by, expected_gradients, rtol, atol)
    return graph


def _weights(array: Any) -> np.ndarray:
    shape = np.shape(array)
    return np.cos(np.arange(np.size(array)) * 0.7).reshape(shape).astype(np.float32)


def _gradients(outputs: Sequence[Any], weights: Sequence[np.ndarray], by: list[Any]) -> list[Any]:
    total = tf.add_n(
        [
            tf.reduce_sum(output * weight)
            for output, weight in zip(outputs, weights, strict=True)
            if output.dtype.is_floating
        ]
    )
    found = tf.compat.v1.gradients(total, by)
    return [
        tf.zeros(source.shape) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, source in zip(found, by, strict=True)
    ]


def _check_gradients(
    module: GraphModule,
    batch: Mapping[str, torch.Tensor],
    found: Sequence[torch.Tensor],
    weights: Sequence[np.ndarray],
    by: Sequence[Any],
    expected: Sequence[np.ndarray],
    rtol: float,
    atol: float,
) -> None:
    terms = [
        (value * torch.from_numpy(weight)).sum()
        for value, weight in zip(found, weights, strict=True)
        if value.requires_grad
    ]
    if terms:
        torch.stack(terms).sum().backward()
    held = {**batch, **dict(module.named_parameters())}
    for source, gradient in zip(by, expected, strict=True):
        name = source.op.name
        ours = held[name].grad if name in held else None
        ours = torch.zeros(gradient.shape) if ours is None else ours
        _close(ours, gradient, rtol, atol, f"the gradient by {name}")


def _close(ours: torch.Tensor, theirs: Any, rtol: float, atol: float, what: str) -> None:
    value = ours.detach().numpy()
    assert value.shape == np.shape(theirs), f"{what} has the shape {value.shape}"
    np.testing.assert_allclose(
        np.asarray(value, dtype=np.float64), np.asarray(theirs, dtype=np.float64), rtol, atol, what
    )

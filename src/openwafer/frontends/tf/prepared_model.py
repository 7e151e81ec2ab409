"""One form of a user's model, from its functions to what can be compiled.

Decides in which order a model_fn is called, its train_op understood, its metrics cut and its graph
imported. Does not decide what any of them does, nor how it is run (compiled_run.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openwafer.errors import CaptureError
from openwafer.frontends.tf.capture import ImportedModel, import_model
from openwafer.frontends.tf.host_metrics import HostMetrics
from openwafer.frontends.tf.input_data import example_batch
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.lowering import GraphModule
from openwafer.frontends.tf.model_graph import CallModelFn, ModelGraph, build_model_graph
from openwafer.frontends.tf.nodes import Array
from openwafer.frontends.tf.train_op import TrainOp, understand_train_op
from openwafer.frontends.tf.variables import tensors_of
from openwafer.frontends.torch.capture import Captured
from openwafer.frontends.torch.metrics import forget_all_metrics

__all__ = ["PreparedModel", "prepare_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model's form. train_op: None but for training. batch: an example, of zeros. predicted:
    names of the predictions, in the order of what the host is given."""

    graph: ModelGraph
    train_op: TrainOp | None
    imported: ImportedModel
    metrics: HostMetrics
    batch: dict[str, Any]
    predicted: tuple[str, ...] = ()

    def captured(self, values: Mapping[str, Array]) -> tuple[Captured, GraphModule]:
        """The Program, and the module with these values of its variables (none: no data)."""
        module = self.imported.module(tensors_of(values))
        metric = self.metrics.receiver
        return self.imported.capture(module, self.batch, metric=metric), module


def prepare_model(
    call: CallModelFn,
    element_spec: Any,
    mode: str,
    *,
    name: str,
    seed: int,
    warm_start: Any = None,
) -> PreparedModel:
    """Call a model_fn and import what it made; arguments as of `build_model_graph`.

    Raises:
        CaptureError: the train_op is not understood, or there are no predictions.
        UnsupportedOpError: operations that cannot be taken, all of them.
    """
    batch = example_batch(element_spec)
    graph = build_model_graph(call, element_spec, mode, seed=seed, warm_start=warm_start)
    forget_all_metrics()
    metrics = HostMetrics(graph)
    train_op = understand_train_op(graph) if mode == tf.estimator.ModeKeys.TRAIN else None
    wanted, names, loss = metrics.tensors, (), None
    if mode == tf.estimator.ModeKeys.PREDICT:
        names, wanted = _predictions(graph)
        loss = _something_scalar(graph, wanted)
    imported = import_model(
        graph,
        batch,
        name=name,
        trained=train_op.trained_names if train_op else frozenset(),
        updates=train_op.updates if train_op else (),
        host_tensors=wanted,
        loss=loss,
    )
    return PreparedModel(
        graph=graph,
        train_op=train_op,
        imported=imported,
        metrics=metrics,
        batch=batch,
        predicted=names,
    )


def _predictions(model: ModelGraph) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    predictions = model.spec.predictions
    if predictions is None:
        raise CaptureError("model_fn gave no predictions", allowed="predictions in mode PREDICT")
    if not isinstance(predictions, Mapping):
        predictions = {"output": predictions}
    found: Mapping[str, Any] = predictions
    return tuple(found), tuple(found.values())


def _something_scalar(model: ModelGraph, wanted: tuple[Any, ...]) -> Any:
    """A Program has a loss; without labels it is the mean of a prediction, and nobody reads it."""
    with model.graph.as_default():
        return tf.reduce_mean(tf.cast(wanted[0], tf.float32))

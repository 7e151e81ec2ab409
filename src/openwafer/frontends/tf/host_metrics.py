"""Metrics that are kept on the host: `host_call`, and `eval_metric_ops`.

Decides where a metric's expression is cut in two: what depends on the batch alone is part of the
compiled model, what keeps sums stays with TensorFlow on the host. Of a host_call the cut is given:
its tensors. Does not decide which metrics there are; the user's functions make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from openwafer.errors import CaptureError
from openwafer.frontends.tf.importing import ancestors
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import ModelGraph
from openwafer.frontends.torch.metrics import CBMetric
from openwafer.train.hooks import MetricFunctions, StepMetrics

__all__ = ["HostMetrics", "check_host_call", "metrics_of_host_call"]

_NAME = "host_metrics"


def check_host_call(host_call: Any) -> None:
    """Check the documented form of a host_call.

    Raises:
        CaptureError: it is not `(function, tensors)`, with perhaps a third entry.
    """
    good = (
        isinstance(host_call, (tuple, list))
        and len(host_call) in (2, 3)
        and callable(host_call[0])
        and all(isinstance(part, (tuple, list)) for part in host_call[1:])
    )
    if not good:
        raise CaptureError(
            f"host_call is {host_call!r}",
            allowed="(function, [tensors]): the function gives {name: (value, update)}",
        )


def metrics_of_host_call(host_call: Any) -> dict[str, tuple[Any, Any]]:
    """Call a host_call's function: {name: (value, update)}; entries of a list are numbered."""
    function, *arguments = host_call
    result: Any = function(*(tensor for part in arguments for tensor in part))
    if isinstance(result, Mapping):
        return dict(result)
    return {f"metric_{number}": pair for number, pair in enumerate(result)}


class _Receiver(CBMetric):
    """Stands in the captured graph for the host: gets the tensors of each step."""

    def update_on_host(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the tensors are passed to `HostMetrics` by the loop."""

    def compute(self) -> float:
        return 0.0


class HostMetrics:
    """The host's half of a model's metrics, in a graph and session of their own.

    `tensors` is what the host wants of each step; empty where there are no metrics.
    """

    def __init__(self, model: ModelGraph) -> None:
        host_call = getattr(model.spec, "host_call", None)
        self.receiver = _Receiver(_NAME)
        with model.graph.as_default():
            if host_call is not None:
                check_host_call(host_call)
                pairs = metrics_of_host_call(host_call)
            else:
                pairs = dict(model.spec.eval_metric_ops or {})
        updates = [update for _, update in pairs.values()]
        values = [value for value, _ in pairs.values()]
        stateful = _keep_sums(model, [*updates, *values])
        if host_call is not None:
            self.tensors = tuple(tensor for part in host_call[1:] for tensor in part)
        else:
            self.tensors = _frontier(stateful)
        # TensorFlow forgets the Python functions of a graph with it; metrics may call some.
        self._original = model.graph
        own = _Extract(model, self.tensors, stateful)
        self._names, self._places = tuple(pairs), own.places
        self._updates, self._values = own.copies(updates), own.copies(values)
        self._reset = own.copies(own.initializers)
        self._session = tf.compat.v1.Session(
            graph=own.graph, config=tf.compat.v1.ConfigProto(device_count={"GPU": 0})
        )
        self.reset()

    def functions(self) -> MetricFunctions:
        """As the loop calls them."""
        return MetricFunctions(update=self.update, compute=self.compute, reset=self.reset)

    def update(self, metrics: StepMetrics) -> None:
        for tensors in metrics.get(self.receiver.name, ()):
            fed = {p: _array(v) for p, v in zip(self._places, tensors, strict=True)}
            self._session.run(self._updates, feed_dict=fed)

    def compute(self) -> dict[str, float]:
        values = self._session.run(self._values)
        return {name: float(value) for name, value in zip(self._names, values, strict=True)}

    def reset(self) -> None:
        self._session.run(self._reset)


def _array(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _local_variables(graph: Any) -> list[Any]:
    return list(graph.get_collection(tf.compat.v1.GraphKeys.LOCAL_VARIABLES))


def _keep_sums(model: ModelGraph, wanted: list[Any]) -> set[Any]:
    """The operations that depend on a sum kept by a metric."""
    local = {variable.op.name for variable in _local_variables(model.graph)}
    cone = ancestors(wanted, control=True)
    found: set[Any] = set()
    for operation in model.graph.get_operations():
        sources = {*(tensor.op for tensor in operation.inputs), *operation.control_inputs}
        if operation in cone and (operation.name in local or found & sources):
            found.add(operation)
    return found


def _frontier(stateful: set[Any]) -> tuple[Any, ...]:
    """What these operations read that they do not compute, but for constants."""
    found = {
        tensor.name: tensor
        for operation in stateful
        for tensor in operation.inputs
        if tensor.op not in stateful and tf.get_static_value(tensor) is None
    }
    return tuple(found[name] for name in sorted(found))


class _Extract:
    """A copy of the metrics' operations with placeholders at the cut.

    A copy, because TensorFlow runs the operation behind a tensor that is fed all the same where
    another one has it as a control input, as the updates of tf.compat.v1.metrics do.
    """

    def __init__(self, model: ModelGraph, cut: tuple[Any, ...], stateful: set[Any]) -> None:
        local = _local_variables(model.graph)
        self.initializers = [variable.initializer for variable in local]
        kept = _behind([*stateful, *self.initializers], {tensor.name for tensor in cut}, stateful)
        whole = model.graph.as_graph_def()
        names = {operation.name for operation in kept}
        part = tf.compat.v1.GraphDef(library=whole.library, versions=whole.versions)
        for node in whole.node:
            if node.name in names:
                part.node.append(node)
                inputs = [i for i in node.input if not i.startswith("^") or i[1:] in names]
                del part.node[-1].input[:]
                part.node[-1].input.extend(inputs)
        self.graph = tf.Graph()
        with self.graph.as_default():
            tf.no_op()  # where there are no metrics: a session wants an operation
            self.places = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in cut]
            mapped = {t.name: place for t, place in zip(cut, self.places, strict=True)}
            tf.import_graph_def(part, input_map=mapped, name="metrics")

    def copies(self, wanted: Sequence[Any]) -> list[Any]:
        """The copies of tensors and operations."""
        return [self.graph.as_graph_element(f"metrics/{element.name}") for element in wanted]


def _behind(wanted: Sequence[Any], cut: set[str], stateful: set[Any]) -> set[Any]:
    """The operations that `wanted` need once the tensors at the cut are given; of what only has to
    run before, those that keep sums."""
    found: set[Any] = set()
    waiting = list(wanted)
    while waiting:
        operation = waiting.pop()
        if operation in found:
            continue
        found.add(operation)
        waiting += [tensor.op for tensor in operation.inputs if tensor.name not in cut]
        waiting += [before for before in operation.control_inputs if before in stateful]
    return found

"""A streaming metric whose state is an object of Python: a metric of the PyTorch interface.

Decides when the object is told of a batch, asked for its value and reset: a variable of the host
counts its updates, whose initializer is the reset. Does not decide what a metric is
(frontends/torch/metrics); numbers that are sums are kept in TensorFlow (sums.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics.sums import Place, host_variable, placed, require_graph
from openwafer.frontends.torch.metrics import CBMetric

__all__ = ["streaming_object"]


def streaming_object(metric: CBMetric, tensors: Sequence[Any], place: Place) -> tuple[Any, Any]:
    """A metric's (value, update); the update gives how many there were, which costs nothing.

    Args:
        metric: its `update_on_host` gets the tensors of each batch, 16-bit numbers as float32.
        tensors: of the batch or the model.

    Raises:
        ConfigError: TensorFlow is executing eagerly.
    """
    require_graph(metric.name)

    def reset() -> Any:
        metric.reset()
        return np.int64(0)

    def update(*arrays: Any) -> Any:
        metric.update_on_host(*(torch.from_numpy(np.array(array)) for array in arrays))
        return np.int64(1)

    def compute(num_updates: Any) -> Any:
        return np.float64(metric.compute())

    # What a scope may be called is narrower than what a metric is.
    default_name = metric.name.replace("/", "_")
    with tf.compat.v1.variable_scope(place.name, default_name, list(tensors)):
        num_updates = host_variable("num_updates", lambda: _scalar(reset, [], tf.int64))
        # All of it waits for the variable's operation, and so belongs to the host.
        with tf.control_dependencies([num_updates.op]):
            given = [_of_numpy(tensor) for tensor in tensors]
            one = _scalar(update, given, tf.int64)
        updated = tf.identity(tf.compat.v1.assign_add(num_updates, one), "update_op")
        value = tf.identity(_scalar(compute, [num_updates.read_value()], tf.float64), "value")
    return placed(value, updated, place)


def _of_numpy(tensor: Any) -> Any:
    tensor = tf.convert_to_tensor(tensor)
    return tf.cast(tensor, tf.float32) if tensor.dtype.is_floating else tf.identity(tensor)


def _scalar(function: Any, arguments: Sequence[Any], dtype: Any) -> Any:
    result = tf.numpy_function(function, arguments, dtype)
    result.set_shape(())
    return result

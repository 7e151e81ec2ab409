"""`CSEstimatorSpec`: what a model_fn returns.

Decides how a host_call travels with a spec, and what plain TensorFlow is given in its place. Does
not decide how its metrics are computed (host_metrics.py).

Source of names: CS-2 software 1.6 documentation, section 4.3 of the fact sheet.
"""

from __future__ import annotations

from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.host_metrics import check_host_call, metrics_of_host_call
from openwafer.frontends.tf.library import tf

__all__ = ["CSEstimatorSpec", "for_tensorflow"]


class CSEstimatorSpec(tf.estimator.EstimatorSpec):
    """A `tf.estimator.EstimatorSpec` with metrics that are kept on the host.

    Args:
        mode: tf.estimator.ModeKeys.
        host_call: `(function, [tensors])`; the function is called with the tensors and gives
            `{name: (value, update)}`, streaming metrics as those of tf.compat.v1.metrics.
        kwargs: those of tf.estimator.EstimatorSpec.

    Raises:
        CaptureError: host_call is not of that form.
    """

    host_call: Any

    def __new__(cls, mode: Any, host_call: Any = None, **kwargs: Any) -> CSEstimatorSpec:
        if host_call is not None:
            check_host_call(host_call)
        spec = super().__new__(cls, mode, **kwargs)
        spec.host_call = host_call
        return spec


def for_tensorflow(spec: Any) -> Any:
    """The spec for TensorFlow's own Estimator: a host_call becomes eval_metric_ops.

    Raises:
        ConfigError: both are given.
    """
    host_call = getattr(spec, "host_call", None)
    if host_call is None:
        return spec
    if spec.eval_metric_ops:
        raise ConfigError(
            "model_fn gave both host_call and eval_metric_ops",
            allowed="one of them",
            hint="put the metrics into the host_call: it becomes eval_metric_ops by itself",
        )
    fields = {name: getattr(spec, name) for name in spec._fields if name != "mode"}
    fields["eval_metric_ops"] = metrics_of_host_call(host_call)
    export = fields.pop("export_outputs", None)
    return tf.estimator.EstimatorSpec(spec.mode, export_outputs=export or None, **fields)

"""Metrics of an evaluation of the TensorFlow U-Net: those of metrics.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics.sums import Place, streaming
from openwafer.tf.metrics import accuracy_metric
from openwafer.zoo.unet.torch_model import UNetConfig

__all__ = ["segmentation_metrics"]

# Of each class: the pixels that are rightly found, those with its label, those predicted as it.
_FRACTIONS: dict[str, Callable[[Any, Any, Any], tuple[Any, Any]]] = {
    "mIOU": lambda right, of_label, predicted: (right, of_label + predicted - right),
    "DSC": lambda right, of_label, predicted: (2.0 * right, of_label + predicted),
    "MPCA": lambda right, of_label, predicted: (right, of_label),
}


def segmentation_metrics(
    config: UNetConfig, labels: Any, predictions: Any, weights: Any
) -> dict[str, tuple[Any, Any]]:
    """Those of `eval_metrics`: `eval/mIOU`, `eval/DSC`, `eval/MPCA`, `eval/Acc`.

    Args:
        labels, predictions, weights: [batch, height, width]; weight 0 leaves a pixel out, and so
            does None nowhere.
    """
    found = {name: _of_classes(name, config, labels, predictions, weights) for name in _FRACTIONS}
    found["Acc"] = accuracy_metric(labels, predictions, weights)
    return {f"eval/{name}": found[name] for name in dict.fromkeys(config.eval_metrics)}


def _of_classes(
    name: str, config: UNetConfig, labels: Any, predictions: Any, weights: Any
) -> tuple[Any, Any]:
    """The mean of a fraction over the classes that occur in it, but for the ignored ones."""
    label, prediction = (
        tf.one_hot(tf.reshape(classes, [-1]), config.num_classes)
        for classes in (labels, predictions)
    )
    if weights is not None:
        label = label * tf.reshape(weights, [-1, 1])
    ignored = set(config.eval_ignore_classes)
    kept = [c for c in range(config.num_classes) if c not in ignored]

    def mean(counts: Any) -> Any:
        sums = (tf.linalg.diag_part(counts), tf.reduce_sum(counts, 1), tf.reduce_sum(counts, 0))
        above, below = (tf.gather(part, kept) for part in _FRACTIONS[name](*sums))
        occurs = tf.cast(below > 0, tf.float64)
        total = tf.reduce_sum(tf.math.divide_no_nan(above, below))
        return tf.math.divide_no_nan(total, tf.reduce_sum(occurs))

    counts = tf.matmul(label, prediction, transpose_a=True)
    return streaming({"confusion_matrix": counts}, mean, name, Place())

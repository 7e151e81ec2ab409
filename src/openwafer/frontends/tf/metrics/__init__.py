"""Streaming metrics of the documented TensorFlow API, over the whole evaluation.

Each is a function in a graph that gives `(value, update)`, as those of tf.compat.v1.metrics do: for
`eval_metric_ops`, or for the function of a `host_call`. Names and arguments are those of the
original's `modelzoo/common/tf/metrics` (CS-2 software 1.6; fact sheet, section 4.4).
"""

from openwafer.frontends.tf.metrics.accuracy import accuracy_metric, calculate_accuracy
from openwafer.frontends.tf.metrics.confusion import (
    dice_coefficient_metric,
    f1_score_metric,
    fbeta_score_metric,
    mcc_metric,
)
from openwafer.frontends.tf.metrics.likelihood import (
    bits_per_x_metric,
    ece_loss_metric,
    perplexity_metric,
)
from openwafer.frontends.tf.metrics.texts import (
    entity_f1_metric,
    rouge_score_metric,
    squad_metric,
)

__all__ = [
    "accuracy_metric",
    "bits_per_x_metric",
    "calculate_accuracy",
    "dice_coefficient_metric",
    "ece_loss_metric",
    "entity_f1_metric",
    "f1_score_metric",
    "fbeta_score_metric",
    "mcc_metric",
    "perplexity_metric",
    "rouge_score_metric",
    "squad_metric",
]

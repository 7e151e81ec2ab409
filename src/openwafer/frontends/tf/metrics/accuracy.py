"""Share of right answers.

Decides what is counted. Also the masked-token and next-sentence accuracies, with masks as weights.
"""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics.sums import Collections, Place, streaming

__all__ = ["accuracy_metric", "calculate_accuracy"]


def accuracy_metric(
    labels: Any,
    predictions: Any,
    weights: Any = None,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Share of predictions that equal their labels, tensors of one shape; 0 of none at all.

    weights: of that shape; 0 leaves an entry out.
    """
    correct = tf.cast(tf.equal(labels, tf.cast(predictions, labels.dtype)), tf.float32)
    counted = tf.ones_like(correct) if weights is None else tf.cast(weights, tf.float32)
    return streaming(
        {"correct": tf.reduce_sum(correct * counted), "count": tf.reduce_sum(counted)},
        tf.math.divide_no_nan,
        "accuracy",
        Place(metrics_collections, updates_collections, name),
    )


def calculate_accuracy(logits: Any, labels: Any, seq_lens: Any = None) -> Any:
    """Share of a single batch's labels with the highest logit, a scalar; it keeps no sums.

    Args:
        logits: [batch, classes] or [batch, seq, classes]; labels: the same without classes.
        seq_lens: [batch]: how many of a sequence's labels count; all where None.
    """
    correct = tf.cast(tf.equal(tf.argmax(logits, -1, labels.dtype), labels), tf.float32)
    if seq_lens is None:
        return tf.reduce_mean(correct)
    counted = tf.sequence_mask(seq_lens, labels.shape[1], tf.float32)
    return tf.math.divide_no_nan(tf.reduce_sum(correct * counted), tf.reduce_sum(counted))

"""Metrics of a confusion matrix that is summed over the whole evaluation.

Decides how labels and predictions are counted and what is made of the counts: F-beta, the Matthews
correlation, and the Dice coefficient. Entries whose label or prediction is no class (-100, say) and
entries of weight 0 are left out. The definitions are those of the PyTorch metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics.sums import Collections, Place, streaming

__all__ = ["dice_coefficient_metric", "f1_score_metric", "fbeta_score_metric", "mcc_metric"]


def fbeta_score_metric(
    labels: Any,
    predictions: Any,
    num_classes: int,
    ignore_labels: Collection[int] | None = None,
    beta: float = 1,
    weights: Any = None,
    average_type: str = "micro",
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """F-beta of all classes but `ignore_labels`.

    Args:
        labels, predictions, weights: of one shape, whole numbers; weight 0 leaves an entry out.
        beta: weight of recall against precision.
        average_type: `micro`: one score of the classes' summed counts; `macro`: the mean of the
            classes' scores, 0 for a class that neither occurs nor is predicted.

    Raises:
        ConfigError: another average_type, beta is not positive, or fewer than two classes.
    """
    if average_type not in ("micro", "macro"):
        raise ConfigError(f"average_type {average_type!r}", allowed="micro, macro")
    if not beta > 0:
        raise ConfigError(f"beta {beta}", allowed="a positive number")
    kept = [c for c in range(num_classes) if c not in set(ignore_labels or ())]

    def score(counts: Any) -> Any:
        counted = (tf.gather(part, kept) for part in _right_labels_predicted(counts))
        right, of_label, predicted = counted
        if average_type == "micro":
            right, of_label, predicted = (
                tf.reduce_sum(part, keepdims=True) for part in (right, of_label, predicted)
            )
        # (1 + b²) P R / (b² P + R), with both fractions multiplied out.
        scores = tf.math.divide_no_nan((1 + beta**2) * right, beta**2 * of_label + predicted)
        return tf.reduce_mean(scores) if kept else tf.zeros([], tf.float64)

    place = Place(metrics_collections, updates_collections, name)
    return _of_confusion("fbeta", score, labels, predictions, num_classes, weights, place)


def f1_score_metric(
    labels: Any,
    predictions: Any,
    weights: Any = None,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """F1 of class 1 among two; see fbeta_score_metric."""
    return fbeta_score_metric(
        labels,
        predictions,
        num_classes=2,
        ignore_labels=[0],
        weights=weights,
        metrics_collections=metrics_collections,
        updates_collections=updates_collections,
        name=name,
    )


def mcc_metric(
    labels: Any,
    predictions: Any,
    weights: Any = None,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
    num_classes: int = 2,
) -> tuple[Any, Any]:
    """The Matthews correlation of labels and predictions, -1 to 1; of more than two classes after
    Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004).

    labels, predictions, weights: of one shape; weight 0 leaves an entry out.
    """

    def correlation(counts: Any) -> Any:
        right, of_label, predicted = _right_labels_predicted(counts)
        total = tf.reduce_sum(counts)
        covariance = tf.reduce_sum(right) * total - tf.reduce_sum(of_label * predicted)
        spread = (total**2 - tf.reduce_sum(predicted**2)) * (total**2 - tf.reduce_sum(of_label**2))
        return tf.math.divide_no_nan(covariance, tf.sqrt(spread))

    place = Place(metrics_collections, updates_collections, name)
    return _of_confusion(
        "mcc_metric", correlation, labels, predictions, num_classes, weights, place
    )


def dice_coefficient_metric(
    labels: Any,
    predictions: Any,
    num_classes: int,
    weights: Any = None,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Mean of 2 |A ∩ B| / (|A| + |B|) over the classes that occur or are predicted.

    labels, predictions, weights: of one shape; weight 0 leaves an entry out.
    """

    def mean(counts: Any) -> Any:
        right, of_label, predicted = _right_labels_predicted(counts)
        occurs = tf.cast(of_label + predicted > 0, tf.float64)
        scores = tf.math.divide_no_nan(2 * right, of_label + predicted)
        return tf.math.divide_no_nan(tf.reduce_sum(scores), tf.reduce_sum(occurs))

    place = Place(metrics_collections, updates_collections, name)
    return _of_confusion("dice_coefficient", mean, labels, predictions, num_classes, weights, place)


def _right_labels_predicted(counts: Any) -> tuple[Any, Any, Any]:
    """For each class: entries of its label that are predicted as it, entries of its label, entries
    predicted as it."""
    return tf.linalg.diag_part(counts), tf.reduce_sum(counts, 1), tf.reduce_sum(counts, 0)


def _of_confusion(
    default_name: str,
    result: Callable[[Any], Any],
    labels: Any,
    predictions: Any,
    num_classes: int,
    weights: Any,
    place: Place,
) -> tuple[Any, Any]:
    """A function of the matrix [label, prediction] of counts."""
    if num_classes < 2:
        raise ConfigError(f"a metric of {num_classes} classes", allowed="at least 2")
    label = tf.one_hot(tf.reshape(labels, [-1]), num_classes)
    prediction = tf.one_hot(tf.reshape(predictions, [-1]), num_classes)
    if weights is not None:
        label = label * tf.reshape(tf.cast(weights, tf.float32), [-1, 1])
    return streaming(
        {"confusion_matrix": tf.matmul(label, prediction, transpose_a=True)},
        result,
        default_name,
        place,
    )

"""How the losses of many predictions become one number, in TensorFlow: losses.py, line for line.

Decides what a weight of 0 leaves out, and the two documented divisors. Does not decide which
predictions count: the models' masks do. Losses are summed in float32.
"""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = ["cross_entropies", "token_losses", "weighted_loss", "weighted_token_loss"]


def weighted_loss(losses: Any, weights: Any, scaling: str, loss_weight: float = 1.0) -> Any:
    """Losses of the predictions that count, reduced to a scalar, float32.

    Args:
        losses, weights: of one shape, [batch, ...]; weight 0 leaves a prediction out.
        scaling: `num_tokens` divides the sum by the sum of the weights (the mean), anything else,
            such as `batch_size`, by the number of samples, as release 1.6 has it.
        loss_weight: a factor.
    """
    counted = tf.cast(weights, tf.float32)
    total = tf.reduce_sum(tf.cast(losses, tf.float32) * counted)
    num_samples = float(losses.shape[0])
    divisor = tf.maximum(tf.reduce_sum(counted), 1.0) if scaling == "num_tokens" else num_samples
    return total / divisor * loss_weight


def weighted_token_loss(
    logits: Any,
    labels: Any,
    weights: Any,
    scaling: str,
    loss_weight: float = 1.0,
    *,
    label_smoothing: float = 0.0,
) -> Any:
    """`weighted_loss` of the cross entropy of every token.

    Args:
        logits: [batch, seq, classes].
        labels, weights: [batch, seq], the labels whole numbers.
        label_smoothing: weight of the uniform distribution.
    """
    losses = token_losses(logits, labels, label_smoothing)
    return weighted_loss(losses, weights, scaling, loss_weight)


def token_losses(logits: Any, labels: Any, label_smoothing: float = 0.0) -> Any:
    """Cross entropy of every token, float32: [batch, seq, classes], [batch, seq] → [batch, seq]."""
    flat = tf.reshape(tf.cast(logits, tf.float32), [-1, logits.shape[-1]])
    losses = cross_entropies(flat, tf.reshape(labels, [-1]))
    if label_smoothing:
        uniform = -tf.reduce_mean(tf.nn.log_softmax(flat), -1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    return tf.reshape(losses, labels.shape)


def cross_entropies(logits: Any, labels: Any) -> Any:
    """Cross entropy of every sample, float32: [batch, classes], [batch] → [batch]."""
    logits = tf.cast(logits, tf.float32)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)

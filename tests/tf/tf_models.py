"""Model functions for the tests, written as users of the original wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from openwafer.frontends.tf.library import tf
from openwafer.tf import CSEstimatorSpec, Trainer

TRAIN, EVAL = "train", "eval"


def images(params: dict[str, Any], *, batched: bool = True) -> Any:
    """96 pictures of four kinds in batches of 16; endless for training."""
    random = np.random.RandomState(3)
    labels = random.randint(0, 4, 96).astype(np.int32)
    pictures = random.randn(96, 8, 8, 3).astype(np.float32)
    pictures[np.arange(96), labels, labels] += 3.0
    dataset = tf.data.Dataset.from_tensor_slices(({"image": pictures}, labels))
    if not batched:
        return dataset
    dataset = dataset.repeat() if params.get("repeat", True) else dataset
    return dataset.batch(16, drop_remainder=True).prefetch(2)


def classifier_of_2021(features: Any, labels: Any, mode: str, params: dict[str, Any]) -> Any:
    """tf.compat.v1 layers with Keras layers among them, Adam, a piecewise rate, clipping."""
    training = mode == TRAIN
    net = tf.compat.v1.layers.conv2d(features["image"], 8, 3, padding="same", use_bias=False)
    net = tf.compat.v1.layers.batch_normalization(net, momentum=0.9, training=training)
    net = tf.nn.relu(net)
    net = tf.compat.v1.layers.max_pooling2d(net, 2, 2)
    net = tf.keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="tanh")(net)
    net = tf.keras.layers.Flatten()(net)
    net = tf.compat.v1.layers.dropout(net, params.get("dropout", 0.0), training=training)
    logits = tf.keras.layers.Dense(4)(net)
    loss = tf.compat.v1.losses.sparse_softmax_cross_entropy(labels=labels, logits=logits)

    def metrics(labels: Any, logits: Any) -> Any:
        return {"accuracy": tf.compat.v1.metrics.accuracy(labels, tf.argmax(logits, 1))}

    host_call = (metrics, [labels, logits])
    if not training:
        return CSEstimatorSpec(mode, loss=loss, host_call=host_call)
    step = tf.compat.v1.train.get_or_create_global_step()
    rate = tf.compat.v1.train.piecewise_constant(step, [10, 30], [0.002, 0.001, 0.0005])
    optimizer = tf.compat.v1.train.AdamOptimizer(rate)
    gradients, variables = zip(*optimizer.compute_gradients(loss), strict=True)
    gradients, _ = tf.clip_by_global_norm(gradients, 0.7)
    updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
    with tf.control_dependencies(updates):
        train_op = optimizer.apply_gradients(
            zip(gradients, variables, strict=True), global_step=step
        )
    return CSEstimatorSpec(mode, loss=loss, train_op=train_op, host_call=host_call)


def sentences(params: dict[str, Any]) -> Any:
    random = np.random.RandomState(5)
    ids = random.randint(0, 11, (64, 6)).astype(np.int32)
    mask = (np.arange(6) < random.randint(3, 7, (64, 1))).astype(np.float32)
    labels = np.roll(ids, 1, 1)
    dataset = tf.data.Dataset.from_tensor_slices(({"ids": ids, "mask": mask}, labels))
    dataset = dataset.repeat() if params.get("repeat", True) else dataset
    return dataset.batch(8, drop_remainder=True).prefetch(2)


def sequence_model(optimizer: dict[str, Any]) -> Callable[..., Any]:
    """Embeddings, two blocks with attention, a loss over the tokens of a mask. No bias of keys: its
    gradient is zero but for rounding, of which Adam makes steps."""

    def model_fn(features: Any, labels: Any, mode: str, params: dict[str, Any]) -> Any:
        table = tf.compat.v1.get_variable(
            "embedding", [11, 8], initializer=tf.compat.v1.random_normal_initializer(seed=1)
        )
        hidden = tf.nn.embedding_lookup(table, features["ids"])
        allowed = features["mask"][:, None, :] > 0
        for number in range(2):
            with tf.compat.v1.variable_scope(f"block_{number}"):
                normal = tf.keras.layers.LayerNormalization(name="norm")(hidden)
                attention = tf.keras.layers.MultiHeadAttention(
                    2, 4, use_bias=False, name="attention"
                )
                hidden = hidden + attention(normal, normal, attention_mask=allowed)
                wide = tf.keras.layers.Dense(16, activation=tf.nn.gelu, name="wide")(hidden)
                hidden = hidden + tf.keras.layers.Dense(8, name="narrow")(wide)
        logits = tf.matmul(hidden, table, transpose_b=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        weights = features["mask"]
        loss = tf.reduce_sum(losses * weights) / tf.maximum(tf.reduce_sum(weights), 1.0)
        if mode != TRAIN:
            correct = tf.equal(labels, tf.argmax(logits, -1, tf.int32))
            accuracy = tf.compat.v1.metrics.mean(tf.cast(correct, tf.float32), weights)
            return CSEstimatorSpec(mode, loss=loss, eval_metric_ops={"accuracy": accuracy})
        train_op = Trainer(optimizer).build_train_ops(loss)
        return CSEstimatorSpec(mode, loss=loss, train_op=train_op)

    return model_fn


def linear_model(update: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """One dense layer on pictures, with the train_op `update(loss, global step)`."""

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        net = tf.keras.layers.Flatten()(features["image"])
        logits = tf.keras.layers.Dense(4, name="dense")(net)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        if mode != TRAIN:
            return CSEstimatorSpec(mode, loss=loss)
        step = tf.compat.v1.train.get_or_create_global_step()
        return CSEstimatorSpec(mode, loss=loss, train_op=update(loss, step))

    return model_fn

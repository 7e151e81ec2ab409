"""More model functions in the styles of 2021: each trains as TensorFlow itself does, in both
compiled modes, or is refused with the user's own line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from tf_models import images, linear_model, sentences  # noqa: E402
from training_harness import MODES, check_training, estimator  # noqa: E402

from openwafer.errors import CaptureError, UnsupportedOpError  # noqa: E402
from openwafer.tf import CSEstimatorSpec  # noqa: E402

v1 = tf.compat.v1
STEPS = 6


def specified(mode: str, loss: Any, train: Callable[[Any, Any], Any], **metrics: Any) -> Any:
    if mode != "train":
        return CSEstimatorSpec(mode, loss=loss, eval_metric_ops=metrics)
    return CSEstimatorSpec(mode, loss=loss, train_op=train(loss, v1.train.get_global_step()))


# ---------------------------------------------------------------- convolutions, batch norm


def residual_network(features: Any, labels: Any, mode: str) -> Any:
    """tf.compat.v1.layers: fixed padding, batch norm that is fused, weight decay over the trainable
    variables, momentum, a rate that warms up by tf.where."""
    training = mode == "train"

    def unit(net: Any, filters: int, strides: int, name: str) -> Any:
        with v1.variable_scope(name):
            shortcut = v1.layers.conv2d(net, filters, 1, strides, "same", use_bias=False)
            net = tf.pad(net, [[0, 0], [1, 1], [1, 1], [0, 0]])
            net = v1.layers.conv2d(
                net, filters, 3, strides, "valid", use_bias=False,
                kernel_initializer=v1.variance_scaling_initializer(seed=3),
            )  # fmt: skip
            net = v1.layers.batch_normalization(
                net, momentum=0.9, epsilon=1e-5, training=training, fused=True
            )
            return tf.nn.relu(net + shortcut)

    net = unit(features["image"], 4, 1, "unit_1")
    net = unit(net, 8, 2, "unit_2")
    logits = v1.layers.dense(tf.reduce_mean(net, [1, 2]), 4)
    one_hot = tf.one_hot(labels, 4)
    loss = tf.losses.CategoricalCrossentropy(True, reduction="sum_over_batch_size")(one_hot, logits)
    decayed = [tf.nn.l2_loss(v) for v in v1.trainable_variables() if "batch_norm" not in v.name]
    loss = loss + 1e-3 * tf.add_n(decayed)

    def train(loss: Any, step: Any) -> Any:
        done = tf.cast(step, tf.float32)
        rate = v1.train.polynomial_decay(0.1, step, 20, 0.001, power=2.0)
        rate = tf.where(done < 3.0, 0.1 * (done + 1.0) / 4.0, rate)
        optimizer = v1.train.MomentumOptimizer(rate, 0.9, use_nesterov=True)
        with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
            return optimizer.minimize(loss, global_step=step)

    accuracy = v1.metrics.accuracy(labels, tf.argmax(logits, axis=1))
    return specified(mode, loss, train, accuracy=accuracy)


# ---------------------------------------------------------------- convolutions over text


def text_network(features: Any, labels: Any, mode: str) -> Any:
    """An embedding, convolutions of several widths and the maximum over time; clipping by value; a
    rate that a tf.cond chooses."""
    labels = tf.cast(labels[:, 0] > 5, tf.float32)
    table = v1.get_variable(
        "table", [11, 6], initializer=v1.random_uniform_initializer(-1, 1, seed=2)
    )
    words = tf.nn.embedding_lookup(table, features["ids"])
    words = words * tf.expand_dims(features["mask"], -1)
    pooled = []
    for width in (2, 3):
        with v1.name_scope(f"width_{width}"):
            found = v1.layers.conv1d(words, 4, width, activation=tf.nn.relu, padding="valid")
            pooled.append(tf.reduce_max(found, axis=1))
    logits = tf.squeeze(v1.layers.dense(tf.concat(pooled, -1), 1), -1)
    loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))

    def train(loss: Any, step: Any) -> Any:
        rate = tf.cond(
            tf.less(step, 3),
            lambda: 0.01 * tf.cast(step + 1, tf.float32),
            lambda: v1.train.exponential_decay(0.03, step, 2, 0.5, staircase=True),
        )
        optimizer = v1.train.AdamOptimizer(rate)
        pairs = optimizer.compute_gradients(loss)
        clipped = [
            (tf.clip_by_value(tf.convert_to_tensor(g), -0.02, 0.02), v)
            for g, v in pairs
            if g is not None
        ]
        return optimizer.apply_gradients(clipped, step)

    right = v1.metrics.accuracy(labels, tf.cast(logits > 0, tf.float32))
    return specified(mode, loss, train, accuracy=right)


# ---------------------------------------------------------------- a transformer by hand


def dense(x: Any, size: int, name: str) -> Any:
    with v1.variable_scope(name, reuse=v1.AUTO_REUSE):
        kernel = v1.get_variable(
            "kernel", [x.shape[-1], size], initializer=v1.truncated_normal_initializer(0, 0.3, 4)
        )
        return tf.einsum("bsi,io->bso", x, kernel) + v1.get_variable(
            "bias", [size], initializer=tf.zeros_initializer()
        )


def normed(x: Any, name: str) -> Any:
    with v1.variable_scope(name, reuse=v1.AUTO_REUSE):
        gain = v1.get_variable("gamma", [x.shape[-1]], initializer=tf.ones_initializer())
        shift = v1.get_variable("beta", [x.shape[-1]], initializer=tf.zeros_initializer())
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        return tf.nn.batch_normalization(x, mean, variance, shift, gain, 1e-5)


def by_hand(clip: Callable[[list[Any]], list[Any]]) -> Callable[..., Any]:
    """Einsums, scopes that are used again (one block, applied twice), gelu by its formula."""

    def gelu(x: Any) -> Any:
        return x * 0.5 * (1.0 + tf.math.erf(x / tf.sqrt(2.0)))

    def block(x: Any, adder: Any) -> Any:
        with v1.variable_scope("block", reuse=v1.AUTO_REUSE):
            n = normed(x, "norm_1")
            q, k, v = (
                tf.reshape(dense(n, 8, name), [8, 6, 2, 4]) for name in ("query", "key", "value")
            )
            scores = tf.einsum("BTNH,BFNH->BNFT", k, q) * (1.0 / 2.0) + adder
            context = tf.einsum("BNFT,BTNH->BFNH", tf.nn.softmax(scores), v)
            x = x + dense(tf.reshape(context, [8, 6, 8]), 8, "output")
            return x + dense(gelu(dense(normed(x, "norm_2"), 16, "wide")), 8, "narrow")

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        with v1.variable_scope("model", reuse=v1.AUTO_REUSE):
            table = v1.get_variable(
                "table", [11, 8], initializer=v1.random_normal_initializer(seed=1)
            )
            x = tf.gather(table, features["ids"])
            adder = (1.0 - tf.cast(features["mask"], tf.float32)[:, None, None, :]) * -10000.0
            for _ in range(2):
                x = block(x, adder)
            logits = tf.einsum("bsd,vd->bsv", normed(x, "final"), table)
        logs = tf.nn.log_softmax(logits, axis=-1)
        picked = -tf.reduce_sum(logs * tf.one_hot(labels, 11), axis=-1)
        weights = features["mask"]
        loss = tf.reduce_sum(weights * picked) / (tf.reduce_sum(weights) + 1e-5)

        def train(loss: Any, step: Any) -> Any:
            weights = v1.trainable_variables()
            gradients = clip(tf.gradients(loss, weights))
            optimizer = v1.train.AdamOptimizer(0.003, beta2=0.98, epsilon=1e-6)
            return optimizer.apply_gradients(list(zip(gradients, weights, strict=True)), step)

        return specified(mode, loss, train)

    return model_fn


def all_together(gradients: list[Any]) -> list[Any]:
    return tf.clip_by_global_norm([tf.convert_to_tensor(g) for g in gradients], 0.5)[0]


STYLES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "residual network": (residual_network, images),
    "text network": (text_network, sentences),
    "transformer by hand": (by_hand(all_together), sentences),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLES)
def test_a_style_of_2021_trains_as_tensorflow_does(name: str, tmp_path: Path) -> None:
    model_fn, data = STYLES[name]
    check_training(model_fn, data, tmp_path, steps=STEPS)


# ---------------------------------------------------------------- what is refused


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_an_average_of_the_weights_is_refused(tmp_path: Path) -> None:
    lines: list[int] = []

    def update(loss: Any, step: Any) -> Any:
        train_op = v1.train.AdamOptimizer(0.01).minimize(loss, step)
        average = tf.train.ExponentialMovingAverage(0.99)
        with tf.control_dependencies([train_op]):
            lines.append(here() + 1)
            return average.apply(v1.trainable_variables())

    error = _refused(linear_model(update), tmp_path)
    assert error.where == f"{__file__}:{lines[0]}"


def test_clipping_each_gradient_by_its_own_norm_is_refused(tmp_path: Path) -> None:
    lines: list[int] = []

    def update(loss: Any, step: Any) -> Any:
        optimizer = v1.train.GradientDescentOptimizer(0.1)
        pairs = optimizer.compute_gradients(loss)
        lines.append(here() + 1)
        clipped = [(tf.clip_by_norm(g, 0.5), v) for g, v in pairs]
        return optimizer.apply_gradients(clipped, step)

    error = _refused(linear_model(update), tmp_path)
    assert error.where == f"{__file__}:{lines[0]}"
    assert "clip_by_global_norm" in error.allowed


def test_clipping_the_parts_of_a_sparse_gradient_is_refused(tmp_path: Path) -> None:
    lines: list[int] = []

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        table = v1.get_variable("table", [11, 11])
        logits = tf.nn.embedding_lookup(table, features["ids"])
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))

        def train(loss: Any, step: Any) -> Any:
            optimizer = v1.train.AdamOptimizer(0.01)
            pairs = optimizer.compute_gradients(loss)
            clipped = [(tf.clip_by_value(g, -0.1, 0.1), v) for g, v in pairs]
            lines.append(here() + 1)
            return optimizer.apply_gradients(clipped, step)

        return specified(mode, loss, train)

    error = _refused(model_fn, tmp_path, sentences)
    assert error.where == f"{__file__}:{lines[0]}"
    assert "convert_to_tensor" in error.hint


def test_a_loop_is_refused(tmp_path: Path) -> None:
    lines: list[int] = []

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        x = tf.reduce_mean(features["image"], [1, 2])
        lines.append(here() + 1)
        x = tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 0.5), [0, x])[1]
        return linear_model(lambda loss, step: v1.train.AdamOptimizer().minimize(loss, step))(
            {"image": x}, labels, mode
        )

    with pytest.raises(UnsupportedOpError) as caught:
        estimator(model_fn, tmp_path, **MODES["layer_pipelined"]).train(images, steps=1)
    assert any(refusal.site.line == lines[0] for refusal in caught.value.refusals)


def _refused(model_fn: Any, folder: Path, data: Any = images) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        estimator(model_fn, folder, **MODES["layer_pipelined"]).train(data, steps=1)
    return caught.value

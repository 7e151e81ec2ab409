"""What is not understood is refused, with the user's own line and a way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from openwafer.errors import (  # noqa: E402
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    OpenWaferError,
    UnsupportedOpError,
)
from openwafer.tf import (  # noqa: E402
    CerebrasEstimator,
    CSEstimatorSpec,
    CSRunConfig,
    Trainer,
)

v1 = tf.compat.v1


def data(params: Any = None) -> Any:
    x = np.random.RandomState(0).randn(8, 4).astype(np.float32)
    dataset = tf.data.Dataset.from_tensor_slices((x, np.arange(8, dtype=np.int32) % 3))
    return dataset.repeat().batch(4, drop_remainder=True).prefetch(1)


def estimator(model_fn: Any, folder: Path, **config: Any) -> Any:
    settings = CSRunConfig(cs_ip="local", tf_random_seed=1, **config)
    return CerebrasEstimator(model_fn, model_dir=str(folder), config=settings)


def model_with(update: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A linear model whose train_op is `update(loss, global step)`."""

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        logits = tf.keras.layers.Dense(3)(features)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        loss = tf.reduce_mean(losses)
        step = v1.train.get_or_create_global_step()
        return CSEstimatorSpec(mode, loss=loss, train_op=update(loss, step))

    return model_fn


def refused(update: Callable[[Any, Any], Any], folder: Path, what: str) -> OpenWaferError:
    with pytest.raises(CaptureError, match=what) as caught:
        estimator(model_with(update), folder).compile(data, validate_only=True)
    return caught.value


def sgd() -> Any:
    return v1.train.GradientDescentOptimizer(0.1)


def clipped_by_each_norm(loss: Any, step: Any) -> Any:
    pairs = sgd().compute_gradients(loss)
    return sgd().apply_gradients([(tf.clip_by_norm(g, 1.0), v) for g, v in pairs], step)


def of_some_gradients(loss: Any, step: Any) -> Any:
    pairs = sgd().compute_gradients(loss)
    first, _ = tf.clip_by_global_norm([pairs[0][0]], 1.0)
    return sgd().apply_gradients([(first[0], pairs[0][1]), pairs[1]], step)


def unknown_optimizer(loss: Any, step: Any) -> Any:
    return v1.train.FtrlOptimizer(0.1).minimize(loss, step)


def rate_of_a_variable(loss: Any, step: Any) -> Any:
    rate = v1.get_variable("rate", initializer=0.1, trainable=False)
    return v1.train.GradientDescentOptimizer(rate).minimize(loss, step)


def moving_average_of_weights(loss: Any, step: Any) -> Any:
    update = sgd().minimize(loss, step)
    with tf.control_dependencies([update]):
        return tf.train.ExponentialMovingAverage(0.9).apply(v1.trainable_variables())


def other_loss(loss: Any, step: Any) -> Any:
    return sgd().minimize(loss + tf.nn.l2_loss(v1.trainable_variables()[0]), step)


def scale_left_in(loss: Any, step: Any) -> Any:
    return sgd().minimize(loss * 8.0, step)


def two_optimizers(loss: Any, step: Any) -> Any:
    return tf.group(sgd().minimize(loss, step), v1.train.AdamOptimizer().minimize(loss))


@pytest.mark.parametrize(
    ("update", "what"),
    [
        (clipped_by_each_norm, "is not understood"),
        (of_some_gradients, "is not understood"),
        (unknown_optimizer, "FtrlOptimizer is not known"),
        (rate_of_a_variable, "the learning rate depends on the variable rate"),
        (moving_average_of_weights, "besides the optimizer"),
        (other_loss, "not the one that model_fn returns"),
        (scale_left_in, "8 times those of the loss"),
        (two_optimizers, "several optimizers"),
        (lambda loss, step: sgd().minimize(loss), "does not count the global step"),
        (lambda loss, step: v1.assign_add(step, 1), "no optimizer"),
    ],
)
def test_train_ops_that_are_not_understood(
    update: Callable[[Any, Any], Any], what: str, tmp_path: Path
) -> None:
    error = refused(update, tmp_path, what)
    assert error.allowed
    if "8 times" not in what:
        assert re.search(r"test_tf_refusals\.py:\d+$", error.where), error.where


def test_operations_that_are_not_taken_are_listed_with_their_lines(tmp_path: Path) -> None:
    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        sorted_ = tf.sort(features)
        chosen = tf.boolean_mask(features, features[:, 0] > 0)
        loss = tf.reduce_sum(sorted_) + tf.reduce_sum(tf.linalg.inv(tf.eye(2) * chosen[0, 0]))
        total = loss * v1.get_variable("w", initializer=1.0)
        step = v1.train.get_or_create_global_step()
        return CSEstimatorSpec(mode, loss=total, train_op=sgd().minimize(total, step))

    with pytest.raises(UnsupportedOpError) as caught:
        estimator(model_fn, tmp_path).compile(data, validate_only=True)
    text = str(caught.value)
    assert "tf.MatrixInverse" in text
    assert "tf.Where" in text
    assert text.count(Path(__file__).name) >= 2


def test_batches_of_unknown_size(tmp_path: Path) -> None:
    def ragged(params: Any = None) -> Any:
        return data().unbatch().batch(3)

    model_fn = model_with(lambda loss, step: sgd().minimize(loss, step))
    with pytest.raises(DataError, match="of shape") as caught:
        estimator(model_fn, tmp_path).train(ragged, steps=1)
    assert "drop_remainder" in caught.value.hint


def test_input_functions_that_fail_show_their_line(tmp_path: Path) -> None:
    def broken(params: Any = None) -> Any:
        raise KeyError("batch_size")

    model_fn = model_with(lambda loss, step: sgd().minimize(loss, step))
    with pytest.raises(DataError, match="KeyError") as caught:
        estimator(model_fn, tmp_path).train(broken, steps=1)
    assert Path(__file__).name in caught.value.where
    with pytest.raises(DataError, match="gave list"):
        estimator(model_fn, tmp_path).train(lambda: [1], steps=1)


def test_hooks_and_damaged_checkpoints(tmp_path: Path) -> None:
    model_fn = model_with(lambda loss, step: sgd().minimize(loss, step))
    with pytest.raises(ConfigError, match="hook of type object"):
        estimator(model_fn, tmp_path).train(data, hooks=[object()], steps=1)
    estimator(model_fn, tmp_path).train(data, steps=1)
    for file in tmp_path.glob("model.ckpt-1.data*"):
        file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(CheckpointError, match="cannot be read"):
        estimator(model_fn, tmp_path).train(data, steps=1)


def test_checkpoints_of_another_model(tmp_path: Path) -> None:
    estimator(model_with(lambda loss, step: sgd().minimize(loss, step)), tmp_path).train(
        data, steps=1
    )
    other = model_with(lambda loss, step: v1.train.AdamOptimizer().minimize(loss, step))
    with pytest.raises(CheckpointError, match="lacks beta1_power"):
        estimator(other, tmp_path).train(data, steps=1)


def test_host_calls_of_another_form() -> None:
    with pytest.raises(CaptureError, match="host_call"):
        CSEstimatorSpec("eval", host_call=("not a function", []), loss=None)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"optimizer_type": "adamm"}, "optimizer_type"),
        ({"optimizer_type": "adam", "beta_1": 0.9}, "beta_1"),
        ({"optimizer_type": "sgd", "max_gradient_norm": 1, "max_gradient_value": 1}, "exclude"),
        ({"optimizer_type": "sgd", "learning_rate": {"scheduler": "Linear"}}, "Linear|missing"),
    ],
)
def test_mistakes_in_the_optimizer_section(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Trainer({"learning_rate": 0.1, **options})

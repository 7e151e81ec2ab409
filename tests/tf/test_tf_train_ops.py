"""Loss scales, accumulation, optimizers and schedules: compiled as TensorFlow itself trains."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tf_models import images, linear_model, sentences, sequence_model  # noqa: E402
from training_harness import MODES, check_training, estimator, first_checkpoint  # noqa: E402

from openwafer.errors import CaptureError, ConfigError  # noqa: E402
from openwafer.optim.loss_scale import LossScaler  # noqa: E402
from openwafer.tf import (  # noqa: E402
    CerebrasEstimator,
    CSDynamicLossScale,
    CSEstimatorSpec,
    CSRunConfig,
    GradAccumOptimizer,
    TFBaseModel,
    Trainer,
    create_warm_start_settings,
    get_grad_accum_hooks,
    wrap_optimizer,
)

v1 = tf.compat.v1
FEW = 6


def adam() -> Any:
    return v1.train.AdamOptimizer(0.01)


def trained_by(options: dict[str, Any]) -> Callable[..., Any]:
    return linear_model(lambda loss, step: Trainer(options).build_train_ops(loss))


# ---------------------------------------------------------------- optimizers

TRAINERS: dict[str, dict[str, Any]] = {
    "rmsprop": {"optimizer_type": "rmsprop", "learning_rate": 0.002},
    "rmsprop with momentum and a rate that decays": {
        "optimizer_type": "rmsprop",
        "rmsprop_momentum": 0.9,
        "max_gradient_norm": 0.5,
        "learning_rate": {
            "scheduler": "Exponential",
            "initial_learning_rate": 0.002,
            "decay_steps": 3,
            "decay_rate": 0.5,
        },
    },
    "dynamic loss scale": {
        "optimizer_type": "adam",
        "learning_rate": 0.002,
        "loss_scaling_factor": "dynamic",
    },
    "TensorFlow's dynamic loss scale": {
        "optimizer_type": "adamw",
        "learning_rate": 0.002,
        "loss_scaling_factor": "tf_dynamic",
    },
    "accumulation": {"optimizer_type": "sgd", "learning_rate": 0.1, "grad_accum_steps": 3},
    "all together": {
        "optimizer_type": "adam",
        "learning_rate": 0.002,
        "grad_accum_steps": 2,
        "loss_scaling_factor": "dynamic",
        "steps_per_increase": 2,
        "initial_loss_scale": 4.0,
        "max_gradient_norm": 0.5,
        "log_summaries": True,
        "ws_summary": True,
    },
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer(tmp_path: Path, name: str) -> None:
    options = TRAINERS[name]
    num_batches = options.get("grad_accum_steps", 1)
    check_training(trained_by(options), images, tmp_path, steps=FEW, num_batches=num_batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_for_fifty_steps(tmp_path: Path, name: str) -> None:
    options = TRAINERS[name]
    num_batches = options.get("grad_accum_steps", 1)
    check_training(sequence_model(options), sentences, tmp_path, num_batches=num_batches)


def test_a_centered_rmsprop(tmp_path: Path) -> None:
    def update(loss: Any, step: Any) -> Any:
        optimizer = v1.train.RMSPropOptimizer(0.002, 0.8, 0.5, 1e-3, centered=True)
        return optimizer.minimize(loss, step)

    check_training(linear_model(update), images, tmp_path, steps=FEW)


# ---------------------------------------------------------------- schedules

SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "Constant": ({"learning_rate": 0.3}, lambda step: tf.constant(0.3)),
    "Exponential": (
        {"initial_learning_rate": 0.3, "decay_steps": 4, "decay_rate": 0.5, "staircase": True},
        lambda step: v1.train.exponential_decay(0.3, step, 4, 0.5, staircase=True),
    ),
    "Linear": (
        {"initial_learning_rate": 0.3, "end_learning_rate": 0.1, "steps": 7},
        lambda step: v1.train.polynomial_decay(0.3, step, 7, 0.1),
    ),
    "Polynomial": (
        {"initial_learning_rate": 0.3, "end_learning_rate": 0.1, "steps": 7, "power": 2.0},
        lambda step: v1.train.polynomial_decay(0.3, step, 7, 0.1, power=2.0),
    ),
    "PiecewiseConstant": (
        {"values": [0.3, 0.2, 0.1], "boundaries": [3, 6]},
        # At a boundary itself TensorFlow still has the value before it.
        lambda step: v1.train.piecewise_constant(step, [2, 5], [0.3, 0.2, 0.1]),
    ),
    "Cosine": (
        {"initial_learning_rate": 0.3, "decay_steps": 7, "alpha": 0.1},
        lambda step: v1.train.cosine_decay(0.3, step, 7, alpha=0.1),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_the_one_of_tensorflow(name: str) -> None:
    form, reference = SCHEDULES[name]
    with tf.Graph().as_default(), v1.Session() as session:
        step = v1.train.get_or_create_global_step()
        options = {"optimizer_type": "sgd", "learning_rate": {"scheduler": name, **form}}
        rate, expected = tf.convert_to_tensor(Trainer(options).get_learning_rate()), reference(step)
        for at in range(10):
            session.run(step.assign(at))
            found = session.run([rate, expected])
            assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9), at


# ---------------------------------------------------------------- loss scale


@settings(max_examples=20)
@given(
    overflows=st.lists(st.booleans(), max_size=25),
    period=st.integers(1, 5),
    tolerance=st.sampled_from([0.0, 0.05, 0.3, 0.6]),
)
def test_the_loss_scale_of_a_graph_is_that_of_the_runtime(
    overflows: list[bool], period: int, tolerance: float
) -> None:
    rule = {"min_scale": 0.5, "max_scale": 64.0, "overflow_tolerance": tolerance}
    ours = LossScaler(initial_scale=8.0, dynamic=True, steps_per_increase=period, **rule)
    with tf.Graph().as_default(), v1.Session() as session:
        scale = CSDynamicLossScale(8.0, period, 2.0, 0.5, 64.0, tolerance)
        norm = v1.placeholder(tf.float32, [])
        update, finite = scale.update([norm])
        session.run(v1.global_variables_initializer())
        for overflowed in overflows:
            value = np.inf if overflowed else 1.0
            _, was_finite = session.run([update, finite], {norm: value})
            ours.update(overflowed=overflowed)
            assert bool(was_finite) is not overflowed
            assert session.run(scale()) == ours.scale


def large_linear_model(features: Any, labels: Any, mode: str) -> Any:
    """Gradients beyond float32 until the scale has been halved some times, and again where it has
    been doubled."""

    def update(loss: Any, step: Any) -> Any:
        scale = CSDynamicLossScale(2.0**127, 3, 2.0, 1.0, 2.0**127)
        return wrap_optimizer(adam(), scale).minimize(loss, step)

    return linear_model(update)({"image": features["image"] * 1000.0}, labels, mode)


def test_steps_that_overflow_are_skipped_by_all(tmp_path: Path) -> None:
    """Adam's bias correction counts the others only, also in a run that goes on."""
    ends = check_training(large_linear_model, images, tmp_path, steps=12)
    for mode, config in {"plain": {}, **MODES}.items():
        estimator(large_linear_model, ends[mode], **config).train(images, max_steps=16)
    readers = {mode: tf.train.load_checkpoint(str(end)) for mode, end in ends.items()}
    for mode in MODES:
        for name in readers["plain"].get_variable_to_shape_map():
            mine, theirs = (readers[m].get_tensor(name) for m in (mode, "plain"))
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-6, err_msg=name)
    plain = readers["plain"]
    assert plain.get_tensor("global_step") == 16
    assert plain.get_tensor("current_loss_scale") < 2.0**124
    applied = np.log(plain.get_tensor("beta2_power")) / np.log(0.999) - 1
    assert 0 < applied < 15, "some steps were skipped, and some were not"


def test_loss_scales_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiplier 3"):
        CSDynamicLossScale(multiplier=3)
    scale = v1.mixed_precision.DynamicLossScale

    def tripled(loss: Any, step: Any) -> Any:
        return wrap_optimizer(adam(), scale(8.0, 10, 3.0)).minimize(loss, step)

    def twice(loss: Any, step: Any) -> Any:
        return wrap_optimizer(wrap_optimizer(adam(), 8.0), 4.0).minimize(loss, step)

    refused(tripled, tmp_path, "loss scale")
    refused(twice, tmp_path, "more than one loss scale")


# ---------------------------------------------------------------- accumulation


def refused(update: Callable[[Any, Any], Any], folder: Path, what: str) -> Any:
    with pytest.raises(CaptureError, match=what) as caught:
        estimator(linear_model(update), folder, **MODES["layer_pipelined"]).train(images, steps=1)
    assert caught.value.allowed
    return caught.value


def test_an_optimizer_that_accumulates(tmp_path: Path) -> None:
    def update(loss: Any, step: Any) -> Any:
        return GradAccumOptimizer(wrap_optimizer(adam(), 16.0), 2).minimize(loss, step)

    check_training(linear_model(update), images, tmp_path, steps=FEW, num_batches=2)


def test_clipping_between_the_halves(tmp_path: Path) -> None:
    def update(loss: Any, step: Any) -> Any:
        optimizer = GradAccumOptimizer(adam(), 2)
        pairs = optimizer.accumulate(optimizer.compute_gradients(loss))
        clipped, _ = tf.clip_by_global_norm([gradient for gradient, _ in pairs], 0.1)
        return optimizer.apply_mean(list(zip(clipped, [v for _, v in pairs], strict=True)), step)

    check_training(linear_model(update), images, tmp_path, steps=FEW, num_batches=2)


def test_what_accumulation_cannot_be_combined_with(tmp_path: Path) -> None:
    def clipped_first(loss: Any, step: Any) -> Any:
        optimizer = GradAccumOptimizer(adam(), 2)
        pairs = optimizer.compute_gradients(loss)
        clipped, _ = tf.clip_by_global_norm([gradient for gradient, _ in pairs], 0.1)
        return optimizer.apply_gradients(
            list(zip(clipped, [v for _, v in pairs], strict=True)), step
        )

    def scaled_outside(loss: Any, step: Any) -> Any:
        return wrap_optimizer(GradAccumOptimizer(adam(), 2), 8.0).minimize(loss, step)

    refused(clipped_first, tmp_path, "before they are accumulated")
    refused(scaled_outside, tmp_path, "loss scale stands around")
    with pytest.raises(ConfigError, match="grad_accum_steps is 0"):
        GradAccumOptimizer(adam(), 0)


def test_hooks_of_accumulation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Means over the batches of a step, at global steps; a compiled run needs none of them."""
    trainer_options = {"optimizer_type": "sgd", "learning_rate": 0.1, "grad_accum_steps": 3}
    runconfig = {"model_dir": str(tmp_path), "save_summary_steps": 2, "log_step_count_steps": 2}
    seen: list[float] = []

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        trainer: list[Trainer] = []

        def update(loss: Any, step: Any) -> Any:
            trainer.append(Trainer(trainer_options))
            return trainer[0].build_train_ops(loss)

        spec = linear_model(update)(features, labels, mode)
        scalars = {"cost": spec.loss}
        hooks = get_grad_accum_hooks(trainer[0], runconfig, scalars, scalars)
        assert len(hooks) == 3
        return spec._replace(training_hooks=hooks)

    class Each(tf.estimator.SessionRunHook):
        def begin(self) -> None:
            self._loss = v1.get_collection(v1.GraphKeys.LOSSES)[-1]

        def before_run(self, run_context: Any) -> Any:
            return tf.estimator.SessionRunArgs(self._loss)

        def after_run(self, run_context: Any, run_values: Any) -> None:
            seen.append(float(run_values.results))

    with caplog.at_level(logging.INFO, logger="openwafer"):
        estimator(model_fn, tmp_path).train(images, hooks=[Each()], max_steps=4)
    assert len(seen) == 12, "three batches for each of four steps"
    logged = re.findall(r"global step (\d+): cost = ([\d.]+)", caplog.text)
    assert [int(step) for step, _ in logged] == [2, 4]
    means = np.reshape(seen, (4, 3)).mean(1)
    np.testing.assert_allclose([float(v) for _, v in logged], means[[1, 3]], rtol=1e-5)
    assert caplog.text.count("global_step/sec") == 2
    np.testing.assert_allclose(events(tmp_path)["cost"], means[[1, 3]], rtol=1e-6)
    caplog.clear()
    own = estimator(model_fn, tmp_path, **MODES["layer_pipelined"])
    with caplog.at_level(logging.WARNING, logger="openwafer"):
        own.train(images, steps=1)
    assert "training_hooks" not in caplog.text


def events(folder: Path) -> dict[str, list[float]]:
    """Scalars by tag."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append(value.simple_value)
                elif value.tensor.dtype:
                    found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    return found


def test_the_documented_summaries(tmp_path: Path) -> None:
    """The same tags and numbers from TensorFlow itself and from a compiled run."""
    options = {
        "optimizer_type": "sgd",
        "learning_rate": {"scheduler": "Linear", "initial_learning_rate": 0.1,
                          "end_learning_rate": 0.0, "steps": 8},
        "loss_scaling_factor": "dynamic",
        "max_gradient_norm": 0.5,
        "log_summaries": True,
    }  # fmt: skip
    found = {}
    start = first_checkpoint(trained_by(options), images, tmp_path / "start")
    for name, config in {"plain": {}, "compiled": MODES["weight_streaming"]}.items():
        folder = tmp_path / name
        copy_checkpoint(start, folder)
        own = estimator(trained_by(options), folder, save_summary_steps=1, **config)
        own.train(images, max_steps=5)
        found[name] = events(folder if name == "plain" else folder / "train")
    for tag in ("train/lr", "train/unclipped_grad_norm", "train/loss_scale"):
        assert len(found["plain"][tag]) == 4, tag
        np.testing.assert_allclose(found["compiled"][tag], found["plain"][tag], rtol=1e-5)


def copy_checkpoint(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in [*source.glob("model.ckpt-*"), source / "checkpoint"]:
        (target / path.name).write_bytes(path.read_bytes())


# ---------------------------------------------------------------- 16 bits


def mixed_model(policy: Any) -> Callable[..., Any]:
    """Convolution, normalization, attention over the pixels and dense layers, with one policy."""

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        keras = tf.keras.layers
        net = keras.Conv2D(8, 3, activation="relu", dtype=policy)(features["image"])
        net = keras.BatchNormalization(dtype=policy)(net, training=mode == "train")
        net = keras.Reshape((36, 8), dtype=policy)(net)
        net = net + keras.MultiHeadAttention(2, 4, dtype=policy)(net, net)
        net = keras.LayerNormalization(dtype=policy)(net)
        net = keras.Flatten(dtype=policy)(net)
        logits = keras.Dense(4, dtype=policy, name="head")(net)
        logits = tf.cast(logits, tf.float32)
        loss = v1.losses.sparse_softmax_cross_entropy(labels, logits)
        if mode != "train":
            return CSEstimatorSpec(mode, loss=loss)
        options = {"optimizer_type": "adamw", "learning_rate": 1e-3}
        trainer = Trainer({**options, "loss_scaling_factor": "dynamic"}, mixed_precision=True)
        train_op = trainer.build_train_ops(loss)
        return CSEstimatorSpec(mode, loss=loss, train_op=train_op)

    return model_fn


class Policies(TFBaseModel):
    """Only for its policy."""

    def build_model(self, features: Any, mode: str) -> Any: ...
    def build_total_loss(
        self, model_outputs: Any, features: Any, labels: Any, mode: str
    ) -> Any: ...
    def build_train_ops(self, total_loss: Any) -> Any: ...
    def build_eval_metric_ops(
        self, model_outputs: Any, labels: Any, features: Any = None
    ) -> Any: ...


@pytest.mark.parametrize(
    ("mixed", "rtol"),
    [(True, 4e-3), pytest.param("mixed_bfloat16", 3e-2, marks=pytest.mark.slow)],
)
def test_mixed_precision(tmp_path: Path, mixed: bool | str, rtol: float) -> None:
    """The casts are those of the graph. Tolerances: a few units in the last place of float16
    (2^-11) and of bfloat16 (2^-8), which ten layers and six steps carry along."""
    policy = Policies(mixed).policy
    check_training(
        mixed_model(policy), images, tmp_path, steps=FEW, rtol=rtol, same_checkpoints=False
    )


def test_precisions_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="mixed_float8"):
        Policies("mixed_float8")


# ---------------------------------------------------------------- optimizers of Keras


@pytest.mark.parametrize("kind", ["legacy", "new"])
def test_optimizers_of_keras_are_refused_with_the_line(tmp_path: Path, kind: str) -> None:
    """`minimize` of a tensor is not possible in a graph with them; `apply_gradients` is."""
    module = tf.keras.optimizers.legacy if kind == "legacy" else tf.keras.optimizers

    def update(loss: Any, step: Any) -> Any:
        weights = v1.trainable_variables()
        gradients = tf.gradients(loss, weights)
        optimizer = module.RMSprop(0.1)
        applied = optimizer.apply_gradients(list(zip(gradients, weights, strict=True)))
        return tf.group(applied, step.assign_add(1))

    error = refused(update, tmp_path, "tf.keras.optimizers.RMSprop")
    assert Path(__file__).name in error.where
    assert "tf.compat.v1.train.RMSPropOptimizer" in error.hint


# ---------------------------------------------------------------- weights of another run


def test_warm_start_without_the_output_layer(tmp_path: Path) -> None:
    def two_layers(features: Any, labels: Any, mode: str) -> Any:
        hidden = tf.keras.layers.Dense(8, name="body")(features["image"])
        net = {"image": tf.nn.relu(hidden)}
        return linear_model(lambda loss, step: adam().minimize(loss, step))(net, labels, mode)

    start = first_checkpoint(two_layers, images, tmp_path / "start")
    assert create_warm_start_settings({}) is None
    params = {"checkpoint_path": str(start)}
    held = tf.train.load_checkpoint(str(start))
    for excluded, name in ((None, "all"), ("dense", "body")):
        warm = create_warm_start_settings(params, excluded)
        for config in ({}, MODES["layer_pipelined"]):
            folder = tmp_path / f"{name}-{bool(config)}"
            own = CerebrasEstimator(
                two_layers,
                model_dir=str(folder),
                config=CSRunConfig(tf_random_seed=7, save_checkpoints_steps=1, **config),
                params={},
                warm_start_from=warm,
            )
            own.train(images, max_steps=1)
            first = tf.train.load_checkpoint(str(folder / "model.ckpt-0"))
            for variable, taken in (("body/kernel", True), ("dense/kernel", excluded is None)):
                same = np.array_equal(first.get_tensor(variable), held.get_tensor(variable))
                assert same is taken, (name, variable)

"""Training: TensorFlow itself and both compiled modes give the same losses and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from tf_models import classifier_of_2021, images, sentences, sequence_model  # noqa: E402

from openwafer.tf import CerebrasEstimator, CSRunConfig  # noqa: E402

MODES = {
    "layer_pipelined": {"cs_ip": "local", "execution_mode": "layer_pipelined"},
    "weight_streaming": {"cs_ip": "local", "execution_mode": "weight_streaming"},
}
STEPS = 50


class Losses(tf.estimator.SessionRunHook):
    """The loss of each step that TensorFlow itself makes."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def begin(self) -> None:
        # The Estimator keeps the loss there.
        self._loss = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.LOSSES)[-1]

    def before_run(self, run_context: Any) -> Any:
        return tf.estimator.SessionRunArgs(self._loss)

    def after_run(self, run_context: Any, run_values: Any) -> None:
        self.values.append(float(run_values.results))


def estimator(model_fn: Any, folder: Path, **config: Any) -> Any:
    run_config = CSRunConfig(
        tf_random_seed=1, log_step_count_steps=1, save_checkpoints_steps=STEPS, **config
    )
    return CerebrasEstimator(
        model_fn, model_dir=str(folder), config=run_config, params={"repeat": True}
    )


def first_checkpoint(model_fn: Any, data: Any, folder: Path) -> Path:
    """A folder with TensorFlow's own `model.ckpt-1`, for all to go on from."""
    estimator(model_fn, folder).train(lambda params: data(params), steps=1)
    return folder


def logged_losses(folder: Path) -> list[float]:
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check_training(model_fn: Any, data: Callable[..., Any], folder: Path) -> None:
    start = first_checkpoint(model_fn, data, folder / "start")
    plain = folder / "plain"
    shutil.copytree(start, plain)
    hook = Losses()
    estimator(model_fn, plain).train(lambda params: data(params), hooks=[hook], max_steps=STEPS)
    ends = {"plain": plain}
    for mode, config in MODES.items():
        ends[mode] = folder / mode
        shutil.copytree(start, ends[mode])
        estimator(model_fn, ends[mode], **config).train(
            lambda params: data(params), max_steps=STEPS
        )
        np.testing.assert_allclose(logged_losses(ends[mode]), hook.values, rtol=1e-5, atol=1e-7)
    check_checkpoints(ends)
    check_evaluations(model_fn, data, ends)


def check_checkpoints(ends: dict[str, Path]) -> None:
    reader = tf.train.load_checkpoint(str(ends["plain"]))
    names = sorted(reader.get_variable_to_shape_map())
    for mode in MODES:
        other = tf.train.load_checkpoint(str(ends[mode]))
        assert sorted(other.get_variable_to_shape_map()) == names
        for name in names:
            mine, theirs = other.get_tensor(name), reader.get_tensor(name)
            assert mine.dtype == theirs.dtype, name
            # Averages of gradients near zero are sums of what cancels.
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-6, err_msg=name)


def check_evaluations(model_fn: Any, data: Any, ends: dict[str, Path]) -> None:
    """TensorFlow evaluates each checkpoint alike, and the compiled modes as TensorFlow does."""
    found = {}
    for mode, end in ends.items():
        plain = estimator(model_fn, end)
        found[mode] = plain.evaluate(lambda params: data({"repeat": False}))
        if mode in MODES:
            own = estimator(model_fn, end, **MODES[mode]).evaluate(
                lambda params: data({"repeat": False}), use_cs=True
            )
            for key in found[mode]:
                np.testing.assert_allclose(own[key], found[mode][key], rtol=1e-5, err_msg=key)
    for mode in MODES:
        for key, value in found["plain"].items():
            np.testing.assert_allclose(found[mode][key], value, rtol=2e-5, err_msg=key)


def test_a_model_as_users_of_2021_wrote_it(tmp_path: Path) -> None:
    check_training(classifier_of_2021, images, tmp_path)


@pytest.mark.parametrize(
    "optimizer",
    [
        {
            "optimizer_type": "adamw",
            "weight_decay_rate": 0.01,
            "max_gradient_norm": 1.0,
            "learning_rate": [
                {
                    "scheduler": "Linear",
                    "initial_learning_rate": 0.0,
                    "end_learning_rate": 0.002,
                    "steps": 10,
                },
                {
                    "scheduler": "CosineDecay",
                    "initial_learning_rate": 0.002,
                    "end_learning_rate": 0.0002,
                    "decay_steps": 40,
                },
            ],
        },
        {"optimizer_type": "momentum", "learning_rate": 0.05, "max_gradient_value": 0.1},
        {"optimizer_type": "adam", "learning_rate": 0.002, "loss_scaling_factor": 8.0},
        {"optimizer_type": "sgd", "learning_rate": 0.1},
    ],
    ids=lambda options: options["optimizer_type"],
)
def test_a_model_of_sequences(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    check_training(sequence_model(optimizer), sentences, tmp_path)


def test_a_run_goes_from_one_to_the_other_and_back(tmp_path: Path) -> None:
    """In pieces of ten steps, the data from the front in each: one way, and alternating."""
    start = first_checkpoint(classifier_of_2021, images, tmp_path / "start")
    ends = {}
    for name, kinds in {
        "tensorflow": ({}, {}, {}),
        "alternating": ({}, MODES["layer_pipelined"], {}),
        "streaming last": ({}, {}, MODES["weight_streaming"]),
    }.items():
        shutil.copytree(start, tmp_path / name)
        for config in kinds:
            estimator(classifier_of_2021, tmp_path / name, **config).train(
                lambda params: images(params), steps=10
            )
        plain = estimator(classifier_of_2021, tmp_path / name)
        ends[name] = plain.evaluate(lambda params: images({"repeat": False}))
    for name in ("alternating", "streaming last"):
        for key, value in ends["tensorflow"].items():
            np.testing.assert_allclose(ends[name][key], value, rtol=2e-5, err_msg=key)


def test_warm_start_takes_weights_and_begins_at_step_0(tmp_path: Path) -> None:
    first_checkpoint(classifier_of_2021, images, tmp_path / "pretrained")
    ends = {}
    for name, config in {"tensorflow": {}, "compiled": MODES["layer_pipelined"]}.items():
        run_config = CSRunConfig(tf_random_seed=1, save_checkpoints_steps=5, **config)
        CerebrasEstimator(
            classifier_of_2021,
            model_dir=str(tmp_path / name),
            config=run_config,
            params={},
            warm_start_from=tf.estimator.WarmStartSettings(str(tmp_path / "pretrained"), ".*"),
        ).train(lambda params: images(params), max_steps=5)
        reader = tf.train.load_checkpoint(str(tmp_path / name))
        assert reader.get_tensor("global_step") == 5
        ends[name] = reader.get_tensor("conv2d/kernel")
    np.testing.assert_allclose(ends["compiled"], ends["tensorflow"], rtol=1e-4, atol=1e-6)

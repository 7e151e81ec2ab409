"""Training: TensorFlow itself and both compiled modes give the same losses and checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from tf_models import classifier_of_2021, images, sentences, sequence_model  # noqa: E402
from training_harness import MODES, check_training, estimator, first_checkpoint  # noqa: E402

from openwafer.errors import ConfigError  # noqa: E402
from openwafer.tf import CerebrasEstimator, CSRunConfig  # noqa: E402
from openwafer.train.run_lock import LOCK_NAME, training_lock  # noqa: E402


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
@pytest.mark.slow
def test_a_model_of_sequences(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    check_training(sequence_model(optimizer), sentences, tmp_path)


def test_a_second_training_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    """As it would be after the compilation, but without waiting for that."""

    def not_yet(*_: Any) -> Any:
        raise AssertionError("the model is built")

    with training_lock(tmp_path), pytest.raises(ConfigError, match="another training writes"):
        estimator(not_yet, tmp_path, **MODES["layer_pipelined"]).train(images, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


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

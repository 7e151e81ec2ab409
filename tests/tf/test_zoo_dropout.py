"""Dropout of the zoo's TensorFlow models in compiled runs: how much, and that runs repeat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from test_zoo_gpt2 import SMALL  # noqa: E402
from training_harness import MODES, logged_losses  # noqa: E402
from zoo_harness import Twin, twin  # noqa: E402

from openwafer.tf import CerebrasEstimator, CSEstimatorSpec, CSRunConfig  # noqa: E402
from openwafer.zoo.tf.activations import dropout  # noqa: E402
from openwafer.zoo.tf.functions import input_fn_of  # noqa: E402

SHAPE, STEPS = (64, 512), 4


def masked_ones(rate: float, power: int) -> Any:
    """A model whose loss is the mean of the power of ones behind dropout."""

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        weight = tf.compat.v1.get_variable("weight", initializer=tf.constant(1.0))
        kept = dropout(features["ones"] * weight, rate, mode == "train")
        loss = tf.reduce_mean(kept**power)
        if mode != "train":
            return CSEstimatorSpec(mode, loss=loss)
        step = tf.compat.v1.train.get_global_step()
        optimizer = tf.compat.v1.train.GradientDescentOptimizer(0.0)
        return CSEstimatorSpec(mode, loss=loss, train_op=optimizer.minimize(loss, step))

    return model_fn


def ones() -> Any:
    return tf.data.Dataset.from_tensors({"ones": np.ones(SHAPE, np.float32)}).repeat(STEPS)


def run(model_fn: Any, folder: Path, config: Mapping[str, Any], *, seed: int = 1) -> Any:
    options = {"tf_random_seed": seed, "log_step_count_steps": 1, **config}
    return CerebrasEstimator(model_fn, model_dir=str(folder), config=CSRunConfig(**options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_and_the_scale_of_what_is_kept(tmp_path: Path, mode: str, rate: float) -> None:
    """Of means k·s and mean squares k·s², k is the share that is kept and s its scale."""
    means: dict[int, np.ndarray] = {}
    for power in (1, 2):
        folder = tmp_path / str(power)
        estimator = run(masked_ones(rate, power), folder, MODES[mode])
        estimator.train(ones, steps=STEPS)
        means[power] = np.array(logged_losses(folder))
        assert estimator.evaluate(ones, 1, use_cs=True)["loss"] == pytest.approx(1.0, abs=1e-6)
    scale = means[2] / means[1]
    np.testing.assert_allclose(scale, 1 / (1 - rate), rtol=1e-5)
    kept = means[1] / scale
    deviation = math.sqrt(rate * (1 - rate) / math.prod(SHAPE))
    np.testing.assert_allclose(kept, 1 - rate, rtol=0, atol=4 * deviation)
    assert len(set(kept)) == STEPS, "each step draws anew"


def with_dropout(of: Twin, rate: float) -> Twin:
    config = of.config
    rates = [f.name for f in fields(config) if "dropout" in f.name]
    chosen = {r: rate for r in rates if isinstance(getattr(config, r), float)}
    assert chosen
    return replace(of, config=replace(config, **chosen))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("fc_mnist/tiny", ()),
        ("gpt2/tiny", SMALL),
        ("bert_ner/tiny", ()),
        ("t5/tiny", ()),
    ],
)
def test_a_seed_gives_the_same_run_in_both_modes(
    tmp_path: Path, name: str, overrides: list[str]
) -> None:
    plain = twin(name, overrides)
    of = with_dropout(plain, 0.3)
    start = tmp_path / "start"
    data = input_fn_of(of.train, seed=1, repeats=True)
    run(of.model_fn(), start, {}).train(data, steps=1)

    def losses(which: Twin, case: str, mode: str, seed: int = 1) -> list[float]:
        folder = tmp_path / case
        # The weights of one run, the step of a new one.
        config = CSRunConfig(tf_random_seed=seed, log_step_count_steps=1, **MODES[mode])
        estimator = CerebrasEstimator(
            which.model_fn(), model_dir=str(folder), config=config, warm_start_from=str(start)
        )
        estimator.train(data, steps=3)
        return logged_losses(folder)

    found = losses(of, "pipelined", "layer_pipelined")
    np.testing.assert_allclose(losses(of, "streamed", "weight_streaming"), found, rtol=1e-5)
    assert losses(of, "again", "layer_pipelined") == found
    for case, other in {
        "other seed": losses(of, "other seed", "layer_pipelined", seed=2),
        "none": losses(plain, "none", "layer_pipelined"),
    }.items():
        assert not np.isclose(other, found, rtol=1e-4).any(), case
    # None in an evaluation: TensorFlow itself gives the same.
    evaluation = input_fn_of(of.evaluation, seed=1, repeats=False)
    compiled, theirs = (
        run(of.model_fn(), tmp_path / "pipelined", config).evaluate(
            evaluation, 2, use_cs=bool(config)
        )
        for config in (MODES["layer_pipelined"], {})
    )
    np.testing.assert_allclose(compiled["loss"], theirs["loss"], rtol=1e-5)

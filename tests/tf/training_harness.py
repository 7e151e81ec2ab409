"""Trains a model_fn by TensorFlow itself and in both compiled modes, from one first checkpoint.

The reference is TensorFlow's own Estimator: the losses of all steps, every variable of the last
checkpoint, and what it evaluates to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openwafer.frontends.tf.library import tf
from openwafer.tf import CerebrasEstimator, CSRunConfig

MODES = {
    "layer_pipelined": {"cs_ip": "local", "execution_mode": "layer_pipelined"},
    "weight_streaming": {"cs_ip": "local", "execution_mode": "weight_streaming"},
}
STEPS = 50


class Losses(tf.estimator.SessionRunHook):
    """The loss of each batch that TensorFlow itself trains on."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def begin(self) -> None:
        # The Estimator keeps the loss there.
        self._loss = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.LOSSES)[-1]

    def before_run(self, run_context: Any) -> Any:
        return tf.estimator.SessionRunArgs(self._loss)

    def after_run(self, run_context: Any, run_values: Any) -> None:
        self.values.append(float(run_values.results))

    def of_steps(self, num_batches: int) -> Any:
        """Means over the batches of each step."""
        return np.reshape(self.values, (-1, num_batches)).mean(1)


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


def check_training(
    model_fn: Any,
    data: Callable[..., Any],
    folder: Path,
    *,
    steps: int = STEPS,
    num_batches: int = 1,
    rtol: float = 1e-5,
    same_checkpoints: bool = True,
) -> dict[str, Path]:
    """Check `steps` steps of `num_batches` batches each; gives the folders of the three runs."""
    start = first_checkpoint(model_fn, data, folder / "start")
    plain = folder / "plain"
    shutil.copytree(start, plain)
    hook = Losses()
    estimator(model_fn, plain).train(lambda params: data(params), hooks=[hook], max_steps=steps)
    ends = {"plain": plain}
    for mode, config in MODES.items():
        ends[mode] = folder / mode
        shutil.copytree(start, ends[mode])
        estimator(model_fn, ends[mode], **config).train(
            lambda params: data(params), max_steps=steps
        )
        expected = hook.of_steps(num_batches)
        np.testing.assert_allclose(logged_losses(ends[mode]), expected, rtol=rtol, atol=1e-7)
    if same_checkpoints:
        check_checkpoints(ends)
        check_evaluations(model_fn, data, ends)
    return ends


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

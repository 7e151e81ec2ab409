"""Hooks of users' code in compiled runs, beside the same hooks in a run of TensorFlow itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from tf_models import images, linear_model  # noqa: E402
from training_harness import MODES, estimator  # noqa: E402

from openwafer.tf import CSEstimatorSpec  # noqa: E402

COMPILED = MODES["layer_pipelined"]
Hook: Any = tf.estimator.SessionRunHook


def rate_of(step: Any) -> Any:
    return tf.identity(0.1 / (1.0 + tf.cast(step, tf.float32)), name="rate")


def model_with(make_hooks: Callable[[Any, Any], list[Any]] | None = None) -> Any:
    """A linear model whose spec has hooks of its loss and its global step."""
    base = linear_model(
        lambda loss, step: tf.compat.v1.train.GradientDescentOptimizer(rate_of(step)).minimize(
            loss, step
        )
    )

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        spec: CSEstimatorSpec = base(features, labels, mode)
        if make_hooks is None or mode != "train":
            return spec
        step = tf.compat.v1.train.get_global_step()
        return spec._replace(training_hooks=make_hooks(spec.loss, step))

    return model_fn


class Seen(Hook):
    """What a hook is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.values: list[dict[str, Any]] = []

    def begin(self) -> None:
        self.calls.append("begin")
        self._loss = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.LOSSES)[-1]

    def after_create_session(self, session: Any, coord: Any) -> None:
        step = session.run(tf.compat.v1.train.get_global_step())
        self.calls.append(f"session at {step}")

    def before_run(self, run_context: Any) -> Any:
        return tf.estimator.SessionRunArgs({"loss": self._loss, "rate": "rate:0"})

    def after_run(self, run_context: Any, run_values: Any) -> None:
        self.calls.append("run")
        self.values.append(run_values.results)

    def end(self, session: Any) -> None:
        self.calls.append("end")


def test_a_hook_is_called_as_by_tensorflow(tmp_path: Path) -> None:
    seen = {}
    for name, config in {"plain": {}, "compiled": COMPILED}.items():
        seen[name] = Seen()
        options = {"tf_random_seed": 1, **config}
        estimator(model_with(), tmp_path / name).train(images, steps=1)
        estimator(model_with(), tmp_path / name, **{k: options[k] for k in config}).train(
            images, steps=3, hooks=[seen[name]]
        )
    assert seen["compiled"].calls == ["begin", "session at 1", "run", "run", "run", "end"]
    assert seen["compiled"].calls == seen["plain"].calls
    losses = [[values["loss"] for values in of.values] for of in seen.values()]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    # TensorFlow may read the rate before or after the step is counted.
    np.testing.assert_allclose(
        [values["rate"] for values in seen["compiled"].values], [0.1 / 3, 0.1 / 4, 0.1 / 5]
    )
    assert {value.dtype for values in seen["compiled"].values for value in values.values()} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("where", ["train", "spec"])
def test_a_hook_that_stops(tmp_path: Path, where: str) -> None:
    """The run ends in order, with a checkpoint."""
    hook = tf.estimator.StopAtStepHook(last_step=3)
    given = [hook] if where == "train" else None
    model_fn = model_with(None if given else lambda loss, step: [hook])
    estimator(model_fn, tmp_path, **COMPILED).train(images, hooks=given, max_steps=20)
    assert tf.train.load_checkpoint(str(tmp_path)).get_tensor("global_step") == 3
    # From the place where a run goes on.
    more = tf.estimator.StopAtStepHook(num_steps=2)
    estimator(model_with(), tmp_path, **COMPILED).train(images, hooks=[more], max_steps=20)
    assert tf.train.load_checkpoint(str(tmp_path)).get_tensor("global_step") == 5


def test_a_hook_that_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def hooks(loss: Any, step: Any) -> list[Any]:
        values = {"the loss": loss, "the step": step, "the rate": "rate"}
        return [
            tf.estimator.LoggingTensorHook(values, every_n_iter=2, formatter=formatted),
            tf.estimator.NanTensorHook(loss),
            tf.estimator.StepCounterHook(every_n_steps=2, output_dir=str(tmp_path)),
        ]

    lines: list[dict[str, Any]] = []

    def formatted(values: dict[str, Any]) -> str:
        lines.append(dict(values))
        return "formatted"

    estimator(model_with(hooks), tmp_path, **COMPILED).train(images, steps=4)
    assert [values["the step"] for values in lines] == [1, 3]
    assert all(values["the loss"] > 0 for values in lines)
    assert "is not called" not in caplog.text


def test_a_hook_that_saves_sets_how_often(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    hook = tf.estimator.CheckpointSaverHook(str(here), save_steps=2)
    estimator(model_with(), here, **COMPILED).train(images, hooks=[hook], max_steps=5)
    steps = sorted(int(path.stem.rpartition("-")[2]) for path in here.glob("*.index"))
    assert steps == [0, 2, 4, 5]
    assert "is not called" not in caplog.text
    other = tf.estimator.CheckpointSaverHook(str(elsewhere), save_steps=2)
    estimator(model_with(), here, **COMPILED).train(images, hooks=[other], max_steps=7)
    assert caplog.text.count("CheckpointSaverHook asks for") == 1
    assert not elsewhere.exists()


def test_a_hook_that_asks_for_more_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hooks(loss: Any, step: Any) -> list[Any]:
        summary = tf.compat.v1.summary.scalar("loss", loss)
        return [
            tf.estimator.SummarySaverHook(1, output_dir=str(tmp_path), summary_op=summary),
            tf.estimator.LoggingTensorHook(["dense/BiasAdd:0"], every_n_iter=1),
        ]

    seen = Seen()
    estimator(model_with(hooks), tmp_path, **COMPILED).train(images, hooks=[seen], steps=3)
    assert caplog.text.count("SummarySaverHook asks for loss:0") == 1
    assert caplog.text.count("LoggingTensorHook asks for dense/BiasAdd:0") == 1
    assert seen.calls.count("run") == 3, "the other hooks are called all the same"


def test_hooks_of_an_evaluation_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    estimator(model_with(), tmp_path).train(images, steps=1)
    run = estimator(model_with(), tmp_path, **COMPILED)
    run.evaluate(lambda params: images({"repeat": False}), 1, hooks=[Seen()], use_cs=True)
    assert "Seen is not called" in caplog.text

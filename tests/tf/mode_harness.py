"""A model of the zoo trained by TensorFlow itself and in both compiled modes.

The reference is TensorFlow's own Estimator. Decides what has to be equal, and how nearly.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from training_harness import MODES, Losses, logged_losses
from zoo_harness import ADAMW, Twin, twin

from openwafer.frontends.tf.library import tf
from openwafer.tf import CerebrasEstimator, CSRunConfig
from openwafer.zoo.tf.functions import input_fn_of
from openwafer.zoo.tf.names import counterparts

RTOL = 1e-5
EVAL_BATCHES = 4


class FirstCheckpoint(tf.estimator.SessionRunHook):
    """Saves what there is after the first step, with the Estimator's own saver."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after_run(self, run_context: Any, run_values: Any) -> None:
        if self._folder.exists():
            return
        self._folder.mkdir()
        session = run_context.session
        saver = session.graph.get_collection(tf.compat.v1.GraphKeys.SAVERS)[0]
        saver.save(session, str(self._folder / "model.ckpt"), global_step=1)


def check_modes(
    name: str,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    steps: int = 50,
    optimizer: Mapping[str, Any] = ADAMW,
) -> None:
    """TensorFlow itself and both compiled modes, from one checkpoint.

    Equal to 1e-5: the losses of all steps, the batch statistics of the last checkpoints, and what a
    mode's last checkpoint evaluates to in that mode and in TensorFlow. To 1e-4: that and what
    TensorFlow's own last checkpoint evaluates to.
    """
    of = twin(name, overrides, optimizer=optimizer)
    start, plain = folder / "start", folder / "plain"
    hook = Losses()
    _train(of, plain, steps + 1, hooks=[hook, FirstCheckpoint(start)])
    losses, evaluation = hook.values[1:], _evaluation(of, plain)
    assert len(losses) == steps
    for mode, config in MODES.items():
        end = folder / mode
        shutil.copytree(start, end)
        _train(of, end, steps, **config)
        found = _evaluation(of, end)
        np.testing.assert_allclose(logged_losses(end), losses, rtol=RTOL, err_msg=mode)
        _check(_evaluation(of, end, use_cs=True, **config), found, RTOL, f"{mode}: its evaluation")
        # Where second moments are near 0, weights part by more than losses do.
        _check(found, evaluation, 10 * RTOL, f"{mode}: its checkpoint")
        _check_statistics(of, end, plain)


def check_steps_on_the_way(
    name: str,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    starts: Sequence[int],
    steps: int,
    rtol: float,
    optimizer: Mapping[str, Any] = ADAMW,
) -> None:
    """From each of TensorFlow's own checkpoints after `starts` steps, the losses of the next
    `steps` in both modes. Where rounding grows from step to step, this says what a long run cannot:
    whether every step is the same."""
    of = twin(name, overrides, optimizer=optimizer)
    hook, plain = Losses(), folder / "plain"
    every_step: dict[str, Any] = {"save_checkpoints_steps": 1, "keep_checkpoint_max": None}
    _train(of, plain, max(starts) + steps, hooks=[hook], **every_step)
    for mode, config in MODES.items():
        found: list[float] = []
        for start in starts:
            end = folder / f"{mode}_{start}"
            _copy_checkpoint(plain, end, start)
            _train(of, end, steps, **config)
            found += logged_losses(end)
        expected = [hook.values[start + step] for start in starts for step in range(steps)]
        np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=mode)


def _copy_checkpoint(folder: Path, target: Path, step: int) -> None:
    target.mkdir()
    for file in folder.glob(f"model.ckpt-{step}.*"):
        shutil.copy(file, target)
    tf.compat.v1.train.update_checkpoint_state(str(target), f"model.ckpt-{step}")


def _check(
    found: Mapping[str, float], expected: Mapping[str, float], rtol: float, what: str
) -> None:
    assert found.keys() == expected.keys(), what
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=rtol, err_msg=f"{what}, {key}")


def _check_statistics(of: Twin, ours: Path, theirs: Path) -> None:
    """The checkpoints hold the same variables, and equal batch statistics."""
    mine, other = (tf.train.load_checkpoint(str(path)) for path in (ours, theirs))
    names = other.get_variable_to_shape_map()
    assert mine.get_variable_to_shape_map() == names
    for each in counterparts(of.torch_model()):
        assert each.name in names
        if not each.trained:
            np.testing.assert_allclose(
                mine.get_tensor(each.name), other.get_tensor(each.name), rtol=RTOL, atol=1e-7
            )


def _estimator(of: Twin, folder: Path, **config: Any) -> Any:
    # Checkpoints at the ends alone: no run here is that long.
    given: dict[str, Any] = {"log_step_count_steps": 1, "save_checkpoints_steps": 1000, **config}
    run_config = CSRunConfig(tf_random_seed=1, **given)
    return CerebrasEstimator(of.model_fn(), model_dir=str(folder), config=run_config)


def _train(of: Twin, folder: Path, steps: int, *, hooks: Any = None, **config: Any) -> None:
    input_fn = input_fn_of(of.train, seed=1, repeats=True)
    _estimator(of, folder, **config).train(input_fn, steps=steps, hooks=hooks)


def _evaluation(of: Twin, folder: Path, *, use_cs: bool = False, **config: Any) -> dict[str, float]:
    input_fn = input_fn_of(of.evaluation, seed=1, repeats=False)
    return _estimator(of, folder, **config).evaluate(input_fn, EVAL_BATCHES, use_cs=use_cs)

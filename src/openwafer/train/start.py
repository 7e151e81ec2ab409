"""Where a run starts: from nothing, from a checkpoint of its own, or from one it was given.

Decides which checkpoint is taken and which of its parts. Does not decide what a checkpoint holds
(checkpoint.py) or what is done from there (loop.py).

Rules:
    * Without `--checkpoint_path`: the newest whole checkpoint in `model_dir`, if there is one and
      `autoresume` is on.
    * With `--checkpoint_path` for training: that file, unless an earlier run of the same command
      already saved checkpoints of its own in `model_dir`; then the newest of those, so that the
      same command after a crash goes on. `autoresume: False` begins again.
    * With `--is_pretrained_checkpoint`: the matching weights only, and step 0.
    * For evaluation: the file given, or the newest in `model_dir`; weights only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openwafer.config.runconfig import RunConfig
from openwafer.errors import CheckpointError
from openwafer.runtime.executor import Executor, ModelState
from openwafer.train.checkpoint import (
    Checkpoint,
    OptimizerCodec,
    compare_models,
    from_contents,
    require_fit,
)
from openwafer.train.checkpoint_dir import newest_whole
from openwafer.train.checkpoint_shards import read_checkpoint
from openwafer.train.position import Progress
from openwafer.train.random_state import restore_random_state

__all__ = ["Start", "start_evaluation", "start_training"]

_log = logging.getLogger("openwafer")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run starts.

    path: the checkpoint that was loaded, None for none. resumed: it is one of this run's own.
    started_from: the resolved `--checkpoint_path`, empty for none.
    """

    progress: Progress = field(default_factory=Progress)
    path: Path | None = None
    resumed: bool = False
    started_from: str = ""


def start_training(
    run: RunConfig, executor: Executor, codec: OptimizerCodec, *, expected: Shapes | None = None
) -> Start:
    """Load what `run` says into `executor`, and the random generators with it.

    `expected`: the shapes of the model's tensors by state_dict name; None asks the executor.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit.
    """
    given = run.checkpoint_path
    key = "" if given is None else str(given.resolve())
    own = _own_checkpoint(run, key)
    if own is not None:
        path, contents = own
        progress = _resume(run, executor, contents, codec, path, expected)
        return Start(progress=progress, path=path, resumed=True, started_from=key)
    if given is None:
        return Start()
    contents = read_checkpoint(given)
    if run.is_pretrained_checkpoint:
        _load_matching(executor, contents, given, expected)
        return Start(path=given, started_from=key)
    progress = _resume(run, executor, contents, codec, given, expected).as_origin()
    return Start(progress=progress, path=given, started_from=key)


def start_evaluation(
    run: RunConfig, executor: Executor, *, expected: Shapes | None = None
) -> Start:
    """Load the weights to evaluate into `executor`.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit.
    """
    if run.checkpoint_path is not None:
        path, contents = run.checkpoint_path, read_checkpoint(run.checkpoint_path)
    else:
        found = newest_whole(run.model_dir) if run.autoresume else None
        if found is None:
            _log.warning("no checkpoint in %s: the initial weights are evaluated", run.model_dir)
            return Start()
        path, contents = found
    checkpoint = from_contents(contents, None, where=str(path))
    require_fit(_shapes(executor, expected), checkpoint.state.model, where=str(path))
    executor.load_state(checkpoint.state, weights_only=True)
    _log.info("%s %s", "Predicting with" if run.mode == "predict" else "Evaluating", path)
    return Start(progress=checkpoint.progress, path=path)


def _own_checkpoint(run: RunConfig, key: str) -> tuple[Path, dict[str, Any]] | None:
    if not run.autoresume:
        return None
    return newest_whole(run.model_dir, of_run_from=key or None)


def _resume(
    run: RunConfig,
    executor: Executor,
    contents: Mapping[str, Any],
    codec: OptimizerCodec,
    path: Path,
    expected: Shapes | None,
) -> Progress:
    checkpoint = from_contents(contents, codec, where=str(path))
    require_fit(_shapes(executor, expected), checkpoint.state.model, where=str(path))
    executor.load_state(checkpoint.state, weights_only=not checkpoint.has_optimizer)
    _restore_random_state(run, checkpoint, path)
    for lacks, what in (
        (not checkpoint.has_optimizer, "optimizer state: the optimizer starts anew"),
        (not checkpoint.has_data_position, "data position: the data start at the beginning"),
    ):
        if lacks:
            _log.warning("%s has no %s", path.name, what)
    _log.info("Going on from %s at global step %d", path, checkpoint.progress.global_step)
    return checkpoint.progress


def _restore_random_state(run: RunConfig, checkpoint: Checkpoint, path: Path) -> None:
    state = checkpoint.random_state
    seed = state.get("seed", run.seed)
    if seed != run.seed:
        _log.warning(
            "%s was trained with seed %s, this run has %s: data order and dropout change here",
            path.name,
            seed,
            run.seed,
        )
        return
    try:
        restore_random_state(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"its random state cannot be restored: {error}",
            where=str(path),
            hint="`--is_pretrained_checkpoint` takes over the weights only",
        ) from error


def _load_matching(
    executor: Executor, contents: Mapping[str, Any], path: Path, expected: Shapes | None
) -> None:
    model = from_contents(contents, None, where=str(path)).state.model
    mismatch = compare_models(_shapes(executor, expected), model)
    left_out = {*mismatch.unexpected, *mismatch.wrong_shape}
    matching = {name: tensor for name, tensor in model.items() if name not in left_out}
    if not matching:
        raise CheckpointError(
            f"no weight of the checkpoint fits the model; {mismatch}",
            where=str(path),
            hint="check that it is a checkpoint of this kind of model",
        )
    executor.load_state(ModelState(model=matching, optimizer={}, loss_scale={}), weights_only=True)
    _log.info("%d weights taken over from %s", len(matching), path)
    if mismatch:
        _log.warning("not taken over: %s", mismatch)


def _shapes(executor: Executor, expected: Shapes | None) -> Shapes:
    if expected is not None:
        return expected
    return {name: tuple(tensor.shape) for name, tensor in executor.borrowed_state().model.items()}

"""TensorFlow's checkpoints: `model.ckpt-<step>`, as the Estimator reads and writes them.

Decides how one is written without a session (tensors, index, graph, and last the state file, so
that what is not whole is never the newest one), and how it is read. Does not decide which variables
there are (variables.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openwafer.errors import CheckpointError
from openwafer.files import write_bytes
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.nodes import Array

__all__ = [
    "CheckpointWriter",
    "all_checkpoints",
    "checkpoint_to_evaluate",
    "global_step_of",
    "latest_checkpoint",
    "newest_step",
    "read_checkpoint",
]

_log = logging.getLogger("openwafer")

_GLOBAL_STEP = "global_step"


def latest_checkpoint(model_dir: Path) -> str | None:
    """Prefix of the newest checkpoint that the state file names; None if there is none."""
    return tf.train.latest_checkpoint(str(model_dir))


def all_checkpoints(model_dir: Path) -> list[str]:
    """Prefixes of the checkpoints that the state file names, oldest first.

    Raises:
        CheckpointError: there are none.
    """
    state = tf.train.get_checkpoint_state(str(model_dir))
    if state is None:
        raise CheckpointError("there are no checkpoints", where=str(model_dir), hint="train first")
    return [str(path) for path in state.all_model_checkpoint_paths]


def checkpoint_to_evaluate(model_dir: Path, given: str | None) -> str | None:
    """The prefix given, or the newest one; None, and a warning, where the initial weights are to be
    evaluated: as TensorFlow does, and a PyTorch run."""
    found = given or latest_checkpoint(model_dir)
    if found is None:
        _log.warning("no checkpoint in %s: the initial weights are evaluated", model_dir)
    return found


def read_checkpoint(prefix: str, names: Sequence[str] | None = None) -> dict[str, Array]:
    """Variables by name; those of `names`, or all.

    Raises:
        CheckpointError: it cannot be read, or lacks one of `names`.
    """
    try:
        reader = tf.train.load_checkpoint(prefix)
        held = set(reader.get_variable_to_shape_map())
        missing = [name for name in names or () if name not in held]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
                where=prefix,
                hint="it may be of another model or optimizer; use another model_dir",
            )
        return {name: np.asarray(reader.get_tensor(name)) for name in names or sorted(held)}
    # A file that is cut short is an IndexError in TensorFlow 2.15.
    except (ValueError, RuntimeError, IndexError, tf.errors.OpError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {str(error).partition(chr(10))[0]}",
            where=prefix,
            hint="checkpoints are <model_dir>/model.ckpt-<step>",
        ) from error


def newest_step(model_dir: Path) -> int:
    """The global step of the newest checkpoint; 0 if there is none."""
    prefix = latest_checkpoint(model_dir)
    return global_step_of(read_checkpoint(prefix, [_GLOBAL_STEP])) if prefix else 0


def global_step_of(values: Mapping[str, Array]) -> int:
    return int(values[_GLOBAL_STEP]) if _GLOBAL_STEP in values else 0


class CheckpointWriter:
    """Writes the checkpoints of one run, and keeps the last `keep_max` (0 or None: all).

    Args:
        graph: of the model, for the `.meta` file; plain TensorFlow restores without it too.
    """

    def __init__(self, model_dir: Path, graph: Any, *, keep_max: int | None) -> None:
        self._model_dir, self._keep_max = model_dir.resolve(), keep_max
        with graph.as_default():
            saver = tf.compat.v1.train.Saver(save_relative_paths=True)
            self._meta = saver.export_meta_graph()
        state = tf.train.get_checkpoint_state(str(model_dir))
        held = state.all_model_checkpoint_paths if state else ()
        self._kept = [os.path.basename(path) for path in held]

    def save(self, step: int, values: Mapping[str, Array]) -> Path:
        """Write all variables as `model.ckpt-<step>`.

        Raises:
            CheckpointError: it cannot be written; the ones before are as they were.
        """
        prefix = self._model_dir / f"model.ckpt-{step}"
        self._model_dir.mkdir(parents=True, exist_ok=True)
        try:
            _write_tensors(str(prefix), values)
            write_bytes(Path(f"{prefix}.meta"), self._meta.SerializeToString())
            for path in self._model_dir.glob(f"{prefix.name}.*"):
                _flush(path)
            self._make_newest(prefix.name)
        except (OSError, tf.errors.OpError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be written: {error}",
                where=str(prefix),
                hint="look at the room and the rights of model_dir",
            ) from error
        return prefix

    def _make_newest(self, name: str) -> None:
        """By name, so that the folder may be moved."""
        self._kept = [kept for kept in self._kept if kept != name] + [name]
        old: list[str] = []
        if self._keep_max:
            old, self._kept = self._kept[: -self._keep_max], self._kept[-self._keep_max :]
        tf.compat.v1.train.update_checkpoint_state(
            str(self._model_dir), name, all_model_checkpoint_paths=self._kept
        )
        for name in old:
            for file in self._model_dir.glob(f"{name}.*"):
                file.unlink(missing_ok=True)


def _write_tensors(prefix: str, values: Mapping[str, Array]) -> None:
    """TensorFlow's own writer, which puts the files in their places only when they are whole."""
    names = sorted(values)
    graph = tf.Graph()
    with graph.as_default():
        places = [tf.compat.v1.placeholder(values[n].dtype, values[n].shape) for n in names]
        save = tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=places,
        )
    on_cpu = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.compat.v1.Session(graph=graph, config=on_cpu) as session:
        session.run(save, feed_dict={p: values[n] for p, n in zip(places, names, strict=True)})


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

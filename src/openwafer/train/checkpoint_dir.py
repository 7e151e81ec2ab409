"""The checkpoints of one `model_dir`.

Decides their names, which one a run goes on from, and which old ones are deleted. Does not decide
what is in one (checkpoint.py) or how it is written (checkpoint_shards.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from openwafer.errors import CheckpointError
from openwafer.train.checkpoint import started_from
from openwafer.train.checkpoint_file import DamagedCheckpointError
from openwafer.train.checkpoint_shards import (
    is_orphan,
    read_checkpoint,
    remove_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)

__all__ = [
    "CheckpointFolder",
    "checkpoint_path",
    "find_latest",
    "list_checkpoints",
    "newest_whole",
    "whole_checkpoints",
]

_log = logging.getLogger("openwafer")

_NAME = re.compile(r"checkpoint_(\d+)\.mdl")
_LEFTOVER = re.compile(r"\.checkpoint_\d+\.mdl\.tmp")


def checkpoint_path(model_dir: Path, step: int) -> Path:
    return model_dir / f"checkpoint_{step}.mdl"


def list_checkpoints(model_dir: Path) -> tuple[tuple[int, Path], ...]:
    """(step, path) of the checkpoints in a folder, whole or not, lowest step first."""
    if not model_dir.is_dir():
        return ()
    found = ((_NAME.fullmatch(path.name), path) for path in model_dir.iterdir())
    return tuple(sorted((int(match[1]), path) for match, path in found if match))


def whole_checkpoints(model_dir: Path) -> list[Path]:
    """The whole ones, lowest step first; damaged ones are named in a warning and passed over."""
    whole: list[Path] = []
    for _, path in list_checkpoints(model_dir):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            _pass_over(path, error)
        else:
            whole.append(path)
    return whole


def find_latest(model_dir: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named in a warning and passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    candidates = list_checkpoints(model_dir)[::-1]
    for _, path in candidates:
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            _pass_over(path, error)
        else:
            return path
    return _none_whole(model_dir) if candidates else None


def newest_whole(
    model_dir: Path, *, of_run_from: str | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Path and contents of the newest whole checkpoint; damaged ones are passed over.

    With `of_run_from`, only one written by a run that was started from that checkpoint file counts
    (others are not an error): a run that was rewound to an earlier checkpoint, or that fine-tunes
    a pretrained one, goes on from its own checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    candidates = list_checkpoints(model_dir)[::-1]
    num_whole = 0
    for _, path in candidates:
        try:
            contents = read_checkpoint(path)
        except DamagedCheckpointError as error:
            _pass_over(path, error)
            continue
        num_whole += 1
        if of_run_from is None or started_from(contents) == of_run_from:
            return path, contents
    if candidates and not num_whole and of_run_from is None:
        _none_whole(model_dir)
    return None


@dataclass(slots=True)
class CheckpointFolder:
    """Writes checkpoints into `model_dir` and keeps the last `keep_max` of this run (0: all).

    `protected` is never deleted: the file that the run was started from. `shard_bytes`: the size at
    which a checkpoint is split over several files (None: never).
    """

    model_dir: Path
    keep_max: int = 5
    protected: Path | None = None
    shard_bytes: int | None = None

    def remove_leftovers(self) -> None:
        """Delete half-written files of a process that was killed."""
        if not self.model_dir.is_dir():
            return
        for path in self.model_dir.iterdir():
            if _LEFTOVER.fullmatch(path.name) or is_orphan(path):
                _log.info("removing the unfinished %s of an earlier run", path.name)
                with suppress(OSError):
                    path.unlink()

    def save(self, step: int, contents: Mapping[str, Any]) -> Path:
        """Write `checkpoint_<step>.mdl`, then delete what is more than `keep_max` back.

        Raises:
            CheckpointError: it could not be written; nothing was deleted.
        """
        path = checkpoint_path(self.model_dir, step)
        write_checkpoint(path, contents, shard_bytes=self.shard_bytes)
        self._prune(step)
        return path

    def _prune(self, newest_step: int) -> None:
        """Only after `newest_step` is whole on the disk. Later steps are of another run, from
        which this one was rewound: they neither count nor go."""
        if self.keep_max == 0:
            return
        own = [path for step, path in list_checkpoints(self.model_dir) if step <= newest_step]
        for path in own[: -self.keep_max]:
            if self.protected is not None and _same(path, self.protected):
                continue
            try:
                remove_checkpoint(path)
            except OSError as error:
                _log.warning("%s could not be deleted: %s", path, error.strerror)


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _pass_over(path: Path, error: DamagedCheckpointError) -> None:
    _log.warning("%s is passed over: %s", path, error.what)


def _none_whole(model_dir: Path) -> NoReturn:
    raise CheckpointError(
        "none of the checkpoints is whole",
        where=str(model_dir),
        hint="restore one from a copy, use another `--model_dir`, or delete them to start anew",
    )

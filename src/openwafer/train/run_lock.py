"""One training at a time in a `model_dir`.

Decides how a training keeps others out, and what one that is kept out is told. Only the process
that writes takes the lock, so the tasks of one run share it; runs that only read take none. Does
not decide what is written.

The lock is the kernel's (flock) on a file that stays: it goes with the process however that ends,
so that nothing of a killed run stands in the way of the next. What the file says is for people.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openwafer.errors import ConfigError
from openwafer.train.run_folder import in_run_folder

__all__ = ["LOCK_NAME", "refuse_second_training", "training_lock"]

_log = logging.getLogger("openwafer")

LOCK_NAME = ".training.lock"

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NONE_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What a file system without such locks answers."""

_files: set[int] = set()
"""Of the locks that this process holds."""


def refuse_second_training(model_dir: Path) -> None:
    """Before what takes minutes: whether `training_lock` would be refused now. Takes nothing and
    makes nothing, so the lock is still to be taken. Where two look at once, one of them may be
    refused that would not have been a moment later; the other trains.

    Raises:
        ConfigError: another training has the lock.
    """
    try:
        file = os.open(model_dir / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # nobody has trained here; what else is wrong the lock will say
    try:
        with contextlib.suppress(OSError):  # no locks here: said when the lock is taken
            _ask_for(fcntl.LOCK_SH, file, model_dir)
    finally:
        os.close(file)


@contextmanager
def training_lock(model_dir: Path) -> Generator[None]:
    """Hold the lock of `model_dir` within the block.

    Raises:
        ConfigError: another training has it, or the folder cannot be written.
    """
    path = model_dir / LOCK_NAME
    with in_run_folder(path):
        model_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _files.add(file)
    try:
        if _is_taken(file, model_dir):
            _sign(file)
        yield
    finally:
        _files.discard(file)
        os.close(file)


def _is_taken(file: int, model_dir: Path) -> bool:
    """Whether the lock is ours; False where the file system has none, which is said."""
    try:
        _ask_for(fcntl.LOCK_EX, file, model_dir)
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise
        _log.warning(
            "%s is on a file system without locks (%s): nothing keeps a second training out of it",
            model_dir,
            error.strerror,
        )
        return False
    return True


def _ask_for(kind: int, file: int, model_dir: Path) -> None:
    """Take the lock, without waiting.

    Raises:
        ConfigError: another training has it.
        OSError: it cannot be had for another reason.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise _in_use(file, model_dir) from error
        raise


def _sign(file: int) -> None:
    """Say who has it; a full disk is no reason not to train."""
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(who).encode(), 0)


def _in_use(file: int, model_dir: Path) -> ConfigError:
    return ConfigError(
        f"another training writes into this folder: {_owner(file)}",
        where=str(model_dir),
        allowed="one training at a time in a model_dir; evaluation beside it is welcome",
        hint="wait for it, stop it, or give another --model_dir",
    )


def _owner(file: int) -> str:
    """As it signed; it may not have done so yet."""
    try:
        who: dict[str, Any] = json.loads(os.pread(file, 4096, 0))
        job = f" (SLURM job {who['slurm_job']})" if who["slurm_job"] else ""
        return f"process {who['pid']} on {who['host']}{job}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which process it is"


def _close_in_child() -> None:
    """A forked process (a DataLoader's) would hold the lock on after the one that took it."""
    for file in _files:
        with contextlib.suppress(OSError):
            os.close(file)
    _files.clear()


os.register_at_fork(after_in_child=_close_in_child)

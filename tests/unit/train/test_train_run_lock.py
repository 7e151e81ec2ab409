"""One training at a time in a folder, and nothing of a killed one stands in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from openwafer.errors import ConfigError
from openwafer.train.run_lock import LOCK_NAME, refuse_second_training, training_lock

LIMIT_SECONDS = 60
FORK = multiprocessing.get_context("fork")


def hold(folder: Path, told: Connection, with_child: bool) -> None:
    """Take the lock, fork a process that outlives this one if so asked, and wait to be killed."""
    with training_lock(folder):
        child = os.fork() if with_child else -1
        if child <= 0:  # the process that is forked, once it runs code of its own
            told.send(os.getpid())
        signal.pause()


def holder(folder: Path, *, with_child: bool = False) -> tuple[Any, int]:
    """A process that has the lock, and its child's id, if it has one."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(folder, theirs, with_child))
    process.start()
    theirs.close()
    assert ours.poll(LIMIT_SECONDS)
    child = ours.recv()
    ours.close()
    return process, child


def kill(process: Any) -> None:
    process.kill()
    process.join()  # with a limit it would wait for a pipe that the process's child has too
    assert process.exitcode == -signal.SIGKILL
    process.close()


def test_a_second_training_is_told_who_the_first_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    process, _ = holder(tmp_path)
    with pytest.raises(ConfigError) as raised, training_lock(tmp_path):
        pass
    said = str(raised.value)
    assert "another training writes into this folder" in said
    assert f"process {process.pid} on {socket.gethostname()} (SLURM job 4711), since 20" in said
    assert str(tmp_path) in said
    kill(process)
    with training_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_child_of_a_killed_training_does_not_hold_the_lock(tmp_path: Path) -> None:
    process, child = holder(tmp_path, with_child=True)
    try:
        kill(process)
        os.kill(child, 0)
        with training_lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_look_before_long_work_takes_and_makes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refuse_second_training(folder)
    assert not folder.exists()
    with training_lock(folder):
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
                refuse_second_training(folder)
    refuse_second_training(folder)
    with training_lock(folder):
        pass


def test_one_process_after_the_other_and_two_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        with training_lock(tmp_path / "new" / "folder"):
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
                training_lock(tmp_path / "new" / "folder").__enter__()
            with training_lock(tmp_path / "other"):
                pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_a_holder_that_has_not_signed(text: str, tmp_path: Path) -> None:
    with training_lock(tmp_path):
        (tmp_path / LOCK_NAME).write_text(text)
        with pytest.raises(ConfigError, match="it has not said which process it is"):
            training_lock(tmp_path).__enter__()


def test_a_file_system_without_locks_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "openwafer"), training_lock(tmp_path):
        pass
    (record,) = caplog.records
    assert f"{tmp_path} is on a file system without locks" in record.getMessage()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the run's folder cannot be written"):
        training_lock(tmp_path / "file" / "run").__enter__()

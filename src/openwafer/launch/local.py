"""Tasks as processes of this machine, started as `srun` would.

Decides how the processes of one run are started, watched and ended together. What they find in
their environment is in `variables.py`, their output in `output.py`. Does not decide what they run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from openwafer.errors import LaunchError
from openwafer.launch.output import Outputs
from openwafer.launch.variables import task_variables
from openwafer.streaming.auth import create_secret
from openwafer.streaming.tasks import computing_mark

__all__ = ["launch_local"]

_POLL_SECONDS = 0.05
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True, eq=False)
class _Task:
    rank: int
    process: subprocess.Popen[bytes]
    variables: dict[str, str]
    computes: bool
    num_restarts: int = 0

    @property
    def name(self) -> str:
        kind = "computing" if self.computes else "worker"
        return f"task {self.rank} ({kind if self.rank else 'coordinator'})"

    def signal(self, number: int) -> None:
        """Send to the task and everything that it started."""
        # The group outlives the task while one of its own processes does.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


@dataclass(slots=True)
class _Progress:
    """What has happened to the run so far."""

    code: int = 0
    """Exit code of the run: of the first task that failed, or 128 + signal."""
    ending_since: float | None = None
    """When the run began to end before its tasks did."""
    stages: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """Seconds after `ending_since`, and the signal that is due then."""


def launch_local(
    command: Sequence[str],
    num_tasks: int,
    *,
    num_compute: int = 1,
    env: Mapping[str, str] | None = None,
    max_restarts: int = 3,
    settle_seconds: float = 28.0,
    grace_seconds: float = 15.0,
) -> int:
    """Run `command` as `num_tasks` tasks and wait for all of them.

    Task 0 uses this process's output as it is; the lines of task R > 0 appear as `[R] line`. If a
    task fails, the others get `settle_seconds` to end by themselves (the coordinator may wait
    `StreamSettings.replace_timeout_seconds` for a worker before it says what it lost, and saves),
    then SIGTERM, and SIGKILL after `grace_seconds` more. SIGINT, SIGTERM and SIGHUP to this process
    go to the tasks, which then have `grace_seconds` to end; a second one kills them. Nothing that
    the tasks started is left behind. Signals can be forwarded only where this is called in the main
    thread.

    A worker that a signal killed is started again, up to `max_restarts` times each; the coordinator
    has it go on where the lost one stopped. A task that computes with others cannot be.

    Args:
        command: program and arguments, run without a shell.
        num_compute: tasks that are known to compute; others say so once they do.
        env: the environment to start from; this process's by default.

    Returns:
        0, or the exit code of the first task that failed (128 + N if signal N ended it, or this
        process got it).

    Raises:
        LaunchError: there is no command, fewer than one task, or the command cannot be started.
    """
    command = list(command)
    if num_tasks < 1:
        raise LaunchError(f"cannot start {num_tasks} tasks", where="--tasks", allowed="1 or more")
    if not command or not command[0]:
        raise LaunchError(
            "there is no command to run",
            hint="openwafer launch --tasks 4 -- python run.py --mode train ...",
        )
    base = os.environ if env is None else env
    folder = Path(tempfile.mkdtemp(prefix="openwafer-"))  # mode 0700
    tasks: list[_Task] = []
    outputs = Outputs()
    progress = _Progress()
    try:
        secret_file = folder / "secret"
        create_secret(secret_file)
        with _forwarding(tasks, progress, grace_seconds):
            for rank in range(num_tasks):
                if progress.ending_since is not None:
                    break  # a signal came while tasks were being started
                variables = task_variables(
                    base,
                    rank=rank,
                    num_tasks=num_tasks,
                    job_id=f"local-{os.getpid()}",
                    secret_file=str(secret_file),
                    workers_come_back=max_restarts > 0,
                )
                process = _start(command, rank, variables)
                tasks.append(_Task(rank, process, variables, computes=rank < num_compute))
                _connect_output(tasks[-1], outputs)

            def start_again(task: _Task) -> bool:
                task.computes |= computing_mark(secret_file, task.rank).exists()
                if task.computes or task.num_restarts >= max_restarts:
                    return False
                task.process = _start(command, task.rank, task.variables)
                task.num_restarts += 1
                _connect_output(task, outputs)
                return True

            _wait(tasks, outputs, progress, start_again, settle_seconds, grace_seconds)
    finally:
        for task in tasks:
            task.signal(signal.SIGKILL)
            task.process.wait()
        _drain(tasks, outputs)
        shutil.rmtree(folder, ignore_errors=True)
    return progress.code


def _start(command: list[str], rank: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    piped = subprocess.PIPE if rank else None
    try:
        return subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,  # a task in a session of its own cannot read the terminal
            stdout=piped,
            stderr=piped,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise LaunchError(
            f"cannot start `{command[0]}`: {why}",
            allowed="a program on PATH, or the path of one",
            hint="python run.py ... for a Python script",
        ) from error


def _die_with_parent() -> Callable[[], None] | None:
    """For the child, before its program: be killed if the launcher dies (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    launcher = os.getpid()

    def apply() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != launcher:  # it died in between
            os._exit(1)

    return apply


def _connect_output(task: _Task, outputs: Outputs) -> None:
    for source, stream, descriptor in (
        (task.process.stdout, sys.stdout, 1),
        (task.process.stderr, sys.stderr, 2),
    ):
        if source is not None:
            outputs.add(source, f"[{task.rank}] ", _binary(stream, descriptor))


def _binary(stream: Any, descriptor: int) -> BinaryIO:
    """The bytes below a text stream; the plain descriptor where it has been replaced."""
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    return buffer if buffer is not None else open(descriptor, "wb", closefd=False)


@contextmanager
def _forwarding(
    tasks: list[_Task], progress: _Progress, grace_seconds: float
) -> Generator[None, None, None]:
    """Hand signals on to the tasks while inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        again = progress.ending_since is not None
        for task in tasks:
            task.signal(signal.SIGKILL if again else number)
        if not again:
            progress.code = progress.code or 128 + number
            progress.ending_since = time.monotonic()
            progress.stages = [
                (grace_seconds, signal.SIGTERM),
                (grace_seconds + 2, signal.SIGKILL),
            ]

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    tasks: list[_Task],
    outputs: Outputs,
    progress: _Progress,
    start_again: Callable[[_Task], bool],
    settle_seconds: float,
    grace_seconds: float,
) -> None:
    """Until every task has ended."""
    running = list(tasks)
    while running:
        outputs.pump(_POLL_SECONDS) if outputs.open else time.sleep(_POLL_SECONDS)
        for task in [task for task in running if task.process.poll() is not None]:
            task.signal(signal.SIGKILL)  # what it left behind
            code = task.process.returncode
            if code < 0 and progress.ending_since is None and start_again(task):
                _say(f"{task.name} {_how_it_ended(code)}; it is started again")
                continue
            running.remove(task)
            if code and progress.ending_since is None:
                progress.code = code if code > 0 else 128 - code
                progress.ending_since = time.monotonic()
                progress.stages = [
                    (settle_seconds, signal.SIGTERM),
                    (settle_seconds + grace_seconds, signal.SIGKILL),
                ]
                _say(f"{task.name} {_how_it_ended(code)}; ending the others")
        _apply_stages(running, progress)


def _apply_stages(running: list[_Task], progress: _Progress) -> None:
    if progress.ending_since is None or not progress.stages:
        return
    after_seconds, number = progress.stages[0]
    if time.monotonic() - progress.ending_since >= after_seconds:
        progress.stages.pop(0)
        for task in running:
            task.signal(number)


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"failed with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _say(text: str) -> None:
    print(f"openwafer launch: {text}", file=sys.stderr, flush=True)


def _drain(tasks: list[_Task], outputs: Outputs) -> None:
    """Copy what the tasks wrote last. All writers are gone; the limit is for those who fled."""
    deadline = time.monotonic() + 1.0
    while outputs.open and time.monotonic() < deadline:
        outputs.pump(_POLL_SECONDS)
    outputs.close()
    for task in tasks:
        for pipe in (task.process.stdout, task.process.stderr):
            if pipe is not None:
                pipe.close()

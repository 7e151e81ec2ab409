"""A run whose model is computed by several processes.

Decides how they come to be: where nobody started them (SLURM, `openwafer launch`), the command that
this process was started by is started once more for each, and this process waits for them. Does not
decide what they compute (session.py) or how they talk (runtime/process_group.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from openwafer.config.runconfig import RunConfig
from openwafer.errors import LaunchError
from openwafer.launch.local import launch_local
from openwafer.streaming.tasks import TaskEnvironment

__all__ = ["must_be_started", "start_tasks"]

_log = logging.getLogger("openwafer")


def must_be_started(environment: TaskEnvironment) -> bool:
    """Whether this process is alone with a run that takes several."""
    return environment.num_tasks == 1 and environment.num_compute > 1


def start_tasks(config: RunConfig, command: Sequence[str] | None = None) -> int:
    """Run this process's own command as `config.num_compute` tasks on this machine.

    Returns:
        The exit code of the first task that failed, or 0.

    Raises:
        LaunchError: this process has no command that could be started again.
    """
    if command is None:
        command = [sys.executable, *sys.orig_argv[1:]]
    if len(command) < 2 or command[1] in ("-", "-c", "-i"):
        raise LaunchError(
            f"{config.num_compute} processes are needed, and this one cannot start them: it was "
            "not started by a script",
            where="runconfig.num_stages, runconfig.num_replicas, runconfig.num_csx",
            hint="put the call of run() in a script",
        )
    _log.info(
        "Starting %d processes: %d stage(s), %d replica(s)",
        config.num_compute,
        config.num_stages,
        config.num_compute // config.num_stages,
    )
    return launch_local(command, config.num_compute, num_compute=config.num_compute)

"""Which task of the run this process is.

Decides the role from the variables that SLURM gives its tasks (the local launcher sets the same
ones), and answers the documented cluster questions of user code (`cm.num_streamers()` and its
kin; spec, sections 3.7 and 8.3). Does not start tasks (launch/) and does not connect them.
"""

from __future__ import annotations

import mmap
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from openwafer.errors import LaunchError

__all__ = [
    "COME_BACK_VARIABLE",
    "SECRET_FILE_VARIABLE",
    "Role",
    "TaskEnvironment",
    "computing_mark",
    "current",
    "forget_consulted",
    "get_ordinal",
    "get_streaming_rank",
    "is_master_ordinal",
    "is_streamer",
    "num_streamers",
    "num_tasks",
    "set_num_compute",
    "was_consulted",
]

Role = Literal["coordinator", "peer", "worker", "single"]
"""`single` and `coordinator` drive the run, without and with workers; a `peer` computes with it (a
stage, a replica); a `worker` streams data."""

SECRET_FILE_VARIABLE = "OPENWAFER_SECRET_FILE"
COME_BACK_VARIABLE = "OPENWAFER_WORKERS_COME_BACK"

# What srun gives every task. The step's count goes first: inside a job of seven tasks,
# `srun --ntasks=1` is a single process.
_RANK = "SLURM_PROCID"
_NUM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_JOB_ID = "SLURM_JOB_ID"
_NUM_NODES = "SLURM_NNODES"
_NODE = "SLURMD_NODENAME"
_LOCAL_RANK = "SLURM_LOCALID"
# What tells a run from every other one of this user, for the name of the secret's file. Only what
# srun gives all tasks of a step alike: SLURM_SRUN_COMM_PORT and _HOST can differ between nodes. The
# start time is there since SLURM 23.02; before, and after, the port that srun itself listens at
# (of random choice) tells a job from an earlier one of the same number.
_RUN_PARTS = (_JOB_ID, "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")
_LAUNCH_PARTS = ("SLURM_JOB_START_TIME", "SLURM_STEP_LAUNCHER_PORT")
# Set in a heterogeneous job, whose components have start times and launcher ports of their own.
_NUM_COMPONENTS = "SLURM_HET_SIZE"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnvironment:
    """This task's place in the run.

    rank: 0 is the coordinator; ranks below `num_compute` compute with it; the others are workers.
    num_compute: tasks that compute one model together.
    job_id: of the scheduler, empty without one.
    num_nodes: over which the tasks are spread.
    node: the name of this task's node. local_rank: this task's number on it.
    secret_file: the file with the run's secret; None in a single process.
    secret_is_given: the launcher made that file; otherwise the coordinator makes it.
    workers_come_back: the launcher starts a worker again that was killed.
    """

    rank: int = 0
    num_tasks: int = 1
    num_compute: int = 1
    job_id: str = ""
    num_nodes: int = 1
    node: str = "localhost"
    local_rank: int = 0
    secret_file: Path | None = None
    secret_is_given: bool = False
    workers_come_back: bool = False

    @property
    def role(self) -> Role:
        if self.rank == 0:
            return "coordinator" if self.num_workers else "single"
        return "peer" if self.rank < self.num_compute else "worker"

    @property
    def num_workers(self) -> int:
        """Tasks that stream batches to task 0; none where all compute."""
        return max(self.num_tasks - self.num_compute, 0)

    @property
    def worker_rank(self) -> int:
        """A worker's number among the workers, from 1."""
        assert self.role == "worker"
        return self.rank - self.num_compute + 1

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> TaskEnvironment:
        """Read SLURM's variables; a single process where they are absent or count one task.

        Raises:
            LaunchError: a variable is not a number, or the rank is outside the count.
        """
        count_name = next((name for name in _NUM_TASKS if variables.get(name)), None)
        if count_name is None or not variables.get(_RANK):
            return cls()
        rank, count = _number(variables, _RANK), _number(variables, count_name)
        if count < 1 or rank >= count:
            raise LaunchError(
                f"{_RANK}={rank} does not fit {count_name}={count}",
                allowed=f"a rank below the number of tasks, as srun sets {_RANK}",
            )
        if count == 1:
            return cls(job_id=variables.get(_JOB_ID, ""))
        given = variables.get(SECRET_FILE_VARIABLE, "")
        return cls(
            rank=rank,
            num_tasks=count,
            job_id=variables.get(_JOB_ID, ""),
            num_nodes=_number(variables, _NUM_NODES) if variables.get(_NUM_NODES) else 1,
            node=variables.get(_NODE) or socket.gethostname(),
            local_rank=_number(variables, _LOCAL_RANK) if variables.get(_LOCAL_RANK) else 0,
            secret_file=Path(given) if given else _default_secret_file(variables),
            secret_is_given=bool(given),
            workers_come_back=variables.get(COME_BACK_VARIABLE) == "1",
        )


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables[name]
    if not (text.isascii() and text.isdigit()):
        raise LaunchError(f"{name}={text!r} is not a number", allowed="what srun sets")
    return int(text)


def _default_secret_file(variables: Mapping[str, str]) -> Path:
    """In the home folder, which the nodes of a cluster share. The name is the same in all tasks of
    a run, and no earlier run's, as far as the variables tell: what a killed run left there (the
    file where computing processes meet bears this name too) is not found by a later one."""
    names = _RUN_PARTS if variables.get(_NUM_COMPONENTS) else (*_RUN_PARTS, *_LAUNCH_PARTS)
    parts = [variables.get(name, "") or "0" for name in names]
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]", "_", part) for part in parts)
    return Path.home() / ".openwafer" / f"run-{name}.secret"


def computing_mark(secret_file: Path, rank: int) -> Path:
    """The file by which a task tells the local launcher that it computes: such a task cannot be
    started again in the middle of a run, as a worker can."""
    return secret_file.with_name(f"computes-{rank}")


_num_compute = [1]


def set_num_compute(count: int) -> None:
    """Say how many of the run's tasks compute, once the run's parameters are known."""
    _num_compute[0] = count


def current() -> TaskEnvironment:
    """This process's place, from its environment variables and `set_num_compute`."""
    return replace(TaskEnvironment.from_variables(os.environ), num_compute=_num_compute[0])


def is_master_ordinal() -> bool:
    """Whether this task is the coordinator (or the only one)."""
    return current().rank == 0


def is_streamer() -> bool:
    """Whether this task loads data."""
    return current().role in ("worker", "single")


def get_ordinal() -> int:
    """This task's rank, from 0."""
    return current().rank


def num_tasks() -> int:
    """All tasks of the run."""
    return current().num_tasks


def num_streamers() -> int:
    """The tasks that load data: all but the coordinator, or the only one."""
    return max(current().num_workers, 1)


def get_streaming_rank() -> int:
    """This task's number among those that load data, from 0.

    Remembers that it was asked (`was_consulted`): nobody can shard the data without this number,
    and whoever asks for it does. The coordinator, which loads data only to look at one batch, is
    told 0.
    """
    _consulted[0] = 1
    environment = current()
    return environment.worker_rank - 1 if environment.role == "worker" else 0


# One byte in memory shared with forked children: a dataset may ask in a DataLoader process.
_consulted = mmap.mmap(-1, 1)


def was_consulted() -> bool:
    """Whether user code asked for its streaming rank since `forget_consulted`."""
    return _consulted[0] != 0


def forget_consulted() -> None:
    """Start watching anew, before a data function is called."""
    _consulted[0] = 0

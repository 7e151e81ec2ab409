"""What a local task finds in its environment.

Decides the SLURM variables that `srun` would set, and that nothing of an outer job leaks in. Does
not start anything.
"""

from __future__ import annotations

from collections.abc import Mapping

from openwafer.streaming.tasks import COME_BACK_VARIABLE, SECRET_FILE_VARIABLE

__all__ = ["task_variables"]

# Variables of schedulers and MPI launchers: an outer job's must not be taken for ours.
_OUTER_JOB = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
_OUTER_RUN = (SECRET_FILE_VARIABLE, COME_BACK_VARIABLE)


def task_variables(
    base: Mapping[str, str],
    *,
    rank: int,
    num_tasks: int,
    job_id: str,
    secret_file: str,
    workers_come_back: bool,
) -> dict[str, str]:
    """The environment of task `rank`: `base` without an outer job's variables, and our own."""
    kept = {
        name: value
        for name, value in base.items()
        if not name.startswith(_OUTER_JOB) and name not in _OUTER_RUN
    }
    # Lines of a worker are to appear when they are printed, though its output is a pipe.
    kept.setdefault("PYTHONUNBUFFERED", "1")
    count = str(num_tasks)
    return kept | {
        "SLURM_JOB_ID": job_id,
        "SLURM_JOBID": job_id,
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": count,
        "SLURM_NPROCS": count,
        "SLURM_STEP_NUM_TASKS": count,
        "SLURM_TASKS_PER_NODE": count,
        "SLURM_NNODES": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURMD_NODENAME": "localhost",
        SECRET_FILE_VARIABLE: secret_file,
        COME_BACK_VARIABLE: "1" if workers_come_back else "0",
    }

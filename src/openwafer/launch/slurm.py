"""A run as a SLURM job: submitted, and its log followed.

Decides where the script is kept, which disagreements between flags and environment stop it, and
when following ends. The script's text is in `batch_script.py`. SLURM does the rest.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from openwafer.errors import LaunchError
from openwafer.files import replacing
from openwafer.launch.batch_script import JobRequest, batch_script

__all__ = ["JobState", "check_agreement", "follow", "job_state", "submit", "write_script"]

_POLL_SECONDS = 1.0
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESIZING"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What SLURM says of a job.

    exit_code: of the batch script; 128 + signal if one ended it. Means something once it is over.
    """

    name: str
    exit_code: int
    reason: str
    output: Path | None

    @property
    def is_over(self) -> bool:
        return self.name not in _WAITING and self.name not in _RUNNING


def check_agreement(request: JobRequest, variables: Mapping[str, str]) -> None:
    """Refuse a job of which SLURM's environment says something else than the flags do.

    sbatch's own variables win over what a script asks for, without a word; and inside an
    allocation the number of tasks is already decided.

    Raises:
        LaunchError: lists every disagreement with both values.
    """
    asked: list[tuple[str, str, str | None]] = [
        ("--account", "SBATCH_ACCOUNT", request.account),
        ("--partition", "SBATCH_PARTITION", request.partition),
        ("--time", "SBATCH_TIMELIMIT", request.time),
        ("--gres", "SBATCH_GRES", request.gres or None),
        ("--tasks", "SLURM_NTASKS", str(request.tasks)),
        ("--account", "SLURM_JOB_ACCOUNT", request.account),
        ("--partition", "SLURM_JOB_PARTITION", request.partition),
    ]
    different = [
        f"{flag} is {value}, and {name}={variables[name]}"
        for flag, name, value in asked
        if value is not None and variables.get(name) not in (None, "", value)
    ]
    if different:
        raise LaunchError(
            "SLURM's environment and the flags disagree: " + "; ".join(different),
            where="environment",
            allowed="the same value in both, or one of them only",
            hint="unset the variable, or leave the flag away",
        )


def write_script(request: JobRequest, folder: Path) -> Path:
    """Write the script to `<folder>/job.sbatch`, whole or not at all.

    Raises:
        LaunchError: it cannot be written.
    """
    path = folder / "job.sbatch"
    try:
        with replacing(path) as temporary:
            temporary.write_text(batch_script(request), encoding="utf-8")
            temporary.chmod(0o755)
    except OSError as error:
        raise LaunchError(f"cannot write the batch script: {error}", where=str(path)) from error
    return path


def submit(script: Path) -> str:
    """Hand the script to sbatch; gives the job's id.

    Raises:
        LaunchError: there is no sbatch, or it refuses the job (with its own words).
    """
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "there is no sbatch on this machine",
            allowed="a machine that submits SLURM jobs",
            hint="--dry_run prints the script; `openwafer launch` starts tasks without SLURM",
        )
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"sbatch refused the job: {words}", where=str(script))
    return done.stdout.strip().split(";")[0]


def job_state(job_id: str) -> JobState:
    """Ask SLURM.

    Raises:
        LaunchError: SLURM does not know the job, or does not answer.
    """
    done = subprocess.run(
        ["scontrol", "show", "--oneliner", "job", job_id],
        capture_output=True,
        text=True,
        check=False,
    )
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    if done.returncode or "JobState" not in fields:
        words = " ".join(done.stderr.split()) or "it does not answer"
        raise LaunchError(f"SLURM says nothing of job {job_id}: {words}")
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    output = fields.get("StdOut")
    return JobState(
        name=fields["JobState"],
        exit_code=128 + int(number) if number not in ("", "0") else int(code),
        reason=fields.get("Reason", ""),
        output=Path(output) if output else None,
    )


def follow(job_id: str, into: BinaryIO | None = None) -> int:
    """Copy the job's output as it grows, until the job is over; gives its exit code.

    A job that goes back into the queue is followed further. Ctrl-C ends following, not the job.

    Raises:
        LaunchError: SLURM does not know the job any more.
    """
    sink = into if into is not None else sys.stdout.buffer
    position, said = 0, ""
    while True:
        state = job_state(job_id)
        if state.name in _WAITING and state.name != said:
            print(f"job {job_id} waits: {state.reason}", file=sys.stderr, flush=True)
        said = state.name
        position = _copy_from(state.output, position, sink)
        if state.is_over:
            break
        time.sleep(_POLL_SECONDS)
    _copy_from(state.output, position, sink)
    print(f"job {job_id} {state.name}", file=sys.stderr, flush=True)
    return state.exit_code or (0 if state.name == "COMPLETED" else 1)


def _copy_from(path: Path | None, position: int, sink: BinaryIO) -> int:
    """Copy what is new; gives the place up to which it was copied."""
    if path is None or not path.exists():
        return position
    with open(path, "rb") as file:
        file.seek(position)
        shutil.copyfileobj(file, sink)
        sink.flush()
        return file.tell()

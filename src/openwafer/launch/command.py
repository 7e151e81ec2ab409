"""`openwafer submit` and the container flags: from arguments to a job.

Decides the flags and where a run's script and log are kept. Does not decide what they contain.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from openwafer.errors import LaunchError
from openwafer.launch.batch_script import JobRequest, batch_script
from openwafer.launch.container import Container, choose_container
from openwafer.launch.slurm import check_agreement, follow, submit, write_script

__all__ = ["add_container_flags", "add_submit_flags", "container_of", "run_submit"]

_TIME = re.compile(r"^(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2})$")


def add_container_flags(parser: argparse.ArgumentParser) -> None:
    """--container, --bind, --container_runtime, --nv."""
    parser.add_argument("--container", metavar="IMAGE", help="run in this image (.sif or folder)")
    parser.add_argument(
        "--bind", metavar="A,B", action="append", default=[], help="folders it sees, HOST[:INSIDE]"
    )
    parser.add_argument(
        "--container_runtime", metavar="NAME", help="singularity, apptainer or charliecloud"
    )
    parser.add_argument("--nv", action="store_true", help="show it NVIDIA's driver")


def add_submit_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `openwafer submit`."""
    parser.add_argument("--tasks", type=int, default=7, metavar="N", help="tasks of the job (7)")
    parser.add_argument("--cpus_per_task", type=int, metavar="N", help="CPUs of each task")
    parser.add_argument("--account", metavar="GRANT", help="who pays")
    parser.add_argument("--partition", metavar="NAME", help="SLURM's partition")
    parser.add_argument("--time", metavar="TIME", help="limit, e.g. 2:00:00")
    parser.add_argument(
        "--warn_seconds", type=int, default=120, metavar="S", help="save and stop before it (120)"
    )
    parser.add_argument("--requeue", action="store_true", help="go on in another job after it")
    parser.add_argument(
        "--gres", default="cs:cerebras:1", help="the machine as a resource; '' for none"
    )
    parser.add_argument("--job_name", metavar="NAME", help="by default that of the model's folder")
    parser.add_argument("--dry_run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--no_follow", action="store_true", help="do not wait for the job")
    add_container_flags(parser)
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="-- COMMAND")


def container_of(arguments: argparse.Namespace) -> Container | None:
    """The container that the flags ask for, or None.

    Raises:
        LaunchError: --bind without --container, or a wrong value.
    """
    if arguments.container is None:
        if arguments.bind or arguments.container_runtime:
            raise LaunchError("--bind is for a container, and there is none", hint="--container")
        return None
    return choose_container(
        arguments.container,
        arguments.bind,
        runtime=arguments.container_runtime,
        gpu=arguments.nv,
    )


def run_submit(arguments: argparse.Namespace) -> int:
    """Write the script, submit it, follow the job; gives the exit code.

    Raises:
        LaunchError: wrong flags, or SLURM refuses.
    """
    request, folder = _request(arguments)
    check_agreement(request, os.environ)
    if arguments.dry_run:
        print(batch_script(request), end="")
        return 0
    script = write_script(request, folder)
    job_id = submit(script)
    print(f"Submitted batch job {job_id}: {script}", flush=True)
    if arguments.no_follow:
        return 0
    try:
        return follow(job_id)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on; `scancel {job_id}` ends it")
        return 130


def _request(arguments: argparse.Namespace) -> tuple[JobRequest, Path]:
    command = arguments.script[1:] if arguments.script[:1] == ["--"] else arguments.script
    if not command:
        raise LaunchError(
            "there is no command to submit",
            allowed="openwafer submit [flags] -- COMMAND [ARGUMENT ...]",
            hint="openwafer submit --tasks 7 -- python run.py --mode train --params params.yaml",
        )
    _check_numbers(arguments)
    folder = _model_dir(command).resolve()
    request = JobRequest(
        command=tuple(command),
        job_name=arguments.job_name or folder.name,
        output=str(folder / "slurm-%j.out"),
        tasks=arguments.tasks,
        cpus_per_task=arguments.cpus_per_task,
        account=arguments.account,
        partition=arguments.partition,
        time=arguments.time,
        warn_seconds=arguments.warn_seconds,
        requeue=arguments.requeue,
        gres=arguments.gres,
        container=container_of(arguments),
    )
    return request, folder


def _check_numbers(arguments: argparse.Namespace) -> None:
    for flag in ("tasks", "cpus_per_task", "warn_seconds"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise LaunchError(f"--{flag} is {value}", where=f"--{flag}", allowed="1 or more")
    if arguments.time is not None and not _TIME.match(arguments.time):
        raise LaunchError(
            f"--time {arguments.time} is not a time",
            where="--time",
            allowed="MINUTES, MM:SS, HH:MM:SS, DAYS-HH[:MM[:SS]]",
        )
    for flag in ("account", "partition", "gres", "job_name"):
        value = getattr(arguments, flag) or ""
        if re.search(r"[\s#]", value) or value.startswith("-"):
            raise LaunchError(f"--{flag} {value!r} cannot stand in a batch script")


def _model_dir(command: Sequence[str]) -> Path:
    """Where the run will write: its --model_dir, else beside its script."""
    script = next((part for part in command if part.endswith(".py")), None)
    for position, part in enumerate(command):
        name, equals, value = part.partition("=")
        if name in ("--model_dir", "-o"):
            given = value if equals else next(iter(command[position + 1 :]), "")
            if given:
                return Path(given)
    return (Path(script).parent if script else Path()) / "model_dir"

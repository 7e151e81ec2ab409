"""The batch script of a run: validate, compile, then the run itself on all tasks.

Decides the text of the script. It is what the documentation has people write by hand (spec,
sections 1.4 and 8.5), so that it can be read, kept and changed. Does not submit it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from openwafer.launch.container import LEAKS, Container

__all__ = ["JobRequest", "batch_script"]

_ADDRESS_FLAGS = ("--cs_ip", "-cs")
_ONLY_FLAGS = ("--validate_only", "--compile_only")
STOPPED_EXIT_CODES = (128 + 15, 128 + 10)
"""A run that SIGTERM or SIGUSR1 stopped ends with one of these, after it has saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What is asked of SLURM for one run.

    command: the run's command line, as it would be typed; `--cs_ip` is added where it is absent.
    tasks: one coordinator and workers that stream the data.
    time: as SLURM writes it, `2:00:00`.
    warn_seconds: how long before the end of that time the run is told to save and stop.
    requeue: a run that the time limit stopped goes back into the queue and resumes.
    gres: the machine as a resource; empty for a cluster that declares none.
    """

    command: tuple[str, ...]
    job_name: str
    output: str
    tasks: int = 7
    cpus_per_task: int | None = None
    account: str | None = None
    partition: str | None = None
    time: str | None = None
    warn_seconds: int = 120
    requeue: bool = False
    gres: str = "cs:cerebras:1"
    container: Container | None = None


def batch_script(request: JobRequest) -> str:
    """The script's text; ends with a line break."""
    lines = ["#!/bin/bash", *_directives(request), "", "set -euo pipefail", ""]
    if request.container:
        lines += [
            "# Of the modules outside, nothing is meant for the image.",
            f"unset {' '.join(LEAKS)}",
            "",
        ]
    lines += _address_lines(request)
    command = _without(request.command)
    one = ("srun", "--ntasks=1", "--kill-on-bad-exit")
    mode = _mode(command)
    lines += ["# Kernel matching, then the plan: both stop the job before it takes all its tasks."]
    lines += [_line(request, one, (*command, flag)) for flag in _ONLY_FLAGS]
    lines += [
        "",
        f"# {mode or 'The run'}: task 0 coordinates and computes, the others stream data.",
    ]
    run = _line(request, ("srun", "--kill-on-bad-exit"), command, address=_address(request))
    lines += [run, *([] if not request.requeue else _requeue_lines())]
    return "\n".join(lines) + "\n"


def _directives(request: JobRequest) -> list[str]:
    given: list[tuple[str, object]] = [
        ("job-name", request.job_name),
        ("output", request.output),
        ("open-mode", "append"),
        ("gres", request.gres or None),
        ("ntasks", request.tasks),
        ("cpus-per-task", request.cpus_per_task),
        ("account", request.account),
        ("partition", request.partition),
        ("time", request.time),
        ("signal", f"TERM@{request.warn_seconds}" if request.time else None),
    ]
    lines = [f"#SBATCH --{name}={value}" for name, value in given if value is not None]
    return [*lines, "#SBATCH --requeue" if request.requeue else "#SBATCH --no-requeue"]


def _address_lines(request: JobRequest) -> list[str]:
    if _address(request) != '"${CS_IP_ADDR}"':
        return []
    return [
        "# A site with the machine sets CS_IP_ADDR where the resource is granted. Elsewhere the",
        "# coordinator listens on this node, at another port if this one is taken.",
        'export CS_IP_ADDR="${CS_IP_ADDR:-${SLURMD_NODENAME}:9000}"',
        "",
    ]


def _requeue_lines() -> list[str]:
    stopped = " || ".join(f"$code -eq {code}" for code in STOPPED_EXIT_CODES)
    return [
        "code=$?",
        "set -e",
        f"if [[ {stopped} ]]; then",
        "    # Stopped before the time limit, with a checkpoint: the same script goes on from it.",
        '    scontrol requeue "${SLURM_JOB_ID}"',
        "fi",
        "exit $code",
    ]


def _line(
    request: JobRequest, starter: Sequence[str], command: Sequence[str], *, address: str = ""
) -> str:
    inside = request.container.wrap(command) if request.container else list(command)
    text = shlex.join([*starter, *inside])
    if not address:
        return text
    line = f"{text} --cs_ip {address}"
    return f"set +e\n{line}" if request.requeue else line


def _address(request: JobRequest) -> str:
    """The run's `--cs_ip`, quoted: the one given, or the site's variable."""
    command = request.command
    for position, part in enumerate(command):
        name, _, value = part.partition("=")
        if name in _ADDRESS_FLAGS:
            given = value or (command[position + 1] if position + 1 < len(command) else "")
            if given not in ("", "local", "$CS_IP_ADDR", "${CS_IP_ADDR}"):
                return shlex.quote(given)
    return '"${CS_IP_ADDR}"'


def _without(command: Sequence[str]) -> tuple[str, ...]:
    """The command without the flags that the script itself adds."""
    kept: list[str] = []
    skip = False
    for part in command:
        if skip:
            skip = False
            continue
        name, equals, _ = part.partition("=")
        if name in _ADDRESS_FLAGS:
            skip = not equals
        elif part not in _ONLY_FLAGS:
            kept.append(part)
    return tuple(kept)


def _mode(command: Sequence[str]) -> str:
    for flag, value in pairwise(command):
        if flag in ("--mode", "-m"):
            return value
    return ""

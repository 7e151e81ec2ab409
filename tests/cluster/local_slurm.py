"""A real SLURM on one machine, without systemd: munged, slurmctld and slurmd in one folder.

    python tests/cluster/local_slurm.py start FOLDER     prints SLURM_CONF=... for the shell
    python tests/cluster/local_slurm.py stop FOLDER

One node that declares 28 CPUs and one wafer (`cs:cerebras:1`), ports of its own on loopback, so
that it disturbs no other SLURM. Needs root (slurmd refuses other users) and Debian's slurm-wlm and
munge.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")
NUM_CPUS = 28

SLURM_CONF = """\
ClusterName=wafertest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
GresTypes=cs
KillWait=5
MinJobAge=600
JobRequeue=1
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} Boards=1 SocketsPerBoard=1 \
CoresPerSocket={num_cpus} ThreadsPerCore=1 Gres=cs:cerebras:1 State=UNKNOWN
PartitionName=sdf Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""

GRES_CONF = "NodeName={host} Name=cs Type=cerebras File=/dev/null\n"


class MissingSlurmError(RuntimeError):
    """This machine cannot run the test cluster; the message says why."""


def check_machine() -> None:
    """Raises MissingSlurmError."""
    if os.geteuid() != 0:
        raise MissingSlurmError("slurmd runs as root only")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise MissingSlurmError(
            f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
        )


def environment(folder: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What sbatch, srun and the like need to talk to this cluster."""
    outer = ("SLURM", "SBATCH_", "SRUN_")
    kept = {name: value for name, value in base.items() if not name.startswith(outer)}
    return kept | {"SLURM_CONF": str(folder / "slurm.conf")}


def start(folder: Path, timeout_seconds: float = 60) -> None:
    """Start the daemons and wait until the node takes jobs.

    Raises:
        MissingSlurmError: it cannot run here, or did not come up in time.
    """
    check_machine()
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    host = socket.gethostname().split(".")[0]
    controller_port, node_port = _free_ports(2)
    values = {
        "host": host,
        "folder": folder,
        "controller_port": controller_port,
        "node_port": node_port,
        "num_cpus": NUM_CPUS,
    }
    (folder / "slurm.conf").write_text(SLURM_CONF.format_map(values))
    (folder / "gres.conf").write_text(GRES_CONF.format_map(values))
    _start_munged(folder)
    conf = str(folder / "slurm.conf")
    subprocess.run(["slurmctld", "-i", "-f", conf], check=True)
    subprocess.run(["slurmd", "-f", conf, "-N", host], check=True)
    _wait_until_idle(folder, timeout_seconds)


def stop(folder: Path, timeout_seconds: float = 30) -> None:
    """End all jobs and daemons of the folder."""
    variables = environment(folder)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["scancel", "--user=root"], env=variables, timeout=20, capture_output=True)
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            jobs = subprocess.run(
                ["squeue", "--noheader"], env=variables, timeout=20, capture_output=True
            )
            if jobs.returncode or not jobs.stdout.strip():
                break
            time.sleep(0.2)
    for name in ("slurmd.pid", "slurmctld.pid", "munge/munged.pid"):
        _end(folder / name)


def _start_munged(folder: Path) -> None:
    munge = folder / "munge"
    os.chmod(munge, 0o700)
    key = munge / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    os.chmod(munge, 0o755)  # the socket's folder has to be open to clients, not to writers
    subprocess.run(
        [
            "munged",
            f"--key-file={key}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'munged.pid'}",
            f"--log-file={munge / 'munged.log'}",
            f"--seed-file={munge / 'seed'}",
            "--num-threads=2",
        ],
        check=True,
    )


def _wait_until_idle(folder: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    state = ""
    while time.monotonic() < deadline:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"],
            env=environment(folder), capture_output=True, text=True, check=False,
        )  # fmt: skip
        state = (asked.stdout or asked.stderr).strip()
        if state == "idle":
            return
        time.sleep(0.2)
    logs = "\n".join(
        path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log"))
    )
    stop(folder)
    raise MissingSlurmError(f"the node did not come up, its state is {state!r}\n{logs}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


def _end(pid_file: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] not in ("start", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(argv[1]).resolve()
    if argv[0] == "stop":
        stop(folder)
        return 0
    try:
        start(folder)
    except MissingSlurmError as error:
        print(f"no test cluster: {error}", file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={folder / 'slurm.conf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

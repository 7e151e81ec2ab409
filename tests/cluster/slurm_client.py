"""What a user of the test cluster does: submit, look, wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import local_slurm


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; commands run with its environment."""

    folder: Path

    @property
    def home(self) -> Path:
        """A home folder of its own: job numbers begin at 1 in each test cluster, and what a job of
        an earlier one left in the user's must not be found."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return home

    @property
    def environment(self) -> dict[str, str]:
        programs = Path(sys.executable).parent
        base = local_slurm.environment(self.folder)
        return base | {
            "PATH": f"{programs}{os.pathsep}{base['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.home),
        }

    def run(
        self, *command: str, cwd: Path, timeout: float = 600, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment | variables,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def sbatch(self, script: Path, *flags: str, **variables: str) -> str:
        """Submit; gives the job's id."""
        done = self.run("sbatch", "--parsable", *flags, str(script), cwd=script.parent, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job_id: str) -> dict[str, str]:
        done = self.run("scontrol", "show", "-o", "job", job_id, cwd=self.folder)
        pairs = (word.split("=", 1) for word in done.stdout.split() if "=" in word)
        return {pair[0]: pair[1] for pair in pairs}

    def wait(self, job_id: str, seconds: float = 600) -> dict[str, str]:
        """The job's state once it is over."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job_id))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"job {job_id} does not end: {state}"
            time.sleep(0.3)
        return state


def until(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)

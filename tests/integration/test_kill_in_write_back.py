"""A process that is killed while the optimizer writes weights back to the disk loses nothing: the
store's file goes with it, and the run goes on from its last checkpoint with the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fc_mnist_runs import (
    DROP,
    RUN_PY,
    SMALL,
    assert_same_run,
    checkpoint_steps,
    command_environment,
    run_here,
    write_params,
)

NUM_STEPS = 12
RULES = {
    **SMALL,
    "runconfig.max_steps": NUM_STEPS,
    "runconfig.log_steps": 1,
    "runconfig.checkpoint_steps": 3,
    "optimizer.optimizer_type": "AdamW",
    "optimizer.momentum": DROP,
    "optimizer.learning_rate": 0.01,
}

KILLED = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(1)
from openwafer.runtime.stores.disk_store import DiskStore

at, updates, write, update = int(sys.argv.pop(1)), 0, os.pwritev, DiskStore.update

def torn(file, views, offset):
    if updates < at:
        return write(file, views, offset)
    write(file, [views[0][:4096]], offset)
    os.kill(os.getpid(), signal.SIGKILL)

def counted(self, *arguments):
    global updates
    updates += 1
    return update(self, *arguments)

os.pwritev, DiskStore.update = torn, counted
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("at_update", "clips"), [(22, False), (15, True)])
def test_killed_between_two_blocks_of_a_write(
    at_update: int, clips: bool, tmp_path: Path, flags_of: Callable[[str], tuple[str, ...]]
) -> None:
    rules = {**RULES, "optimizer.max_gradient_norm": 0.3} if clips else RULES
    params = write_params(tmp_path / "params.yaml", rules)
    flags = flags_of("disk")
    given = ("--mode", "train", "--params", str(params), "--model_dir", str(tmp_path / "killed"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(at_update), str(RUN_PY), *given, *flags],
        env=command_environment(),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    saved = checkpoint_steps(tmp_path / "killed")
    assert saved
    assert max(saved) < NUM_STEPS
    assert list((tmp_path / "store").iterdir()) == []
    resumed = run_here("train", params, tmp_path / "killed", *flags).succeeded()
    whole = run_here("train", params, tmp_path / "whole", *flags).succeeded()
    assert_same_run(resumed, whole)

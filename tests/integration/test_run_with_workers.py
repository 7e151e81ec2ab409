"""`openwafer launch`: a coordinator and workers on this machine, started as srun would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from fc_mnist_runs import (
    MODE_FLAGS,
    RUN_PY,
    SMALL,
    Outcome,
    assert_same_run,
    checkpoint_steps,
    command_environment,
    read_metrics,
    run_here,
    steps_logged,
    write_params,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")

MARK = "OPENWAFER_TEST_RUN"


class Launched:
    """One `openwafer launch`, whose processes are told by a variable in their environment."""

    def __init__(
        self,
        num_tasks: int,
        params: Path,
        model_dir: Path,
        *flags: str,
        script: Path = RUN_PY,
        max_restarts: int = 0,
    ) -> None:
        self.model_dir = model_dir
        self.mark = uuid.uuid4().hex
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, script, "--mode", "train", "--params", params]
        command += ["--model_dir", model_dir, "--cs_ip", f"127.0.0.1:{self.port}", *flags]
        launch = [sys.executable, "-m", "openwafer.cli", "launch", "--tasks", num_tasks]
        launch += ["--max_restarts", max_restarts, "--"]
        model_dir.parent.mkdir(parents=True, exist_ok=True)
        self._output = model_dir.with_name(f"{model_dir.name}.{self.mark}.txt")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in (*launch, *command)],
                env=command_environment() | {MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def processes(self) -> dict[int, str]:
        """Processes of this run that are alive, and their SLURM rank ("" for the launcher)."""
        found: dict[int, str] = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                variables = dict(
                    entry.split("=", 1)
                    for entry in (folder / "environ").read_text().split("\0")
                    if "=" in entry
                )
                if variables.get(MARK) == self.mark:
                    found[int(folder.name)] = variables.get("SLURM_PROCID", "")
        return found

    def task(self, rank: int) -> int:
        (pid,) = [pid for pid, found in self.processes().items() if found == str(rank)]
        return pid

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while steps_logged(self.model_dir) < step:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)

    def finish(self, seconds: float = 90) -> Outcome:
        """Wait for the end; afterwards nothing of the run may be left."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.output}")
        assert self.processes() == {}, "processes were left behind"
        return Outcome(code, self.output, self.model_dir)

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Generator[Callable[..., Launched], None, None]:
    """`launch(num_tasks, params, name, *flags)`; whatever is left at the end is killed."""
    runs: list[Launched] = []

    def start(num_tasks: int, params: Path, name: str, *flags: str, **options: Any) -> Launched:
        runs.append(Launched(num_tasks, params, tmp_path / name, *flags, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()


def strangers_knock(port: int, stop: threading.Event, answers: list[str]) -> None:
    """Connect again and again: say nothing, send rubbish, or claim to be worker 1."""
    claims = (b"", b"GET / HTTP/1.1\r\n\r\n", b"OWHS\x01" + bytes(3) + b"\x01" + bytes(32))
    number = 0
    while not stop.wait(0.05):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.settimeout(0.2)
                connection.sendall(claims[number % len(claims)])
                number += 1
                with contextlib.suppress(OSError):
                    connection.recv(4096)
                answers.append("connected")
        except OSError:
            answers.append("refused")


EXAMPLE_200: dict[str, Any] = {
    "runconfig.max_steps": 200,
    "runconfig.log_steps": 1,
    "runconfig.checkpoint_steps": 200,
}


def test_three_workers_and_strangers_change_nothing(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    """200 steps of the example as it is, dropout on, with three workers, while somebody else
    connects to the coordinator all the time: the bits are those of a run in one process."""
    params = write_params(tmp_path / "params.yaml", EXAMPLE_200)
    flags = ("--execution_mode", "layer_pipelined")
    run = launch(4, params, "workers", *flags)
    stop, answers = threading.Event(), list[str]()
    thread = threading.Thread(target=strangers_knock, args=(run.port, stop, answers))
    thread.start()
    try:
        outcome = run.finish().succeeded()
    finally:
        stop.set()
        thread.join()
    assert "connected" in answers, "nobody knocked while the coordinator listened"
    assert "Streamers are ready" in outcome.output
    assert "Traceback" not in outcome.output
    alone = run_here("train", params, tmp_path / "alone", *MODE_FLAGS["layer_pipelined"])
    assert_same_run(outcome, alone.succeeded())


def test_a_killed_worker_ends_the_run_which_then_goes_on(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    """kill -9 of the only worker: an error that names it, in time, and nobody left behind. The
    same command then ends with the bits of an undisturbed run."""
    changes = {
        **SMALL,
        **EXAMPLE_200,
        "runconfig.max_steps": 400,
        "runconfig.checkpoint_steps": 25,
        "optimizer.grad_accum_steps": 2,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    flags = ("--execution_mode", "weight_streaming")
    run = launch(2, params, "workers", *flags)
    run.wait_for_step(60)
    worker = run.task(1)
    began = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    lost = run.finish(60)
    assert time.monotonic() - began < 30
    assert lost.exit_code != 0
    (error,) = [line for line in lost.output.splitlines() if line.startswith("ERROR")]
    assert "worker 1" in error
    assert f"pid {worker}" in error
    assert "was lost" in error
    assert "Traceback" not in lost.output
    last = read_metrics(run.model_dir)[-1]["step"]
    assert last < 400
    assert max(checkpoint_steps(run.model_dir)) == last, "what was reached was not saved"
    outcome = launch(2, params, "workers", *flags).finish().succeeded()
    assert "Going on from" in outcome.output
    alone = run_here("train", params, tmp_path / "alone", *MODE_FLAGS["weight_streaming"])
    assert_same_run(outcome, alone.succeeded())


@pytest.mark.slow
def test_killed_workers_come_back_and_nothing_is_lost(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    """Each of two workers is killed once; the run ends with the bits of an undisturbed one."""
    changes = {**SMALL, **EXAMPLE_200, "runconfig.max_steps": 2000}
    params = write_params(tmp_path / "params.yaml", changes)
    run = launch(3, params, "workers", max_restarts=1)
    for rank, step in ((1, 60), (2, 200)):
        run.wait_for_step(step)
        os.kill(run.task(rank), signal.SIGKILL)
    outcome = run.finish(200).succeeded()
    assert outcome.output.count("it is started again") == 2
    alone = run_here("train", params, tmp_path / "alone", "--cs_ip", "local").succeeded()
    assert_same_run(outcome, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["layer_pipelined", "weight_streaming"])
@pytest.mark.parametrize("num_tasks", [2, 4])
def test_200_steps_with_workers(
    num_tasks: int, mode: str, tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    params = write_params(tmp_path / "params.yaml", EXAMPLE_200)
    outcome = launch(num_tasks, params, "workers", "--execution_mode", mode).finish().succeeded()
    alone = run_here("train", params, tmp_path / "alone", *MODE_FLAGS[mode]).succeeded()
    assert_same_run(outcome, alone)


@pytest.mark.slow
def test_a_killed_coordinator_ends_the_run_which_then_goes_on(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    changes = {**SMALL, **EXAMPLE_200, "runconfig.max_steps": 400, "runconfig.checkpoint_steps": 25}
    params = write_params(tmp_path / "params.yaml", changes)
    run = launch(3, params, "workers")
    run.wait_for_step(60)
    os.kill(run.task(0), signal.SIGKILL)
    killed = run.finish(40)
    assert killed.exit_code == 128 + signal.SIGKILL
    assert "task 0 (coordinator) was ended by SIGKILL" in killed.output
    outcome = launch(3, params, "workers").finish().succeeded()
    alone = run_here("train", params, tmp_path / "alone", "--cs_ip", "local").succeeded()
    assert_same_run(outcome, alone)


@pytest.mark.slow
def test_a_killed_launcher_takes_its_tasks_along(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    changes = {**SMALL, **EXAMPLE_200, "runconfig.max_steps": 100_000}
    params = write_params(tmp_path / "params.yaml", changes)
    run = launch(3, params, "workers")
    run.wait_for_step(5)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    deadline = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < deadline, f"left behind: {run.processes()}"
        time.sleep(0.05)


def slow_data_script(folder: Path, nap: str = "0.02") -> Path:
    """A run.py whose data take longer than its steps, so that the coordinator mostly waits.

    nap: how many seconds a batch takes, in Python.
    """
    script = folder / "run.py"
    script.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(RUN_PY.parent)!r})
from data import eval_input_dataloader, train_input_dataloader
from model import MNISTModel
from utils import set_defaults
from openwafer import run

def slow_train_data(params):
    loader = train_input_dataloader(params)
    def collate(samples, combine=loader.collate_fn):
        time.sleep({nap})
        return combine(samples)
    loader.collate_fn = collate
    return loader

if __name__ == "__main__":
    run(MNISTModel, slow_train_data, eval_input_dataloader, set_defaults)
"""
    )
    return script


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_a_checkpoint(
    number: signal.Signals, tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    changes = {
        **SMALL,
        **EXAMPLE_200,
        "runconfig.max_steps": 20_000,
        "runconfig.checkpoint_steps": 15_000,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    run = launch(3, params, "workers", script=slow_data_script(tmp_path))
    run.wait_for_step(20)
    began = time.monotonic()
    run.process.send_signal(number)
    stopped = run.finish(60)
    assert time.monotonic() - began < 30, "it waited for something"
    assert stopped.exit_code == 128 + number
    assert "Traceback" not in stopped.output
    last = read_metrics(run.model_dir)[-1]["step"]
    assert f"Training stopped by {number.name} at global step {last}" in stopped.output
    assert checkpoint_steps(run.model_dir) == [last]


@pytest.mark.slow
def test_a_slow_worker_is_named_in_the_summary(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    """One of three workers takes much longer for each of its batches than the steps between take,
    and the others take much less: both by more than a busy machine makes of it."""
    changes = {
        **EXAMPLE_200,
        "runconfig.max_steps": 24,
        "runconfig.checkpoint_steps": 24,
        "model.hidden_size": 800,
        "train_input.batch_size": 128,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    nap = "1.0 if os.environ['SLURM_PROCID'] == '2' else 0"
    run = launch(4, params, "workers", script=slow_data_script(tmp_path, nap))
    outcome = run.finish(200).succeeded()
    (line,) = [line for line in outcome.output.splitlines() if "input-bound" in line]
    verdict = re.search(r"input-bound: worker 2 at (\d+) % of the needed rate$", line)
    assert verdict, line
    assert 1 <= int(verdict[1]) < 90
    performance = json.loads((outcome.model_dir / "performance/performance.json").read_text())
    assert performance["input_bound_workers"] == verdict[0]


@pytest.mark.slow
def test_a_worker_whose_data_fail_tells_the_coordinator(
    tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    """Data that only the workers cannot read: their own error reaches the user, with its line."""
    changes = {
        **SMALL,
        **EXAMPLE_200,
        "train_input.batch_size": 1438,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    failed = launch(2, params, "workers").finish(60)
    assert failed.exit_code == 2
    assert "1437 samples, batch_size=1438" in failed.output
    assert "Traceback" not in failed.output
    assert not (tmp_path / "workers").exists()

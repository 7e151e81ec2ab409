"""`--num_csx` from the command line: replicas of weight streaming in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_results import losses, weights

LIMIT_SECONDS = 120
VARIABLES = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(model: str, model_dir: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "openwafer.cli", "train", model),
        *("--cs_ip", "local", "--execution_mode", "weight_streaming", "--model_dir"),
        *(str(model_dir), *flags),
    ]


def train(model: str, model_dir: Path, *flags: str) -> str:
    done = subprocess.run(
        command(model, model_dir, *flags),
        env=VARIABLES, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CHANGES = {"gpt2/tiny": ["model.dropout_rate=0.1"], "unet/tiny": []}
EVERY_STEP = ("--set", "runconfig.log_steps=1", "model.mixed_precision=False")


@pytest.mark.parametrize("model", CHANGES)
def test_two_replicas_are_one_process_with_as_many_microbatches(model: str, tmp_path: Path) -> None:
    """Dropout and clipping included; and a checkpoint of two goes on in one."""
    changes = (*EVERY_STEP, *CHANGES[model])
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    train(model, alone, "--max_steps", "6", "--num_microbatches", "2", *changes)
    output = train(model, shared, "--max_steps", "3", "--num_csx", "2", *changes)
    assert "Starting 2 processes" in output
    output = train(model, shared, "--max_steps", "6", "--num_microbatches", "2", *changes)
    assert "Going on from" in output
    assert losses(shared) == pytest.approx(losses(alone), rel=2e-6)
    expected = weights(alone, 6)
    found = weights(shared, 6)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_replica_ends_the_others(victim: int, tmp_path: Path) -> None:
    """Within 30 seconds, and it is said which process was lost."""
    log = tmp_path / "log.txt"
    flags = ("--num_csx", "2", "--max_steps", "1000000", "--set", "runconfig.log_steps=1")
    with log.open("wb") as output:
        launched = subprocess.Popen(
            command("gpt2/tiny", tmp_path / "run", *flags),
            env=VARIABLES, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while "Step=3," not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text()
            tasks = sorted(map(int, children.split()))
            assert len(tasks) == 2
            os.kill(tasks[victim], signal.SIGKILL)
            began = time.monotonic()
            code = launched.wait(LIMIT_SECONDS)
            seconds = time.monotonic() - began
        finally:
            launched.kill()
            launched.wait()
    text = log.read_text()
    assert code == 128 + signal.SIGKILL, text
    assert seconds < 30, text
    assert "of the 2 that compute together was lost" in text
    assert "Traceback" not in text
    assert not any(Path(f"/proc/{task}").exists() for task in tasks)


def test_timeline_and_summary_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    output = train("gpt2/tiny", tmp_path / "run", "--max_steps", "4", "--timeline", str(path))
    (line,) = [line for line in output.splitlines() if "not hidden behind compute" in line]
    assert "Bound by" in line
    performance = json.loads((tmp_path / "run/performance/performance.json").read_text())
    shares = performance["exposed_seconds_per_step"]
    assert sum(shares.values()) == pytest.approx(performance["step_seconds"])
    events = json.loads(path.read_text())["traceEvents"]
    computed = {e["name"] for e in events if e["ph"] == "X" and e["cat"] == "compute"}
    assert any(name.endswith("forward") for name in computed)
    assert any(name.endswith("backward") for name in computed)
    assert sum(e["ph"] == "X" and e["cat"] == "step" for e in events) == 4

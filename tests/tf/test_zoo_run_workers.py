"""Zoo models in TensorFlow as three tasks: one computes, two stream the data."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

OPENWAFER = [sys.executable, "-m", "openwafer.cli"]


def run(command: str, name: str, folder: Path, *flags: str, tasks: int) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    told = ["--frontend", "tf", "--model_dir", str(folder), *flags]
    told += ["--cs_ip", address if tasks > 1 else "local"]
    launch = [*OPENWAFER, "launch", "--tasks", str(tasks), "--"] if tasks > 1 else []
    done = subprocess.run(
        [*launch, *OPENWAFER, command, name, *told, "--set", "runconfig.log_steps=1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    return text


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "train" / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def evaluations(text: str) -> list[str]:
    return [line.partition("Evaluation:")[2] for line in text.splitlines() if "Evaluation:" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_give_the_losses_of_one_process(tmp_path: Path) -> None:
    """The second run of three goes on within an epoch, of which each worker reads its part."""
    name, alone, three = "fc_mnist/tiny", tmp_path / "alone", tmp_path / "three"
    run("train", name, alone, "--max_steps", "8", tasks=1)
    expected = losses(alone)
    assert len(expected) == 8
    for last_step in ("5", "8"):
        run("train", name, three, "--max_steps", last_step, tasks=3)
    assert losses(three) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["layer_pipelined", "weight_streaming"])
def test_a_language_model_with_streamed_data(mode: str, tmp_path: Path) -> None:
    flags = ["--execution_mode", mode, "--max_steps", "4", "--set"]
    flags += ["model.layers=1", "train_input.batch_size=4", "train_input.embedded_bytes=20000"]
    for tasks in (1, 3):
        run("train", "gpt2/tiny", tmp_path / str(tasks), *flags, tasks=tasks)
    expected = losses(tmp_path / "1")
    assert len(expected) == 4
    assert losses(tmp_path / "3") == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_and_evaluation_take_turns_with_the_same_workers(tmp_path: Path) -> None:
    name, steps = "fc_mnist/tiny", ["--max_steps", "6"]
    alone = run("train_and_eval", name, tmp_path / "alone", *steps, tasks=1)
    three = run("train_and_eval", name, tmp_path / "three", *steps, tasks=3)
    assert losses(tmp_path / "three") == losses(tmp_path / "alone")
    assert len(evaluations(alone)) == 1
    assert evaluations(three) == evaluations(alone)
    alone = run("eval_all", name, tmp_path / "alone", tasks=1)
    three = run("eval_all", name, tmp_path / "three", tasks=3)
    assert len(evaluations(alone)) == 2
    assert evaluations(three) == evaluations(alone)

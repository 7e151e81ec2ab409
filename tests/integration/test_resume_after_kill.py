"""Runs that are killed, stopped or find a damaged checkpoint go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fc_mnist_runs import (
    DROP,
    EXAMPLE,
    RUN_PY,
    SMALL,
    Outcome,
    ScriptProcess,
    assert_same_run,
    checkpoint_steps,
    command_environment,
    everything_in,
    read_metrics,
    run_here,
    start_script,
    steps_logged,
    write_params,
)

NUM_STEPS = 150
RULES: dict[str, Any] = {
    **SMALL,
    "runconfig.max_steps": NUM_STEPS,
    "runconfig.log_steps": 1,
    "runconfig.checkpoint_steps": 7,
    "runconfig.keep_checkpoint_max": 3,
    # With state of every kind: averages, a step count, a schedule, a loss scale that changes.
    "optimizer.optimizer_type": "AdamW",
    "optimizer.momentum": DROP,
    "optimizer.grad_accum_steps": 2,
    "optimizer.max_gradient_norm": 0.3,
    "optimizer.loss_scaling_factor": "dynamic",
    "optimizer.steps_per_increase": 20,
    "optimizer.initial_loss_scale": 4.0,
    "optimizer.learning_rate": [
        {
            "scheduler": "Linear",
            "initial_learning_rate": 0.0,
            "end_learning_rate": 0.01,
            "steps": 50,
        },
        {
            "scheduler": "Exponential",
            "initial_learning_rate": 0.01,
            "decay_steps": 40,
            "decay_rate": 0.5,
        },
    ],
}

Flags = Callable[[str], tuple[str, ...]]


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_params(tmp_path_factory.mktemp("params") / "params.yaml", RULES)


@pytest.fixture(scope="module")
def undisturbed(
    params: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, tuple[str, ...]], Outcome]:
    """The same run without a disturbance, once for each mode."""
    runs: dict[str, Outcome] = {}

    def run(mode: str, flags: tuple[str, ...]) -> Outcome:
        if mode not in runs:
            folder = tmp_path_factory.mktemp("undisturbed") / mode
            runs[mode] = run_here("train", params, folder, *flags).succeeded()
        return runs[mode]

    return run


def kill_at(process: ScriptProcess, step: int, generator: random.Random) -> None:
    """kill -9 once `step` is logged, at any moment of the following steps."""
    process.wait_for_step(step)
    time.sleep(generator.uniform(0, 0.01))
    process.signal(signal.SIGKILL)
    assert process.finish().exit_code == -signal.SIGKILL, "it had ended by itself"


@pytest.mark.parametrize(
    ("mode", "seed"),
    [
        ("plain", 1),
        ("layer_pipelined", 2),
        pytest.param("weight_streaming", 3, marks=pytest.mark.slow),
        ("disk", 4),
        pytest.param("plain", 5, marks=pytest.mark.slow),
        pytest.param("layer_pipelined", 6, marks=pytest.mark.slow),
        pytest.param("weight_streaming", 7, marks=pytest.mark.slow),
        pytest.param("disk", 8, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_with_the_same_bits(
    mode: str, seed: int, params: Path, tmp_path: Path, flags_of: Flags, undisturbed: Any
) -> None:
    """Killed twice at random steps, then left alone."""
    model_dir, flags = tmp_path / "model_dir", flags_of(mode)
    generator = random.Random(seed)
    first = generator.randint(5, NUM_STEPS // 2)
    for step in (first, generator.randint(first + 5, NUM_STEPS - 20)):
        kill_at(start_script("train", params, model_dir, *flags), step, generator)
        assert NUM_STEPS not in checkpoint_steps(model_dir)
    outcome = start_script("train", params, model_dir, *flags).finish().succeeded()
    assert re.search(r"Going on from .*checkpoint_\d+\.mdl at global step", outcome.output)
    assert_same_run(outcome, undisturbed(mode, flags))
    assert len(checkpoint_steps(model_dir)) == 3
    leftovers = [name for name in everything_in(model_dir) if "tmp" in name or "partial" in name]
    assert leftovers == []
    if mode == "disk":
        assert everything_in(tmp_path / "store") == {}, "a killed run left its store behind"


def damage_by_truncation(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "mode"),
    [
        (damage_by_truncation, "plain"),
        (damage_by_one_bit, "plain"),
        pytest.param(damage_by_emptying, "plain", marks=pytest.mark.slow),
        pytest.param(damage_by_truncation, "disk", marks=pytest.mark.slow),
    ],
)
def test_damaged_newest_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], None],
    mode: str,
    params: Path,
    tmp_path: Path,
    flags_of: Flags,
    undisturbed: Any,
) -> None:
    model_dir, flags = tmp_path / "model_dir", flags_of(mode)
    # 70 of the 150 steps: as killed right after checkpoint_70.mdl.
    run_here("train", params, model_dir, *flags, "--max_steps", "70").succeeded()
    assert checkpoint_steps(model_dir) == [56, 63, 70]
    damage(model_dir / "checkpoint_70.mdl")
    outcome = run_here("train", params, model_dir, *flags).succeeded()
    (warning,) = [line for line in outcome.output.splitlines() if line.startswith("WARNING")]
    assert "checkpoint_70.mdl" in warning
    assert "Going on from" in outcome.output
    assert "checkpoint_63.mdl at global step 63" in outcome.output
    assert_same_run(outcome, undisturbed(mode, flags))


def test_no_whole_checkpoint_is_an_error_that_loses_nothing(params: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "model_dir"
    run_here("train", params, model_dir, "--max_steps", "14").succeeded()
    for step in checkpoint_steps(model_dir):
        damage_by_truncation(model_dir / f"checkpoint_{step}.mdl")
    before = everything_in(model_dir)
    outcome = run_here("train", params, model_dir)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.output
    assert str(model_dir) in outcome.output
    assert "delete them to start anew" in outcome.output
    after = everything_in(model_dir)
    lost = {name for name in before if after.get(name) != before[name]}
    assert lost <= {"train/params_train.yaml"}, lost  # the record of the latest command


@pytest.mark.parametrize(
    ("number", "mode"),
    [
        (signal.SIGTERM, "weight_streaming"),
        (signal.SIGINT, "plain"),
        pytest.param(signal.SIGTERM, "plain", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "layer_pipelined", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "disk", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_clearly(
    number: signal.Signals,
    mode: str,
    params: Path,
    tmp_path: Path,
    flags_of: Flags,
    undisturbed: Any,
) -> None:
    model_dir, flags = tmp_path / "model_dir", flags_of(mode)
    process = start_script("train", params, model_dir, *flags)
    process.wait_for_step(25)
    process.signal(number)
    stopped = process.finish()
    assert stopped.exit_code == 128 + number
    assert "Traceback" not in stopped.output
    last = read_metrics(model_dir)[-1]["step"]
    assert 25 <= last < NUM_STEPS
    assert checkpoint_steps(model_dir)[-1] == last
    assert (
        f"Training stopped by {number.name} at global step {last}. "
        f"The same command goes on from checkpoint_{last}.mdl." in stopped.output
    )
    outcome = run_here("train", params, model_dir, *flags).succeeded()
    # The step it was stopped at keeps a checkpoint of its own, so the three kept may be others.
    assert_same_run(outcome, undisturbed(mode, flags))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_spares_loading_processes(
    number: signal.Signals, params: Path, tmp_path: Path, undisturbed: Any
) -> None:
    """A DataLoader process that died at once would make the step fail that is to be finished."""
    changes = {**RULES, "train_input.num_workers": 1}
    loading = write_params(tmp_path / "params.yaml", changes)
    model_dir = tmp_path / "model_dir"
    command = [sys.executable, RUN_PY, "--mode", "train", "-p", loading, "-o", model_dir]
    printed = tmp_path / "printed.txt"
    with printed.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=command_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while steps_logged(model_dir) < 5:
            assert process.poll() is None, printed.read_text()
            time.sleep(0.005)
        os.killpg(process.pid, number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    said = printed.read_text()
    assert "Traceback" not in said
    assert said.count(f"{number.name}: stopping after this step") == 1
    assert checkpoint_steps(model_dir)[-1] == read_metrics(model_dir)[-1]["step"] < NUM_STEPS
    outcome = run_here("train", params, model_dir).succeeded()
    assert_same_run(outcome, undisturbed("plain", ()))


def test_a_signal_during_an_evaluation_ends_it(tmp_path: Path) -> None:
    changes = {**RULES, "runconfig.max_steps": 7, "runconfig.eval_steps": 11}
    params = write_params(tmp_path / "params.yaml", changes)
    model_dir = tmp_path / "model_dir"
    run_here("train", params, model_dir).succeeded()
    slow = write_slow_script(tmp_path)
    process = start_script("eval", params, model_dir, script=slow)
    process.wait_until(lambda: "Step=2" in process.output, "the second batch")
    process.signal(signal.SIGTERM)
    outcome = process.finish()
    assert outcome.exit_code == 143
    assert "Evaluation stopped by SIGTERM after" in outcome.output
    assert "Traceback" not in outcome.output
    assert not (model_dir / "eval" / "metrics.jsonl").exists()


def write_slow_script(folder: Path) -> Path:
    """A run.py whose evaluation data take a twentieth of a second for each batch."""
    script = folder / "run.py"
    script.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(EXAMPLE)!r})
from data import eval_input_dataloader, train_input_dataloader
from model import MNISTModel
from utils import set_defaults
from openwafer import run

def slow_eval_data(params):
    def batches():
        for batch in eval_input_dataloader(params):
            time.sleep(0.05)
            yield batch
    return batches

if __name__ == "__main__":
    run(MNISTModel, train_input_dataloader, slow_eval_data, set_defaults)
"""
    )
    return script


def test_the_same_command_after_the_end_does_nothing(params: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "model_dir"
    flags = ("--max_steps", "14")
    run_here("train", params, model_dir, *flags).succeeded()
    before = everything_in(model_dir)
    outcome = run_here("train", params, model_dir, *flags).succeeded()
    assert "Training is already complete: global step 14" in outcome.output
    after = everything_in(model_dir)
    assert {name: after[name] for name in before} == before

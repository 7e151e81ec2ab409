"""Processes that are killed, stopped and interrupted, and what the same command makes of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_fakes import FakeExecutor, main, make_job, same_weights

from openwafer.config.runconfig import RunConfig
from openwafer.train.checkpoint_dir import find_latest, list_checkpoints
from openwafer.train.hooks import Hooks
from openwafer.train.job import run_job
from openwafer.train.signals import StopRequest

SCRIPT = Path(__file__).with_name("train_fakes.py")
STEPS = 17

# Processes of their own that do not pay for importing torch each time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["openwafer.train.job", "torch.utils.tensorboard", "torch._dynamo", "pytest"]
)


def child(arguments: list[str], folder: str) -> None:
    """In the child: the script, with its output in files."""
    for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(main(arguments))


def begin(model_dir: Path, *, kill_at: int = -1, seconds: float = 0.0) -> Any:
    model_dir.mkdir(exist_ok=True)
    arguments = [str(model_dir), str(STEPS), str(kill_at), str(seconds)]
    process = PROCESSES.Process(target=child, args=(arguments, str(model_dir)))
    process.start()
    return process


def end(process: Any, model_dir: Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process.join(timeout=120)
    assert process.exitcode is not None, "it hangs"
    code = process.exitcode
    process.close()
    return code, (model_dir / "out.txt").read_text(), (model_dir / "err.txt").read_text()


def run_to_end(model_dir: Path, *, kill_at: int = -1) -> tuple[int, str, str]:
    return end(begin(model_dir, kill_at=kill_at), model_dir)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_logged(model_dir: Path) -> list[int]:
    return [record["step"] for record in records(model_dir / "train/metrics.jsonl")]


def final_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(model_dir / "final.pt", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("undisturbed")
    code, out, err = run_to_end(model_dir)
    assert code == 0, err
    assert "Training Completed Successfully!" in out
    assert "INFO:   | Train Device=cpu Step=2 Loss=" in out
    return model_dir


def test_kill_9_at_random_steps_and_the_same_command(undisturbed: Path, tmp_path: Path) -> None:
    """Twice killed, at steps drawn anew each time; the weights and the losses are the same."""
    kills = sorted(random.sample(range(1, STEPS), 2))
    for step in kills:
        assert run_to_end(tmp_path, kill_at=step)[0] == -signal.SIGKILL
    code, _, err = run_to_end(tmp_path)
    assert code == 0, err
    assert same_weights(final_weights(tmp_path), final_weights(undisturbed)), f"killed at {kills}"
    assert steps_logged(tmp_path) == steps_logged(undisturbed)
    first, second = (
        [record["loss"] for record in records(folder / "train/metrics.jsonl")]
        for folder in (tmp_path, undisturbed)
    )
    assert first == second
    assert [s for s, _ in list_checkpoints(tmp_path)] == [
        s for s, _ in list_checkpoints(undisturbed)
    ]


def test_kill_9_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    """Not between two steps but anywhere: while a step runs, a line or a checkpoint is written."""
    code, num_kills = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        (tmp_path / "in_a_step").unlink(missing_ok=True)
        process = begin(tmp_path, seconds=0.01)
        if num_kills < 6:
            while process.is_alive() and not (tmp_path / "in_a_step").exists():
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.12))
            process.kill()
            num_kills += 1
        code, _, err = end(process, tmp_path)
    assert code == 0, err
    assert same_weights(final_weights(tmp_path), final_weights(undisturbed))
    assert steps_logged(tmp_path) == steps_logged(undisturbed)
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_truncated_newest_checkpoint_after_a_kill(undisturbed: Path, tmp_path: Path) -> None:
    assert run_to_end(tmp_path, kill_at=11)[0] == -signal.SIGKILL
    newest = find_latest(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint_9.mdl"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    _, out, _ = run_to_end(tmp_path)
    assert "WARNING:   checkpoint_9.mdl is passed over" in out.replace(f"{tmp_path}/", "")
    assert "at global step 6" in out
    assert same_weights(final_weights(tmp_path), final_weights(undisturbed))
    assert steps_logged(tmp_path) == steps_logged(undisturbed)


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_so(
    which: signal.Signals, code: int, undisturbed: Path, tmp_path: Path
) -> None:
    process = begin(tmp_path, seconds=0.15)
    wait_for(process, tmp_path / "train/metrics.jsonl")
    os.kill(process.pid, which)
    returned, out, err = end(process, tmp_path)
    assert returned == code, err
    newest = find_latest(tmp_path)
    assert newest is not None
    step = int(newest.stem.rpartition("_")[2])
    assert 2 <= step < STEPS
    assert f"Training stopped by {which.name} at global step {step}." in out
    assert f"goes on from {newest.name}" in out
    assert f"{which.name}: stopping after this step" in err
    assert "Traceback" not in err
    assert run_to_end(tmp_path)[0] == 0
    assert same_weights(final_weights(tmp_path), final_weights(undisturbed))


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), str(tmp_path), "9", "-1", "30"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    wait_for(process, tmp_path / "in_a_step")
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "SIGINT: stopping" in next(line for line in process.stderr if line.strip())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT  # Python's own ending of a KeyboardInterrupt
    assert time.monotonic() - before < 20  # the step it cut into takes 30
    assert list_checkpoints(tmp_path) == ()


def wait_for(process: Any, path: Path) -> None:
    while not path.exists():
        alive = process.poll() is None if hasattr(process, "poll") else process.is_alive()
        assert alive, f"it ended before {path.name} was there"
        time.sleep(0.02)


def test_a_stop_during_the_evaluation_leaves_it_to_the_next_run(tmp_path: Path) -> None:
    run = RunConfig(model_dir=tmp_path, mode="train_and_eval", max_steps=30)
    stop_at_eval_batch: list[int] = [1]

    class Stopper(Hooks):
        def on_eval_batch_end(self, loss: torch.Tensor, step: int) -> None:
            if stop_at_eval_batch:
                stop_at_eval_batch.pop()
                signal.raise_signal(signal.SIGTERM)

    result = run_job(make_job(FakeExecutor(), run, hooks=Stopper()))
    assert result.exit_code == 143
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10]
    assert not (tmp_path / "eval/metrics.jsonl").exists()
    executor = FakeExecutor()
    assert run_job(make_job(executor, run, hooks=Stopper())).exit_code == 0
    assert executor.steps == list(range(10, 30))
    evaluated = [record["step"] for record in records(tmp_path / "eval/metrics.jsonl")]
    assert evaluated == [10, 20, 30]


def test_a_signal_on_the_last_step_changes_nothing(tmp_path: Path) -> None:
    def before_step(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    run = RunConfig(model_dir=tmp_path, max_steps=5)
    result = run_job(make_job(FakeExecutor(before_step=before_step), run))
    assert result.exit_code == 0
    assert result.training is not None
    assert result.training.stopped_by is None


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert stop.exit_code == 0
        stop.request(signal.SIGTERM)
        assert stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)] == before

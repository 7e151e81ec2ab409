"""`--num_stages` from the command line: stages of a script's model in processes of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_results import losses, weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "fc_mnist"
LIMIT_SECONDS = 120

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "fc_mnist"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    params = folder / "configs/params.yaml"
    params.write_text(params.read_text().replace("log_steps: 50", "log_steps: 5"))
    return folder


def command(model_dir: str, *flags: str, mode: str = "train") -> list[str]:
    return [
        *(sys.executable, "run.py", "--mode", mode, "--params", "configs/params.yaml"),
        *("--model_dir", model_dir, *flags),
    ]


def run(folder: Path, model_dir: str, *flags: str, mode: str = "train") -> str:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(model_dir, *flags, mode=mode),
        cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6)


PARTS = ("--num_microbatches", "4")


def test_a_checkpoint_of_any_count_goes_on_in_any_other(folder: Path) -> None:
    """10 steps alone; 2 stages go on to 20; 2 replicas of the plain mode to 30; as one run of 30.
    The evaluation of the result is the same with stages and without."""
    run(folder, "whole", "--cs_ip", "local", "--max_steps", "30", *PARTS)
    run(folder, "parts", "--cs_ip", "local", "--max_steps", "10", *PARTS)
    output = run(
        folder, "parts", "--cs_ip", "local", "--max_steps", "20", "--num_stages", "2", *PARTS
    )
    assert "Starting 2 processes: 2 stage(s), 1 replica(s)" in output
    assert "Going on from" in output
    run(folder, "parts", "--cs_ip", "local", "--max_steps", "30", "--num_replicas", "2", *PARTS)
    whole, parts = losses(folder / "whole"), losses(folder / "parts")
    assert whole.keys() == parts.keys() >= {10, 20, 30}
    for step, loss in whole.items():
        assert parts[step] == pytest.approx(loss, rel=2e-6), step
    assert_close(weights(folder / "parts", 30), weights(folder / "whole", 30))
    evaluated: list[str] = []
    for count in ("1", "2"):
        run(folder, "parts", "--cs_ip", "local", "--num_stages", count, mode="eval")
        evaluated.append((folder / "parts/eval/metrics.jsonl").read_text())
    assert evaluated[0] == evaluated[1]


def test_stages_with_workers_that_stream(folder: Path) -> None:
    """Five tasks: two compute, three stream."""
    run(folder, "alone", "--cs_ip", "local", "--max_steps", "12", *PARTS)
    launched = [sys.executable, "-m", "openwafer.cli", "launch", "--tasks", "5", "--"]
    done = subprocess.run(
        [*launched, *command("streamed", "--cs_ip", "127.0.0.1:9417", "--max_steps", "12",
                             "--num_stages", "2", *PARTS)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Waiting for 3 streamer(s)" in done.stdout
    found, expected = losses(folder / "streamed"), losses(folder / "alone")
    assert found == pytest.approx(expected, rel=2e-6)


def until(condition: Callable[[], object], seconds: float = LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def own_bytes(pid: int) -> int:
    """Memory of a process that is no file's, or 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def most_of_a_peer(folder: Path, hidden_size: int) -> int:
    """The most that a stage other than the first ever held, up to its first steps."""
    params, name = folder / f"hidden-{hidden_size}.yaml", f"share-{hidden_size}"
    text = (folder / "configs/params.yaml").read_text()
    text = text.replace("hidden_size: 50", f"hidden_size: {hidden_size}")
    text = text.replace("depth: 4", "depth: 9").replace("momentum: 0.9", "momentum: 0.0")
    params.write_text(text.replace("log_steps: 5", "log_steps: 1"))
    flags = ("--params", str(params), "--cs_ip", "local", "--num_stages", "4")
    log, most = folder / f"{name}.txt", 0

    def stepped() -> bool:
        nonlocal most
        most = max([most, *map(own_bytes, sorted(children(launched.pid))[1:])])
        assert launched.poll() is None, log.read_text()
        return "Step=2," in log.read_text()

    with log.open("wb") as output:
        launched = subprocess.Popen(
            command(name, *flags), cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            until(stepped)
        finally:
            launched.kill()  # its tasks end with it
            launched.wait()
    return most


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the processes in /proc")
def test_a_stage_holds_its_share(folder: Path) -> None:
    """Eight equal layers in four stages: a process holds a quarter of the weights, and as much for
    their gradients and for adding to these; never the whole model, not even while it is built."""
    hidden_size = 2400
    whole_bytes = 8 * 4 * hidden_size**2
    held_bytes = most_of_a_peer(folder, hidden_size) - most_of_a_peer(folder, 50)
    assert 0.4 * whole_bytes < held_bytes < 0.95 * whole_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_ends_the_others(victim: int, folder: Path) -> None:
    """Within 30 seconds, and it is said which process was lost."""
    log = folder / f"killed-{victim}.txt"
    with log.open("wb") as output:
        launched = subprocess.Popen(
            command(f"killed-{victim}", "--cs_ip", "local", "--max_steps", "1000000",
                    "--num_stages", "2"),
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            until(lambda: "Step=20," in log.read_text())
            tasks = children(launched.pid)
            assert len(tasks) == 2
            os.kill(sorted(tasks)[victim], signal.SIGKILL)
            began = time.monotonic()
            code = launched.wait(LIMIT_SECONDS)
            seconds = time.monotonic() - began
        finally:
            launched.kill()
            launched.wait()
    text = log.read_text()
    assert code == 128 + signal.SIGKILL, text
    assert seconds < 30, text
    kind = ("coordinator", "computing")[victim]
    assert f"task {victim} ({kind}) was ended by SIGKILL; ending the others" in text
    assert f"process {victim} of the 2 that compute together was lost" in text
    assert "Traceback" not in text
    assert not any(Path(f"/proc/{task}").exists() for task in tasks)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_the_warning_before_the_time_limit_saves(folder: Path) -> None:
    """SIGTERM reaches every process; the run saves and ends in order."""
    log = folder / "warned.txt"
    with log.open("wb") as output:
        launched = subprocess.Popen(
            command("warned", "--cs_ip", "local", "--max_steps", "1000000", "--num_stages", "2"),
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            until(lambda: "Step=20," in log.read_text())
            launched.send_signal(signal.SIGTERM)
            code = launched.wait(LIMIT_SECONDS)
        finally:
            launched.kill()
            launched.wait()
    text = log.read_text()
    assert code == 128 + signal.SIGTERM, text
    assert "Training stopped by SIGTERM" in text
    assert list((folder / "warned").glob("checkpoint_*.mdl"))
    assert "Traceback" not in text

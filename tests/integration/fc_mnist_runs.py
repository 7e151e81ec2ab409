"""How the integration tests run examples/fc_mnist: in this process, in a process of its own, or by
the command that a user types.

All three end in the same `run()` of the example's own functions. A run in this process is used
where only its files and its output matter, because starting Python and importing torch takes
longer than training does. A run that is to be killed gets a process, forked from a server that has
torch imported already. One thread computes: two busy machines' worth of threads on two cores wait
for each other far longer than they work.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from openwafer.train.run_lock import LOCK_NAME

EXAMPLE = Path(__file__).parents[2] / "examples" / "fc_mnist"
RUN_PY = EXAMPLE / "run.py"
SMALL: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.depth": 2,
    "train_input.batch_size": 32,
    "eval_input.batch_size": 32,
}
"""A network and batches so small that a step takes about a millisecond."""

MODE_FLAGS = {
    "plain": (),
    "layer_pipelined": ("--cs_ip", "local", "--execution_mode", "layer_pipelined"),
    "weight_streaming": ("--cs_ip", "local", "--execution_mode", "weight_streaming"),
}
"""The flags of the three forms of a run; `disk` is weight streaming from a store on disk."""

DROP = object()
"""As a value in `write_params`: the key is taken out."""

Changes = Mapping[str, Any]


# ------------------------------------------------------------------ parameters


def write_params(path: Path, changes: Changes | None = None) -> Path:
    """The example's own params.yaml with `changes` by dotted key, written to `path`."""
    params = yaml.safe_load((EXAMPLE / "configs/params.yaml").read_text())
    for dotted, value in (changes or {}).items():
        *sections, key = dotted.split(".")
        section = params
        for name in sections:
            section = section.setdefault(name, {})
        if value is DROP:
            section.pop(key, None)
        else:
            section[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def line_of(path: Path, text: str) -> int:
    """The number of the first line of a file that contains `text`."""
    lines = path.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


# ------------------------------------------------------------------ what a run left behind


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, all it printed, and its model_dir."""

    exit_code: int
    output: str
    model_dir: Path

    def succeeded(self) -> Outcome:
        assert self.exit_code == 0, self.output
        return self

    def metrics(self, mode: str = "train") -> list[dict[str, Any]]:
        return read_metrics(self.model_dir, mode)

    def losses(self) -> list[float]:
        """The losses of all logged steps, each step once and in order."""
        rows = self.metrics()
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)), f"steps are repeated or out of order: {steps}"
        return [row["loss"] for row in rows]

    def checkpoint(self, step: int | None = None) -> dict[str, Any]:
        """The contents of a checkpoint, by default of the one with the highest step."""
        if step is None:
            step = checkpoint_steps(self.model_dir)[-1]
        return torch.load(self.model_dir / f"checkpoint_{step}.mdl", weights_only=True)

    def plan(self) -> dict[str, Any]:
        (path,) = self.model_dir.glob("cs_*/plan.json")
        return json.loads(path.read_text())


def read_metrics(model_dir: Path, mode: str = "train") -> list[dict[str, Any]]:
    path = model_dir / mode / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint_steps(model_dir: Path) -> list[int]:
    names = [path.stem for path in model_dir.glob("checkpoint_*.mdl")]
    return sorted(int(name.removeprefix("checkpoint_")) for name in names)


def steps_logged(model_dir: Path) -> int:
    """Complete lines in train/metrics.jsonl so far."""
    with contextlib.suppress(FileNotFoundError):
        return (model_dir / "train" / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, files with their content, but for the lock: it says since when
    the latest command has had it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and path.name != LOCK_NAME
        else None
        for path in sorted(folder.rglob("*"))
    }


# ------------------------------------------------------------------ comparing


def assert_same_bits(left: Any, right: Any, where: str = "") -> None:
    """Nested dicts and lists with the same tensors and numbers, to the last bit."""
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor), where
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), f"{where} differs by {(left - right).abs().max()}"
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), f"{where}: {left.keys() ^ right.keys()}"
        for key in left:
            assert_same_bits(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same_bits(a, b, f"{where}[{index}]")
    else:
        assert left == right, f"{where}: {left} and {right}"


def assert_same_run(left: Outcome, right: Outcome) -> None:
    """Both ended with the same checkpoint (weights, optimizer, loss scale, data position, torch's
    generator; a run seeds no other) and logged the same losses, to the last bit."""
    a, b = left.checkpoint(), right.checkpoint()
    assert a.keys() == b.keys()
    for entry in a.keys() - {"openwafer", "rng"}:
        assert_same_bits(a[entry], b[entry], entry)
    assert_same_bits(a["rng"]["torch"], b["rng"]["torch"], "rng.torch")
    assert left.losses() == right.losses()


def assert_close_run(
    left: Outcome, right: Outcome, *, rtol: float = 1e-5, weights_rtol: float | None = None
) -> None:
    """The same losses, and the same weights relative to the largest of each tensor."""
    np.testing.assert_allclose(left.losses(), right.losses(), rtol=rtol)
    a, b = left.checkpoint(), right.checkpoint()
    assert a["global_step"] == b["global_step"]
    assert a["model"].keys() == b["model"].keys()
    for name, weight in a["model"].items():
        scale = float(weight.abs().max())
        error = float((weight - b["model"][name]).abs().max())
        assert error <= (weights_rtol or rtol) * scale, f"{name}: {error} of {scale}"


# ------------------------------------------------------------------ in this process


def load_example(folder: Path = EXAMPLE) -> ModuleType:
    """A folder's run.py as a module, with the data.py, model.py and utils.py beside it."""
    names = ("data", "model", "utils")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return load_module(folder / "run.py", f"{folder.name}_run")
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def load_module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_example: list[ModuleType] = []


def run_here(
    mode: str,
    params: Path,
    model_dir: Path,
    *flags: str,
    model_fn: Any = None,
    train_data_fn: Any = None,
    eval_data_fn: Any = None,
) -> Outcome:
    """Run the example's functions in this process; the keywords replace one of them."""
    from openwafer import run

    if not _example:
        _example.append(load_example())
    example = _example[0]
    argv = ["--mode", mode, "--params", str(params), "--model_dir", str(model_dir), *flags]
    printed = io.StringIO()
    code: Any = 0
    with _undisturbed(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            run(
                model_fn or example.MNISTModel,
                train_data_fn or example.train_input_dataloader,
                eval_data_fn or example.eval_input_dataloader,
                example.set_defaults,
                argv=argv,
            )
        except SystemExit as ending:
            code = ending.code
    return Outcome(int(code or 0), printed.getvalue(), model_dir)


@contextlib.contextmanager
def _undisturbed() -> Generator[None, None, None]:
    """Leave logging, random numbers and threads of this process as they were."""
    logger = logging.getLogger("openwafer")
    before = (list(logger.handlers), logger.level, logger.propagate)
    num_threads, state = torch.get_num_threads(), torch.get_rng_state()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        torch.set_num_threads(num_threads)
        torch.set_rng_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


# ------------------------------------------------------------------ in a process of its own


class ScriptProcess:
    """run.py in a process of its own, its output in a file."""

    def __init__(self, process: BaseProcess, output: Path, model_dir: Path) -> None:
        self.process, self._output, self.model_dir = process, output, model_dir

    @property
    def output(self) -> str:
        return self._output.read_text()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until `condition`; fails where the process ends before or time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {seconds} s:\n{self.output}"
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` has been logged (with log_steps 1 and no earlier log)."""
        self.wait_until(lambda: steps_logged(self.model_dir) >= step, f"step {step}")

    def finish(self, seconds: float = 60) -> Outcome:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {seconds} s:\n{self.output}")
        return Outcome(self.process.exitcode, self.output, self.model_dir)


_server = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the server where it is not running yet. It imports what it finds by PYTHONPATH."""
    _server.set_forkserver_preload(["warm_server"])
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = here if before is None else os.pathsep.join((here, before))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def start_script(
    mode: str,
    params: Path,
    model_dir: Path,
    *flags: str,
    max_file_bytes: int | None = None,
    script: Path = RUN_PY,
) -> ScriptProcess:
    """Start run.py with these flags. `max_file_bytes` is the largest file that it may write, for
    which a full disk answers alike."""
    _start_server()
    argv = ["--mode", mode, "--params", str(params), "--model_dir", str(model_dir), *flags]
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    output = model_dir.with_name(f"{model_dir.name}.{time.monotonic_ns()}.txt")
    output.touch()
    process = _server.Process(
        target=_run_script, args=(str(script), argv, str(output), max_file_bytes)
    )
    process.start()
    return ScriptProcess(process, output, model_dir)


def _run_script(script: str, argv: list[str], output: str, max_file_bytes: int | None) -> None:
    """In the new process: what `python run.py ARGV > OUTPUT 2>&1` does."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: writing gives EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


# ------------------------------------------------------------------ the command


def command_environment() -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OPENWAFER_"))}
    return variables | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_command(command: Sequence[str], *, cwd: Path | None = None, seconds: float = 120) -> Any:
    """Run a command and give its subprocess.CompletedProcess, output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )

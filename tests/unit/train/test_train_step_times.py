"""A run tells what its steps took: each with the wait for its batches, evaluations left out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_fakes import FakeExecutor, FakeSource, make_job

from openwafer.config.runconfig import RunConfig
from openwafer.errors import NumericsError
from openwafer.runtime.timing.step_times import StepTimes
from openwafer.runtime.timing.trace_file import TraceFile
from openwafer.train.job import run_job


class Recording(FakeExecutor):
    """Records one stretch of computing in each step and each evaluation."""

    def __init__(self, times: StepTimes) -> None:
        super().__init__()
        self.times = times

    def train_step(self, microbatches: Any, *, step: int) -> Any:
        with self.times.recorder.span("compute", "net", "forward"):
            return super().train_step(microbatches, step=step)

    def eval_step(self, batch: Any, *, step: int) -> Any:
        with self.times.recorder.span("compute", "evaluation"):
            return super().eval_step(batch, step=step)


def recording(path: Path) -> tuple[Recording, StepTimes]:
    times = StepTimes(on_disk=False, trace=TraceFile(path, max_steps=100))
    return Recording(times), times


def kinds(path: Path) -> list[list[str]]:
    """By step, what was recorded, in order."""
    found: dict[int, list[str]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X" and event["cat"] != "step":
            found.setdefault(event["args"]["step"], []).append(
                f"{event['cat']} {event['args']['layer']}"
            )
    return [found[step] for step in sorted(found)]


def test_steps_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two epochs of three steps with an evaluation after each; the fourth batch is one too few."""
    caplog.set_level(logging.INFO, logger="openwafer")
    executor, times = recording(tmp_path / "timeline.json")
    run = RunConfig(model_dir=tmp_path, mode="train_and_eval", num_epochs=2, log_steps=0)
    job = make_job(
        executor, run, train_source=FakeSource(7), eval_source=FakeSource(2), grad_accum_steps=2
    )
    run_job(replace(job, times=times))
    assert kinds(tmp_path / "timeline.json") == [["input batches", "compute net"]] * 6
    performance = json.loads((tmp_path / "performance/performance.json").read_text())
    shares = performance["exposed_seconds_per_step"]
    assert sum(shares.values()) == pytest.approx(performance["step_seconds"])
    assert performance["bound_by"] in shares
    assert sum("not hidden behind compute" in record.message for record in caplog.records) == 1


def test_an_error_leaves_the_steps_before_it(tmp_path: Path) -> None:
    executor, times = recording(tmp_path / "timeline.json")
    executor.nan_at = {2}
    run = RunConfig(model_dir=tmp_path, max_steps=5)
    with pytest.raises(NumericsError):
        run_job(replace(make_job(executor, run, train_source=FakeSource(9)), times=times))
    assert len(kinds(tmp_path / "timeline.json")) == 2

"""metrics.jsonl and the TensorBoard events: each step once, each number exact."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openwafer.train import metrics_log
from openwafer.train.metrics_log import MetricsLog
from openwafer.train.summaries import EvalRecorder, TrainRecorder


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@settings(max_examples=100, deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_losses_come_back_bit_for_bit(
    value: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    MetricsLog(path).append(1, {"loss": value})
    read = json.loads(path.read_text())["loss"]
    assert struct.pack("f", read) == struct.pack("f", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_is_null(value: float | None, tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m.jsonl").append(1, {"loss": value})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_drop_removes_steps_and_broken_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.append(step, {"loss": step / 3})
    before = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('not json\n[1]\n{"no": 1}\n{"step": 6, "lo')
    assert log.drop(lambda step: step > 3) == 6
    assert path.read_text() == "".join(before[:3])
    inode = path.stat().st_ino
    assert log.drop(lambda step: step > 3) == 0
    assert path.stat().st_ino == inode
    assert MetricsLog(tmp_path / "none").drop(lambda step: True) == 0


def test_a_full_disk_leaves_no_half_line_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.append(1, {"loss": 1.0})
    real_write = os.write
    calls: list[int] = []

    def half_then_full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) % 2:
            return real_write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_log.os, "write", half_then_full)
    with caplog.at_level(logging.WARNING, logger="openwafer"):
        log.append(2, {"loss": 2.0})
        log.append(3, {"loss": 3.0})
    monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 1
    log.append(4, {"loss": 4.0})
    assert steps(path) == [1, 4]


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def log_steps(recorder: TrainRecorder, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        recorder.log_step(step, loss=loss, learning_rate=0.5, samples_per_sec=2.0, loss_scale=8.0)
    recorder.close()


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    log_steps(TrainRecorder(tmp_path, start_step=0), 1, 6, loss=1.0)
    log_steps(TrainRecorder(tmp_path, start_step=4), 5, 8, loss=2.0)
    path = tmp_path / "train/metrics.jsonl"
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    scalars = read_events(tmp_path / "train")
    assert scalars["loss"] == [(s, 1.0 if s <= 4 else 2.0) for s in range(1, 9)]
    assert set(scalars) == {"loss", "lr", "samples_per_sec", "loss_scale"}


def test_save_losses_off_keeps_the_loss_out_of_tensorboard_only(tmp_path: Path) -> None:
    recorder = TrainRecorder(tmp_path, start_step=0, save_losses=False)
    log_steps(recorder, 1, 1, loss=3.0)
    assert "loss" not in read_events(tmp_path / "train")
    assert json.loads((tmp_path / "train/metrics.jsonl").read_text())["loss"] == 3.0


def test_the_last_evaluation_of_a_step_stands(tmp_path: Path) -> None:
    recorder = EvalRecorder(tmp_path)
    for step, loss in ((10, 1.0), (20, 2.0), (10, 3.0)):
        recorder.log_evaluation(step, avg_eval_loss=loss, metrics={"eval/accuracy": 0.5})
    recorder.close()
    rows = [json.loads(line) for line in (tmp_path / "eval/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["avg_eval_loss"]) for row in rows] == [(20, 2.0), (10, 3.0)]
    assert set(read_events(tmp_path / "eval")) == {"avg_eval_loss", "eval/accuracy"}
    EvalRecorder(tmp_path, start_step=10)
    assert steps(tmp_path / "eval/metrics.jsonl") == [10]


def test_opening_writes_nothing(tmp_path: Path) -> None:
    TrainRecorder(tmp_path, start_step=0).close()
    EvalRecorder(tmp_path).close()
    assert list(tmp_path.rglob("*.tfevents.*")) == []

"""The meter against a clock set by hand; the file against the published examples; the lines."""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from openwafer.errors import OpenWaferError
from openwafer.train.performance import (
    Meter,
    Performance,
    PlanFigures,
    slow_workers,
    write_performance,
)
from openwafer.train.progress import Reporter, configure_logging
from openwafer.train.random_state import capture_random_state, restore_random_state


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter_counts_from_the_first_batch_and_leaves_evaluations_out() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.result() == Performance(total_samples=0, total_seconds=0, input_wait_seconds=0)
    with meter.waiting():
        clock.now += 60  # starting the input is not part of the run
    clock.now += 2
    meter.count(10)
    assert meter.rate_since_last() == 5
    with meter.waiting():
        clock.now += 1
    clock.now += 1
    meter.count(30)
    with meter.paused():
        clock.now += 1000
    assert meter.rate_since_last() == 15
    meter.stop()
    clock.now += 500
    result = meter.result()
    assert result == Performance(total_samples=40, total_seconds=4, input_wait_seconds=1)
    assert result.samples_per_sec == 10
    assert result.input_bottleneck == "Yes: 25.0% of the time was spent waiting for input"


def test_no_samples_no_rate() -> None:
    empty = Performance(total_samples=0, total_seconds=0, input_wait_seconds=0)
    assert (empty.samples_per_sec, empty.input_bottleneck) == (0.0, "Not Applicable")
    busy = Performance(total_samples=1, total_seconds=10, input_wait_seconds=0.1)
    assert busy.input_bottleneck.startswith("No: 1.0%")


def test_workers_that_hold_a_run_up_are_named() -> None:
    """100 seconds, 60 of them waiting: all batches are needed within 40."""
    run = Performance(total_samples=1, total_seconds=100, input_wait_seconds=60)
    one = slow_workers(run, {1: 10.0, 2: 39.0, 3: 100.0})
    assert one == "input-bound: worker 3 at 40 % of the needed rate"
    two = slow_workers(run, {1: 10.0, 3: 99.0, 5: 100.0})
    assert two == "input-bound: workers 3 and 5 at 40 % of the needed rate"
    unlike = slow_workers(run, {1: 80.0, 2: 100.0, 3: 98.0, 4: 1000.0})
    assert unlike == (
        "input-bound: worker 4 at 4 %, workers 2 and 3 at 40 %, worker 1 at 50 % of the needed rate"
    )


def test_workers_that_keep_up_are_not_named() -> None:
    fast = Performance(total_samples=1, total_seconds=100, input_wait_seconds=5)
    assert slow_workers(fast, {1: 100.0}) is None
    elsewhere = Performance(total_samples=1, total_seconds=100, input_wait_seconds=50)
    assert slow_workers(elsewhere, {1: 50.0, 2: 20.0}) is None
    nothing = Performance(total_samples=0, total_seconds=0, input_wait_seconds=0)
    assert slow_workers(nothing, {1: 1.0}) is None


def test_performance_json_against_the_published_example(tmp_path: Path) -> None:
    """Figures of the Neocortex guide: 38,400,000 samples in 261.82 s, delta-t 464 at 850 MHz."""
    plan = PlanFigures(
        est_samples_per_sec=850e6 / 464,
        fabric_cores=266207,
        fabric_utilization=0.0114197,
        delta_t=464,
        frequency_hz=850e6,
        compile_seconds=26.0,
        programming_seconds=51.1,
    )
    measured = Performance(total_samples=38_400_000, total_seconds=261.82, input_wait_seconds=200.0)
    path = write_performance(tmp_path, measured, plan)
    assert path == tmp_path / "performance" / "performance.json"
    text = path.read_text()
    fields = json.loads(text)
    assert fields["samples_per_sec"] == pytest.approx(146665.4, rel=1e-5)
    assert fields["est_samples_per_sec"] == pytest.approx(1831896.55)
    assert fields["Frequency"] == 850000000.0
    assert fields["suspected_input_bottleneck (beta)"].startswith("Yes")
    assert list(fields) == sorted(fields)
    assert set(fields) == {
        "Frequency",
        "compile_time",
        "delta_t",
        "est_samples_per_sec",
        "fabric_cores",
        "fabric_utilization",
        "programming_time",
        "samples_per_sec",
        "suspected_input_bottleneck (beta)",
        "total_samples",
        "total_time",
    }
    assert text == json.dumps(fields, indent=4, sort_keys=True) + "\n"
    assert [p.name for p in path.parent.iterdir()] == ["performance.json"]


def test_performance_json_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "performance").write_text("in the way")
    measured = Performance(total_samples=1, total_seconds=1, input_wait_seconds=0)
    with pytest.raises(OpenWaferError, match=r"performance\.json cannot be written"):
        write_performance(tmp_path, measured, PlanFigures())


@pytest.fixture
def own_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("openwafer")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_log_lines_in_both_forms(
    own_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info")
    configure_logging("info")
    values = {"loss": 0.123456, "rate": 974.0, "global_rate": 970.126}
    Reporter(device="cpu", show_bar=False).log_step(50, **values)
    Reporter(device="cpu", with_rates=False, show_bar=False).log_step(50, **values)
    own_logger.debug("not shown")
    rates, plain = capsys.readouterr().out.splitlines()
    assert rates == (
        "INFO:   | Train Device=cpu, Step=50, Loss=0.12346, Rate=974.00 samples/sec, "
        "GlobalRate=970.13 samples/sec"
    )
    assert re.fullmatch(
        r"INFO:   \| Train Device=cpu Step=50 Loss=0\.12346 Time=\d\d:\d\d:\d\d", plain
    )
    configure_logging("WARNING", task=(2, 7))
    own_logger.warning("late")
    assert capsys.readouterr().out == "[2/7] WARNING:   late\n"


def test_final_line_has_the_documented_form(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="openwafer")
    reporter = Reporter(device="cpu", show_bar=False)
    reporter.train_finished(total_samples=25_600_000, total_seconds=43.47)
    assert caplog.messages == [
        "Training finished with 25600000 samples in 43.47 seconds, 588911.89 samples/second."
    ]


def test_a_bar_on_a_terminal_only_and_lines_above_it(
    own_logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure_logging()
    plain = Reporter(device="cpu")
    plain.train_started(step=0, final_step=10)
    plain.step_done(1)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fancy = Reporter(device="cpu")
    fancy.train_started(step=0, final_step=10)
    fancy.step_done(4)
    own_logger.info("a line")
    fancy.close()
    fancy.close()
    out = capsys.readouterr().out
    assert "Training" in out
    assert "INFO:   a line" in out


def test_random_state_round_trip(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.save(capture_random_state(1), tmp_path / "r.pt")

    def draw() -> tuple[float, float, float, float, float]:
        return (
            random.gauss(0, 1),
            random.random(),
            float(np.random.standard_normal()),
            float(np.random.random()),
            float(torch.rand(())),
        )

    expected = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "r.pt", weights_only=True))
    assert draw() == expected

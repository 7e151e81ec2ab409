"""How fast a run was: the meter, and `performance/performance.json`.

Decides what is measured, from when, and the names it is written under. Does not decide what the
plan predicts: those figures are passed in. docs/artifacts.md describes the file.

Names: those of the TensorFlow and of the PyTorch side of release 1.6 together, in one file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openwafer.errors import OpenWaferError
from openwafer.files import write_text
from openwafer.plan.plan import Plan

__all__ = ["Meter", "Performance", "PlanFigures", "slow_workers", "write_performance"]

BOTTLENECK_SHARE = 0.1
"""Share of the time spent waiting for batches from which the input is suspected: below it, faster
input could not make the run more than about a tenth faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFigures:
    """What the plan says of the run. None where there is no plan: the plain PyTorch loop.

    frequency_hz: the wafer's clock. delta_t: cycles between two samples. fabric_utilization: share
    of the fabric's cores in use, 0 to 1.
    """

    est_samples_per_sec: float | None = None
    fabric_cores: int | None = None
    fabric_utilization: float | None = None
    delta_t: int | None = None
    frequency_hz: float | None = None
    compile_seconds: float = 0.0
    programming_seconds: float = 0.0

    @classmethod
    def of(cls, plan: Plan, compile_seconds: float) -> PlanFigures:
        """The figures of a plan, which was made or found in that time."""
        return cls(
            est_samples_per_sec=plan.predicted.samples_per_second,
            fabric_cores=plan.fabric.fabric_pes,
            fabric_utilization=plan.fabric.active_fraction,
            delta_t=plan.predicted.delta_t_cycles,
            frequency_hz=float(plan.predicted.clock_hz),
            compile_seconds=compile_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """One run, measured. `input_wait_seconds` is the part of `total_seconds` spent waiting for
    batches."""

    total_samples: int
    total_seconds: float
    input_wait_seconds: float

    @property
    def samples_per_sec(self) -> float:
        return self.total_samples / self.total_seconds if self.total_seconds > 0 else 0.0

    @property
    def input_bottleneck(self) -> str:
        """The text of the documented field "suspected_input_bottleneck (beta)"."""
        if not self.total_samples or self.total_seconds <= 0:
            return "Not Applicable"
        share = self.input_wait_seconds / self.total_seconds
        verdict = "Yes" if share >= BOTTLENECK_SHARE else "No"
        return f"{verdict}: {100 * share:.1f}% of the time was spent waiting for input"


def slow_workers(measured: Performance, busy_seconds: Mapping[int, float]) -> str | None:
    """Which workers hold a run up: "input-bound: workers 3 and 5 at 40 % of the needed rate".

    A worker is needed to be done with its batches in the time that the run did not wait; the rate
    it reached of that is this time by the time it was busy. None where the input is no bottleneck,
    or no worker is much below that rate: then it is the way from them to here.

    Args:
        busy_seconds: per worker's rank, what loading and sending its batches took.
    """
    needed = measured.total_seconds - measured.input_wait_seconds
    share = measured.input_wait_seconds / measured.total_seconds if measured.total_seconds else 0.0
    if share < BOTTLENECK_SHARE:
        return None
    by_percent: dict[int, list[int]] = {}
    for rank, busy in sorted(busy_seconds.items()):
        if busy * (1 - BOTTLENECK_SHARE) > needed:
            by_percent.setdefault(_rounded(100 * needed / busy), []).append(rank)
    if not by_percent:
        return None
    groups = [f"{_workers(ranks)} at {percent} %" for percent, ranks in sorted(by_percent.items())]
    return f"input-bound: {', '.join(groups)} of the needed rate"


def _rounded(percent: float) -> int:
    """To five, as the figures of equal workers differ a little; small ones as they are."""
    return max(1, round(percent) if percent < 7.5 else 5 * round(percent / 5))


def _workers(ranks: Sequence[int]) -> str:
    *others, last = map(str, ranks)
    return f"workers {', '.join(others)} and {last}" if others else f"worker {last}"


class Meter:
    """Counts samples and seconds. The clock starts with the first batch in hand, so that starting
    the input is not counted, as on the machine; `pause` keeps evaluations out."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._stopped: float | None = None
        self._paused_seconds = 0.0
        self._wait_seconds = 0.0
        self._samples = 0
        self._mark_seconds = 0.0
        self._mark_samples = 0

    @contextmanager
    def waiting(self) -> Generator[None, None, None]:
        """Around each wait for input."""
        before = self._clock()
        yield
        after = self._clock()
        if self._started is None:
            self._started = after
        else:
            self._wait_seconds += after - before

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """Around what is not part of the run's speed."""
        before = self._clock()
        try:
            yield
        finally:
            if self._started is not None:
                self._paused_seconds += self._clock() - before

    def count(self, num_samples: int) -> None:
        self._samples += num_samples

    def rate_since_last(self) -> float:
        """Samples per second since the last call."""
        seconds, samples = self._elapsed(), self._samples
        spent, done = seconds - self._mark_seconds, samples - self._mark_samples
        self._mark_seconds, self._mark_samples = seconds, samples
        return done / spent if spent > 0 else 0.0

    def stop(self) -> None:
        """End of the run; later time does not count."""
        self._stopped = self._clock()

    def result(self) -> Performance:
        return Performance(
            total_samples=self._samples,
            total_seconds=self._elapsed(),
            input_wait_seconds=self._wait_seconds,
        )

    def _elapsed(self) -> float:
        if self._started is None:
            return 0.0
        end = self._clock() if self._stopped is None else self._stopped
        return max(0.0, end - self._started - self._paused_seconds)


def write_performance(
    model_dir: Path,
    measured: Performance,
    plan: PlanFigures,
    *,
    name: str = "performance.json",
    further: Mapping[str, object] | None = None,
) -> Path:
    """Write `performance/<name>` atomically: sorted keys, indent 4. `further` are fields of where
    the time went: in the steps, in workers.

    Raises:
        OpenWaferError: the file cannot be written.
    """
    fields: dict[str, object] = {
        "total_samples": measured.total_samples,
        "total_time": measured.total_seconds,
        "samples_per_sec": measured.samples_per_sec,
        "compile_time": plan.compile_seconds,
        "programming_time": plan.programming_seconds,
        "est_samples_per_sec": plan.est_samples_per_sec,
        "suspected_input_bottleneck (beta)": measured.input_bottleneck,
        "fabric_cores": plan.fabric_cores,
        "fabric_utilization": plan.fabric_utilization,
        "delta_t": plan.delta_t,
        "Frequency": plan.frequency_hz,
        **(further or {}),
    }
    path = model_dir / "performance" / name
    try:
        write_text(path, json.dumps(fields, indent=4, sort_keys=True) + "\n")
    except OSError as error:
        raise OpenWaferError(
            f"{name} cannot be written: {error.strerror or error}",
            where=str(path),
            hint="free some space, or check that the folder can be written to",
        ) from error
    return path

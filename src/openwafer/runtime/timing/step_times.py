"""What is kept of the times of a run's steps: the summary always, a trace file where asked for.

Decides how the two are opened, fed and closed together. Does not decide what is in either.
"""

from __future__ import annotations

from openwafer.runtime.timing.summary import RunSummary, StepSummary
from openwafer.runtime.timing.timeline import Recorder, StepSink, Timeline
from openwafer.runtime.timing.trace_file import TraceFile

__all__ = ["StepTimes"]


class StepTimes:
    """The recorder of a run, and what comes of it.

    Args:
        on_disk: whether the weight store is on disk.
        trace: a file for the first steps; None writes none.
    """

    def __init__(self, *, on_disk: bool, trace: TraceFile | None = None) -> None:
        self._summary = RunSummary(on_disk=on_disk)
        self._trace = trace
        sinks: list[StepSink] = [self._summary, *([trace] if trace else [])]
        self._timeline = Timeline(sinks)

    @property
    def recorder(self) -> Recorder:
        """For the executor and the training loop."""
        return self._timeline

    def summary(self) -> StepSummary | None:
        """The mean step so far; None before the first has ended."""
        return self._summary.result(
            prefetch_depth=self._timeline.prefetch_depth,
            returns_waiting=self._timeline.returns_waiting,
        )

    def close(self) -> None:
        """Write what the trace file still lacks. May be called twice.

        Raises:
            OpenWaferError: the file cannot be written.
        """
        if self._trace is not None:
            self._trace.write()

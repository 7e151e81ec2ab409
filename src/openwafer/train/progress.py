"""What a run says while it runs.

Decides the lines (those documented for release 1.6 and its successors), how log records look, and
that a bar is drawn on a terminal only. Does not decide when a line is due (loop.py).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

__all__ = ["Reporter", "configure_logging"]

_log = logging.getLogger("openwafer")


if TYPE_CHECKING:
    _TextHandler = logging.StreamHandler[TextIO]
else:  # not subscriptable before Python 3.11
    _TextHandler = logging.StreamHandler


class _StdoutHandler(_TextHandler):
    """Writes to whatever `sys.stdout` is at the time: a progress bar puts itself in its place, and
    lines then appear above the bar."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def configure_logging(level: str = "INFO", *, task: tuple[int, int] | None = None) -> None:
    """Log records as `LEVEL:   message` on stdout; a streamer's with `[ordinal/num_tasks]`.

    `level`: a name of Python's logging. May be called again; the last call counts.
    """
    place = "" if task is None else f"[{task[0]}/{task[1]}] "
    handler = _StdoutHandler()
    handler.setFormatter(logging.Formatter(f"{place}%(levelname)s:   %(message)s"))
    for old in list(_log.handlers):
        if isinstance(old, _StdoutHandler):
            _log.removeHandler(old)
    _log.addHandler(handler)
    _log.setLevel(level.upper())
    _log.propagate = False


class Reporter:
    """The progress lines of one run, and the bar.

    device: as shown, e.g. "cpu". with_rates: the form of the wafer runtime (rates), else the form
    of the plain loop (time of day). show_bar: None draws it if stdout is a terminal.
    """

    def __init__(
        self, *, device: str, with_rates: bool = True, show_bar: bool | None = None
    ) -> None:
        self._device = device
        self._with_rates = with_rates
        self._show_bar = sys.stdout.isatty() if show_bar is None else show_bar
        self._bar: Any = None
        self._task: Any = None

    def train_started(self, *, step: int, final_step: int | None) -> None:
        if self._show_bar and final_step != step:
            self._open_bar("Training", step, final_step)

    def step_done(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log_step(self, step: int, *, loss: float, rate: float, global_rate: float) -> None:
        _log.info("%s", self.step_line("Train", step, loss, rate, global_rate))

    def step_line(self, mode: str, step: int, loss: float, rate: float, global_rate: float) -> str:
        """The documented progress line, in the form of this run."""
        if self._with_rates:
            return (
                f"| {mode} Device={self._device}, Step={step}, Loss={loss:.5f}, "
                f"Rate={rate:.2f} samples/sec, GlobalRate={global_rate:.2f} samples/sec"
            )
        now = time.strftime("%H:%M:%S")
        return f"| {mode} Device={self._device} Step={step} Loss={loss:.5f} Time={now}"

    def log_eval_step(self, step: int, *, loss: float, rate: float, global_rate: float) -> None:
        _log.info("%s", self.step_line("Eval", step, loss, rate, global_rate))

    def checkpoint_saved(self, step: int) -> None:
        _log.info("Saved checkpoint at global step: %d", step)

    def evaluated(self, *, avg_loss: float, metrics: Mapping[str, float]) -> None:
        if metrics:
            _log.info("Avg eval_metrics = %s", dict(metrics))
        _log.info("Avg Eval. Loss = %s", avg_loss)

    def train_finished(self, *, total_samples: int, total_seconds: float) -> None:
        rate = total_samples / total_seconds if total_seconds > 0 else 0.0
        _log.info(
            "Training finished with %d samples in %.2f seconds, %.2f samples/second.",
            total_samples,
            total_seconds,
            rate,
        )

    def completed(self, what: str) -> None:
        """`what`: "Training", "Evaluation" or "Prediction"."""
        _log.info("%s Completed Successfully!", what)

    def close(self) -> None:
        """Take the bar off the screen. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open_bar(self, what: str, step: int, final_step: int | None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
        )
        self._task = self._bar.add_task(what, total=final_step, completed=step)
        self._bar.start()

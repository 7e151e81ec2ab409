"""What a run writes for curves and scripts: TensorBoard events and metrics.jsonl.

Decides names, folders (`<model_dir>/train`, `<model_dir>/eval`) and what a resumed run removes.
Does not decide which steps are logged (loop.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openwafer.train.metrics_log import MetricsLog

__all__ = ["EvalRecorder", "TrainRecorder"]

_log = logging.getLogger("openwafer")


class _Events:
    """A TensorBoard writer that is opened at the first scalar (its import takes a while), and
    that a full disk silences, once said, rather than ends the run."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._folder = folder
        self._purge_step = purge_step
        self._writer: Any = None
        self._failed = False

    @property
    def writer(self) -> Any:
        """The `torch.utils.tensorboard.SummaryWriter`."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        try:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)
        except OSError as error:
            if not self._failed:
                self._failed = True
                _log.warning("no TensorBoard events in %s: %s", self._folder, error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            _log.warning("the last TensorBoard events are lost: %s", error)


class TrainRecorder:
    """Writes `<model_dir>/train`. Opening it removes what an earlier run logged after
    `start_step`: those steps are done again. `tags`: other names for TensorBoard."""

    def __init__(
        self,
        model_dir: Path,
        *,
        start_step: int,
        save_losses: bool = True,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        folder = model_dir / "train"
        self._metrics = MetricsLog(folder / "metrics.jsonl")
        dropped = self._metrics.drop(lambda step: step > start_step)
        if dropped:
            _log.info("train/metrics.jsonl: %d lines after step %d removed", dropped, start_step)
        earlier_events = folder.is_dir() and any(folder.glob("events.out.tfevents.*"))
        self._events = _Events(folder, start_step + 1 if earlier_events else None)
        self._save_losses = save_losses
        self._tags = tags or {}

    @property
    def writer(self) -> Any:
        """The SummaryWriter, for summaries of the user's own."""
        return self._events.writer

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        samples_per_sec: float,
        grad_norm: float | None = None,
        loss_scale: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """One logged step. `learning_rate` is the one that led to `step`."""
        optional = {"grad_norm": grad_norm, "loss_scale": loss_scale}
        values: dict[str, float | None] = {
            "lr": learning_rate,
            "samples_per_sec": samples_per_sec,
            **{name: value for name, value in optional.items() if value is not None},
            **(metrics or {}),
        }
        shown = {"loss": loss, **values} if self._save_losses else values
        self._events.scalars(step, {self._tags.get(name, name): v for name, v in shown.items()})
        self._metrics.append(step, {"loss": loss, **values})

    def close(self) -> None:
        self._events.close()


class EvalRecorder:
    """Writes `<model_dir>/eval`: the last evaluation at each step stands."""

    def __init__(self, model_dir: Path, *, start_step: int | None = None) -> None:
        folder = model_dir / "eval"
        self._metrics = MetricsLog(folder / "metrics.jsonl")
        self._events = _Events(folder, None)
        if start_step is not None:
            self._metrics.drop(lambda step: step > start_step)

    @property
    def writer(self) -> Any:
        """The SummaryWriter, for summaries of the user's own."""
        return self._events.writer

    def log_evaluation(
        self, step: int, *, avg_eval_loss: float, metrics: Mapping[str, float]
    ) -> None:
        values: dict[str, float | None] = {"avg_eval_loss": avg_eval_loss, **metrics}
        self._events.scalars(step, values)
        self._metrics.drop(lambda logged: logged == step)
        self._metrics.append(step, values)

    def close(self) -> None:
        self._events.close()

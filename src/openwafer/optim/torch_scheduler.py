"""A torch learning-rate scheduler over our schedules.

Decides how `learning_rate_at` looks to code that expects torch's LRScheduler: the plain training
loop and `PyTorchBaseModel.get_lr_scheduler()`. Does not decide any rate (schedule.py).
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from openwafer.config.schedule import ScheduleConfig
from openwafer.optim.schedule import learning_rate_at

__all__ = ["ScheduledLR"]


class ScheduledLR(LRScheduler):
    """Sets the rate of every parameter group to that of the schedule at `last_epoch`.

    `last_epoch` is torch's name for what is the global step here: schedules step once per update.
    Unlike torch's own, the state holds the step alone, so it survives a change of the schedule.
    """

    def __init__(self, optimizer: Optimizer, schedule: ScheduleConfig, *, step: int = 0) -> None:
        # Not LRScheduler.__init__: it patches optimizer.step to warn about the order of calls,
        # which only matters to schedulers that compute a rate from the one before.
        self.optimizer = optimizer
        self.schedule = schedule
        self.base_lrs = [learning_rate_at(schedule, 0) for _ in optimizer.param_groups]
        self._apply(step)

    def get_lr(self) -> list[Any]:
        """The rate at `last_epoch`, once per parameter group."""
        rate = learning_rate_at(self.schedule, self.last_epoch)
        return [rate for _ in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next global step, or to step `epoch`."""
        self._apply(self.last_epoch + 1 if epoch is None else epoch)

    def state_dict(self) -> dict[str, Any]:
        """`last_epoch` (the global step) and `_last_lr`, as torch's own schedulers name them."""
        return {"last_epoch": self.last_epoch, "_last_lr": list(self._last_lr)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of a state, also of one that a torch scheduler wrote."""
        self._apply(int(state_dict["last_epoch"]))

    def _apply(self, step: int) -> None:
        self.last_epoch = step
        self._step_count = step + 1
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

"""Our schedules behind torch's scheduler interface."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler

from openwafer.config.schedule import Linear
from openwafer.optim.schedule import learning_rate_at
from openwafer.optim.torch_scheduler import ScheduledLR

SCHEDULE = Linear(initial_learning_rate=1.0, end_learning_rate=0.0, steps=10)


def optimizer() -> torch.optim.Optimizer:
    first, second = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    return torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=5.0)


def test_it_follows_the_schedule_in_every_group() -> None:
    updated = optimizer()
    scheduler = ScheduledLR(updated, SCHEDULE)
    assert isinstance(scheduler, LRScheduler)
    for step in range(15):
        expected = [learning_rate_at(SCHEDULE, step)] * 2
        assert scheduler.get_last_lr() == expected
        assert [group["lr"] for group in updated.param_groups] == expected
        updated.step()
        scheduler.step()


def test_it_resumes_from_its_own_state_and_from_torchs() -> None:
    scheduler = ScheduledLR(optimizer(), SCHEDULE)
    for _ in range(4):
        scheduler.step()
    resumed = ScheduledLR(optimizer(), SCHEDULE)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr() == [learning_rate_at(SCHEDULE, 4)] * 2
    updated = optimizer()
    theirs = torch.optim.lr_scheduler.StepLR(updated, 3)
    for _ in range(7):
        updated.step()
        theirs.step()
    resumed.load_state_dict(theirs.state_dict())
    assert resumed.last_epoch == 7
    assert ScheduledLR(optimizer(), SCHEDULE, step=7).get_last_lr() == resumed.get_last_lr()

"""In which order each process of a pipeline works: tables of actions.

Decides the tables: GPipe and 1F1B, written here (a list of a few lines each; those of torch 2.13
are for drawing, and its 1F1B table begins at microbatch 1 in the last stage), and the interleaved
and zero-bubble ones, which are torch.distributed.pipelining's. Does not run them.

torch's own runtime for such tables is not used: its stages take part in autograd, while layers here
are pairs of functions whose weights are arguments; it refuses values that skip a stage; its split
of the backward pass is wrong for operations with several results and for a weight that is read
twice; and it knows no weight in two stages (pytorch issues 127964, 170277, 180952). What a table
says, an action at a time, is done by stage_run.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args

from openwafer.config.runconfig import PipelineSchedule as ScheduleName
from openwafer.errors import PlanError

__all__ = ["Action", "Kind", "ScheduleName", "schedule_tables", "stages_per_process"]

Kind = Literal["F", "B", "I", "W"]
"""Forward; the whole backward; its part that gives gradients of inputs; of weights."""

_KINDS: Mapping[str, Kind] = {
    "FORWARD": "F",
    "FULL_BACKWARD": "B",
    "BACKWARD_INPUT": "I",
    "BACKWARD_WEIGHT": "W",
}
"""By torch's name."""


@dataclass(frozen=True, slots=True)
class Action:
    """One stage's work on one microbatch."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def stages_per_process(name: ScheduleName) -> int:
    """How many stages each process runs: interleaving takes two, far apart in the model."""
    return 2 if name == "interleaved" else 1


def schedule_tables(
    name: ScheduleName, num_processes: int, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """What each process does, in order. Backward passes of a stage go through the microbatches in
    order, so that sums of gradients have the same bits in every schedule.

    Raises:
        PlanError: the schedule cannot be made for such numbers.
    """
    assert name in get_args(ScheduleName)
    if num_microbatches < 1:
        raise PlanError("a pipeline needs at least one microbatch", where="--num_microbatches")
    if name in ("gpipe", "1f1b"):
        make = _gpipe if name == "gpipe" else _one_forward_one_backward
        return tuple(
            tuple(make(process, num_processes, num_microbatches))
            for process in range(num_processes)
        )
    return _of_torch(name, num_processes, num_microbatches)


def _gpipe(process: int, num_processes: int, count: int) -> list[Action]:
    order = range(count)
    return [*(Action("F", process, m) for m in order), *(Action("B", process, m) for m in order)]


def _one_forward_one_backward(process: int, num_processes: int, count: int) -> list[Action]:
    ahead = min(num_processes - 1 - process, count)
    actions = [Action("F", process, m) for m in range(ahead)]
    for m in range(count):
        if m + ahead < count:
            actions.append(Action("F", process, m + ahead))
        actions.append(Action("B", process, m))
    return actions


def _of_torch(
    name: ScheduleName, num_processes: int, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    # Imported late: it brings in a good part of torch.distributed.
    from torch.distributed.pipelining.schedules import (
        ScheduleInterleaved1F1B,
        ScheduleInterleavedZeroBubble,
    )

    make = ScheduleInterleaved1F1B if name == "interleaved" else ScheduleInterleavedZeroBubble
    per_process = stages_per_process(name)
    # All that a schedule asks of its stages before it runs.
    stage: Any = SimpleNamespace(
        num_stages=num_processes * per_process,
        group_size=num_processes,
        group_rank=0,
        submod=None,
        has_backward=True,
    )
    logger = logging.getLogger("torch.distributed.pipelining.schedules")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        made = cast("Callable[..., Any]", make)([stage] * per_process, num_microbatches)
    except ValueError as error:
        raise PlanError(
            f"{name} has no schedule for {num_microbatches} microbatches in {num_processes} stages",
            where="--num_microbatches",
            allowed=f"a multiple of {num_processes}",
        ) from error
    finally:
        logger.setLevel(level)
    order: dict[int, Sequence[Any]] = made.pipeline_order
    return tuple(
        tuple(
            Action(
                _KINDS[action.computation_type.name], action.stage_index, action.microbatch_index
            )
            for action in order[process]
            if action is not None
        )
        for process in range(num_processes)
    )

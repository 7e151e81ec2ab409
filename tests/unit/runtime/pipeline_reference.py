"""A pipeline of processes for tests, and the one process that it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from group_processes import Processes
from runtime_reference import (
    Setup,
    assert_states_equal,
    batches_like,
    optimizer_config,
    run_steps,
)

from openwafer.config.optimizer import OptimizerConfig
from openwafer.runtime.executor import Executor, ModelState, StepResult
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stages.executor import PipelineStages, serve
from openwafer.runtime.stages.layout import lay_out
from openwafer.runtime.stages.schedule import ScheduleName

__all__ = ["CLIPPED", "SCHEDULES", "assert_like_one_process", "drive"]

SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved", "zero_bubble")
STEPS, MICROBATCHES = 2, 4
Outcome = tuple[list[StepResult], StepResult | None, ModelState]


def outcome(executor: Executor, setup: Setup) -> Outcome:
    """Training steps, an evaluation, and the state after them."""
    data = batches_like(setup.batch, STEPS * MICROBATCHES)
    results = run_steps(executor, data, microbatches=MICROBATCHES)
    evaluated = executor.eval_step(data[0], step=STEPS) if setup.evaluates else None
    return results, evaluated, executor.state()


def drive(
    group: ComputeGroup,
    setup: Setup,
    config: OptimizerConfig,
    schedule: ScheduleName,
    replicas: int,
    run: Any = outcome,
) -> Any:
    workload = setup.workload(config)
    layout = lay_out(
        workload.train,
        workload.evaluation,
        [1] * len(setup.layers),
        num_stages=group.size // replicas,
        num_replicas=replicas,
        schedule=schedule,
    )
    if group.rank:
        serve(workload, layout, group)
        return None
    executor = PipelineStages(workload, layout, group)
    try:
        return run(executor, setup)
    finally:
        executor.close()


def assert_like_one_process(
    folder: Path,
    setup: Setup,
    config: OptimizerConfig,
    schedule: ScheduleName,
    *,
    stages: int,
    replicas: int = 1,
    tolerance: float = 1e-6,
) -> None:
    results, evaluated, state = outcome(setup.pipelined(config), setup)
    processes = Processes(folder, stages * replicas, drive, setup, config, schedule, replicas)
    found, found_evaluation, found_state = processes.results()[0]
    for ours, theirs in zip(found, results, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=1e-7)
        assert ours.applied == theirs.applied
        assert ours.loss_scale == theirs.loss_scale
        assert ours.grad_norm == (theirs.grad_norm and pytest.approx(theirs.grad_norm, rel=2e-6))
    if evaluated is not None:
        torch.testing.assert_close(found_evaluation.loss, evaluated.loss, rtol=2e-6, atol=1e-7)
    assert_states_equal(found_state, state, tolerance)


CLIPPED = optimizer_config("adamw", max_gradient_norm=0.5)

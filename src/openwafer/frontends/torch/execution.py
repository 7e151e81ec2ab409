"""A prepared model's training, evaluation or prediction.

Decides which executor runs it, where its batches come from and what watches it. Does not decide
which task of a run does this (run.py) nor how a job goes (train/job.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from openwafer.config.runconfig import RunConfig
from openwafer.frontends.torch.metric_functions import metric_functions
from openwafer.frontends.torch.params_file import write_params
from openwafer.frontends.torch.plain import PlainExecutor
from openwafer.frontends.torch.preparation import PreparedModel, compile_model, grad_accum_steps
from openwafer.frontends.torch.recording import ModuleSummaries, SavedStream
from openwafer.frontends.torch.session import make_executor
from openwafer.optim.state import from_torch_state_dict, to_torch_state_dict
from openwafer.plan.plan import Plan, WeightStreamingSchedule
from openwafer.runtime.elsewhere import brought, is_elsewhere
from openwafer.runtime.executor import Executor
from openwafer.runtime.microbatches import SplitBatches
from openwafer.runtime.process_group import join_group
from openwafer.runtime.timing.step_times import StepTimes
from openwafer.runtime.timing.trace_file import TraceFile
from openwafer.streaming import tasks
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.meeting import forget_meeting
from openwafer.streaming.source import BatchSource
from openwafer.train.checkpoint import OptimizerCodec
from openwafer.train.hooks import Hooks
from openwafer.train.job import Job, JobResult, run_job
from openwafer.train.performance import PlanFigures
from openwafer.train.run_lock import refuse_second_training, training_lock

__all__ = ["execute"]

_log = logging.getLogger("openwafer")


def execute(model: PreparedModel, coordinator: Coordinator | None) -> JobResult:
    """Trains, evaluates or predicts.

    Args:
        coordinator: gives the batches where workers stream them; None: they are read here.

    Raises:
        OpenWaferError: of the model, the plan, the data or a checkpoint.
    """
    params, config = model.params, model.params.runconfig
    if config.trains and tasks.current().num_compute == 1:  # else others wait to meet this one
        refuse_second_training(config.model_dir)
    executor, figures, times = _executor(model)
    with ExitStack() as stack:
        stack.callback(executor.close)
        if config.trains:
            stack.enter_context(training_lock(config.model_dir))
        write_params(params, config.mode)
        sources: dict[str, BatchSource] = dict(model.sequences)
        if coordinator is not None:
            coordinator.wait_for_workers()
            forget_meeting(tasks.current())
            sources = {mode: coordinator.source(mode) for mode in model.modes}
        result = run_job(
            Job(
                executor=executor,
                run=config,
                codec=_codec(model),
                learning_rate_at=model.rules().learning_rate_at,
                train_source=sources.get("train"),
                eval_source=sources.get("eval"),
                predict_source=sources.get("predict"),
                grad_accum_steps=grad_accum_steps(params),
                plan_figures=figures,
                device=model.device.type,
                hooks=_hooks(model),
                metrics=metric_functions(config.mode),
                busy_seconds=coordinator.busy_seconds if coordinator is not None else None,
                times=times,
            )
        )
        if config.show_debug_metrics:
            _show_counters(executor, figures, coordinator)
        if config.trains:
            # The user's own object ends up with the trained weights, as in the plain loop.
            _hand_over(executor.borrowed_state().model, model.base.model)
        return result


def _hand_over(weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """What other processes have comes here one tensor at a time."""
    here = {name: tensor for name, tensor in weights.items() if not is_elsewhere(tensor)}
    model.load_state_dict(here, strict=False)
    for name in weights.keys() - here.keys():
        model.load_state_dict({name: brought(weights[name])}, strict=False)


def _show_counters(
    executor: Executor, figures: PlanFigures, coordinator: Coordinator | None
) -> None:
    """One line per counter: of the compiler, the executor, and the wait for each worker."""
    _log.info("Counter compile seconds: %.3f", figures.compile_seconds)
    for name, count in executor.counters().items():
        _log.info("Counter %s: %d", name, count)
    waited = coordinator.waited_seconds if coordinator is not None else {}
    for rank, seconds in waited.items():
        _log.info("Counter seconds waited for worker %d: %.3f", rank, seconds)


def _executor(model: PreparedModel) -> tuple[Executor, PlanFigures, StepTimes | None]:
    rules, config = model.rules(), model.params.runconfig
    if not config.use_cs:
        executor = PlainExecutor(
            model.base.model,
            model.base,
            list(model.base.modules().values()),
            optimizer=rules.optimizer,
            learning_rate_at=rules.learning_rate_at,
            device=rules.device,
            seed=rules.seed,
            autocast_dtype=rules.autocast_dtype,
            guard_loss=rules.guard_loss,
        )
        return _splitting(executor, model), PlanFigures(), _step_times(config, None)
    environment = tasks.current()
    group = join_group(environment, model.device) if environment.num_compute > 1 else None
    compiled, evaluation = compile_model(model)
    times = _step_times(config, compiled.plan)
    rules = model.rules(group)
    if times is not None:
        rules = replace(rules, recorder=times.recorder)
    executor = make_executor(compiled, evaluation, model.base.modules(), rules, group)
    return _splitting(executor, model), PlanFigures.of(compiled.plan, compiled.seconds), times


def _step_times(config: RunConfig, plan: Plan | None) -> StepTimes | None:
    """What weight streaming records of its steps; None for any other run."""
    streams = plan is not None and isinstance(plan.schedule, WeightStreamingSchedule)
    if not streams or not config.trains:
        if config.timeline is not None:
            _log.warning("there is no timeline: it is for training in weight_streaming")
        return None
    path, steps = config.timeline, config.timeline_steps
    return StepTimes(
        on_disk=config.weight_store != "ram",
        trace=TraceFile(path, max_steps=steps) if path is not None else None,
    )


def _splitting(executor: Executor, model: PreparedModel) -> Executor:
    return SplitBatches(executor, model.num_parts) if model.num_parts > 1 else executor


def _codec(model: PreparedModel) -> OptimizerCodec:
    """The optimizer entry of checkpoints in torch's own format."""
    names = [name for name, _ in model.base.trainable_named_parameters()]
    config = model.params.optimizer

    def to_torch(state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return to_torch_state_dict(config, names, state) if config and state else {}

    def from_torch(state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
        if not config or not state_dict:
            return {}
        return from_torch_state_dict(config, names, state_dict)

    return OptimizerCodec(to_torch=to_torch, from_torch=from_torch)


def _hooks(model: PreparedModel) -> Hooks:
    config = model.params.runconfig
    if config.enable_summaries:
        return ModuleSummaries(model.base.model, config.model_dir)
    if config.save_stream_size:
        folder = config.model_dir / model.modes[0]
        return SavedStream(folder, config.save_stream_size, ordinal=tasks.get_ordinal())
    return Hooks()

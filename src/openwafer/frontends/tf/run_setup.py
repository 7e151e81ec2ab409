"""What every compiled run of an Estimator begins with: a prepared model, a plan, the variables'
values, an executor and its data.

Decides how a model_fn and an input_fn become these. Does not decide what is done with them
(compiled_run.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openwafer.config.runconfig import RunConfig
from openwafer.frontends.tf.checkpoint import latest_checkpoint, read_checkpoint
from openwafer.frontends.tf.input_data import InputFn, InputFunction, NumberedInput, place_of
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import CallModelFn, variables_of
from openwafer.frontends.tf.nodes import Array
from openwafer.frontends.tf.prepared_model import PreparedModel, prepare_model
from openwafer.frontends.tf.run_config import CSRunConfig
from openwafer.frontends.tf.skipped_steps import SkippedSteps, StepsBehind
from openwafer.frontends.tf.variables import initial_values, model_state, optimizer_lag
from openwafer.frontends.torch.capture import Captured
from openwafer.frontends.torch.session import RunRules, choose_device, make_executor
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.machine.spec import load_machine
from openwafer.pipeline import CompiledProgram, choose_mode, compile_program
from openwafer.runtime.executor import Executor
from openwafer.streaming import tasks
from openwafer.streaming.meeting import forget_meeting, open_coordinator
from openwafer.streaming.shard import Shard
from openwafer.streaming.source import BatchSource, Mode
from openwafer.train.performance import PlanFigures
from openwafer.train.position import Progress

__all__ = ["RunSetup", "Started"]

_log = logging.getLogger("openwafer")

_ONLY_AT_THE_END = 2**62
_MODES: Mapping[str, Mode] = {"train": "train", "eval": "eval", "infer": "predict"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An executor with its state. behind: how far the optimizer's own steps are."""

    executor: Executor
    figures: PlanFigures
    behind: StepsBehind


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup:
    """An Estimator's part of it.

    call: model_fn with its other arguments. params: of the input function. warm_start: used where
    model_dir has no checkpoint.
    """

    call: CallModelFn
    params: Any
    config: CSRunConfig
    model_dir: Path
    compile_dir: Path
    name: str
    warm_start: Any = None

    @property
    def device(self) -> torch.device:
        return choose_device(self.config.compute_device, cpu=False)

    @property
    def seed(self) -> int:
        seed = self.config.tf_random_seed
        return 1 if seed is None else int(seed)

    def input(self, input_fn: InputFn, mode: str) -> InputFunction:
        return InputFunction(function=input_fn, params=self.params, mode=mode)

    def model(self, input_fn: InputFn, mode: str) -> PreparedModel:
        """A model's form for a mode of tf.estimator.ModeKeys."""
        return prepare_model(
            self.call,
            self.input(input_fn, mode).element_spec(),
            mode,
            name=self.name,
            seed=self.seed,
            warm_start=self._warm_start_of(mode),
        )

    def _warm_start_of(self, mode: str) -> Any:
        """A training run without a checkpoint of its own begins with what was given."""
        begins = mode == tf.estimator.ModeKeys.TRAIN and latest_checkpoint(self.model_dir) is None
        return self.warm_start if begins else None

    def mode_of(self, captured: Captured) -> Any:
        """The execution mode."""
        requested: Any = self.config.execution_mode
        return choose_mode(requested, captured.program, self.device)

    def compile(self, model: PreparedModel, captured: Captured) -> CompiledProgram:
        """A plan, or the one that is in `compile_dir` already."""
        compiled = compile_program(
            captured.program,
            machine=load_machine(self.config.machine),
            execution_mode=self.mode_of(captured),
            compile_dir=self.compile_dir,
            optimizer=model.train_op.optimizer if model.train_op else None,
        )
        if compiled.from_cache:
            _log.info("Found a cached compilation for this model configuration")
        _log.info(
            "%s plan in %.2f s: %s",
            compiled.plan.execution_mode,
            compiled.seconds,
            compiled.directory,
        )
        return compiled

    @contextmanager
    def source(self, input_fn: InputFn, mode: str) -> Generator[BatchSource]:
        """The batches: of this process, or of the workers."""
        environment, cs_ip = tasks.current(), self.config.cs_ip
        if environment.role != "coordinator" or cs_ip in (None, "local"):
            yield self.input(input_fn, mode).sequence(seed=self.seed, shard=Shard(0, 1))
            return
        with open_coordinator(cs_ip, environment) as coordinator:
            coordinator.wait_for_workers()
            forget_meeting(environment)
            yield coordinator.source(_MODES[mode])

    def progress(
        self, input_fn: InputFn, source: BatchSource, *, step: int, batches_per_step: int
    ) -> Progress:
        """Where a run that has made `step` steps goes on, in its data too if they have numbers."""
        here = Progress(global_step=step, origin_step=step)
        if not isinstance(input_fn, NumberedInput):
            return here
        num_batches = source.num_batches
        assert num_batches is not None, "what has numbers has a length"
        epoch, batch = place_of(step, num_batches=num_batches, batches_per_step=batches_per_step)
        return replace(here, epoch=epoch, batch=batch)

    def start(self, model: PreparedModel, values: dict[str, Array], *, step: int) -> Started:
        """An executor with the state that `values` say."""
        captured, module = model.captured(values)
        compiled = self.compile(model, captured)
        train_op = model.train_op
        behind = StepsBehind(optimizer_lag(values, train_op, step=step) if train_op else 0)
        rules = RunRules(
            optimizer=train_op.optimizer if train_op else None,
            learning_rate_at=train_op.learning_rate_from(behind) if train_op else lambda _: 0.0,
            device=self.device,
            seed=self.seed,
            streaming=StreamingRules(weight_store=self.config.weight_store),
        )
        executor = make_executor(compiled, None, {"model": module}, rules)
        executor.load_state(model_state(values, train_op, step=step))
        if train_op and train_op.powers:
            executor = SkippedSteps(executor, behind)
        figures = PlanFigures.of(compiled.plan, compiled.seconds)
        return Started(executor=executor, figures=figures, behind=behind)

    def values(self, model: PreparedModel, checkpoint: str | None) -> dict[str, Array]:
        """Of all variables: a checkpoint's, or the initializers'."""
        if checkpoint is None:
            return initial_values(model.graph)
        names = [variable.op.name for variable in variables_of(model.graph.graph)]
        return read_checkpoint(checkpoint, names)

    def run_config(
        self,
        *,
        steps: int | None = None,
        max_steps: int | None = None,
        eval_steps: int | None = None,
    ) -> RunConfig:
        """The settings of a loop."""
        config = self.config
        return RunConfig(
            max_steps=max_steps,
            num_steps=steps,
            eval_steps=eval_steps,
            log_steps=config.log_step_count_steps or 0,
            checkpoint_steps=config.save_checkpoints_steps or _ONLY_AT_THE_END,
            save_initial_checkpoint=True,
            seed=self.seed,
            model_dir=self.model_dir,
            cs_ip=config.cs_ip,
        )

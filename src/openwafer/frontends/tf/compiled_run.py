"""Compiled runs of an Estimator: compile, train, evaluate, predict.

Decides the order of each of them. The order within training is the loop's (train/loop.py); what a
run begins with is run_setup.py's; what is specific to TensorFlow, checkpoints and metrics among it,
is in the modules that these two put together.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openwafer.errors import ConfigError
from openwafer.frontends.tf.checkpoint import (
    CheckpointWriter,
    checkpoint_to_evaluate,
    global_step_of,
    latest_checkpoint,
)
from openwafer.frontends.tf.host_metrics import HostMetrics
from openwafer.frontends.tf.input_data import InputFn
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.nodes import Array
from openwafer.frontends.tf.run_setup import RunSetup
from openwafer.frontends.tf.session_hooks import SessionHooks, checkpoint_steps, hooks_of
from openwafer.frontends.tf.variables import variable_values
from openwafer.pipeline import validate_program
from openwafer.plan.plan import Plan
from openwafer.plan.validation import ValidationReport, write_validation
from openwafer.streaming import tasks
from openwafer.streaming.worker import run_worker, worker_shard
from openwafer.train.evaluation import EvalTools, evaluate
from openwafer.train.hooks import Hooks
from openwafer.train.loop import TrainResult, TrainTools, train
from openwafer.train.performance import Meter, PlanFigures, write_performance
from openwafer.train.position import Progress
from openwafer.train.progress import Reporter
from openwafer.train.run_lock import refuse_second_training, training_lock
from openwafer.train.signals import StopRequest
from openwafer.train.summaries import EvalRecorder, TrainRecorder

__all__ = ["CompiledRuns"]

_log = logging.getLogger("openwafer")

_TAGS = {
    "lr": "train/lr",
    "grad_norm": "train/unclipped_grad_norm",
    "loss_scale": "train/loss_scale",
}
"""What the documented summaries are called."""


@dataclass(frozen=True, slots=True)
class CompiledRuns:
    """What an Estimator does where there is a machine."""

    setup: RunSetup

    def validate(self, input_fn: InputFn, mode: str) -> ValidationReport:
        """Match every operation with a kernel; writes validate.json.

        Raises:
            OpenWaferError: something is refused; it lists all of it.
        """
        captured, _ = self.setup.model(input_fn, mode).captured({})
        report = validate_program(captured.program, self.setup.mode_of(captured))
        write_validation(report, self.setup.model_dir / "validate.json")
        report.raise_if_refused()
        return report

    def plan(self, input_fn: InputFn, mode: str) -> Plan:
        """Compile; the plan is written to `compile_dir`, or found there."""
        model = self.setup.model(input_fn, mode)
        captured, _ = model.captured({})
        return self.setup.compile(model, captured).plan

    def stream(self, input_fn: InputFn, mode: str) -> bool:
        """What a worker task does of a run: stream its shard of the data. False: this is none."""
        environment, setup = tasks.current(), self.setup
        if environment.role == "peer":
            raise ConfigError(
                "several tasks are to compute one TensorFlow model",
                allowed="one task that computes; the others stream data",
            )
        if environment.role != "worker":
            return False
        if setup.config.cs_ip == "local":
            _log.info("nothing to do here: task 0 alone runs this")
            return True
        assert setup.config.cs_ip is not None
        data, shard = setup.input(input_fn, mode), worker_shard(environment)
        run_worker(
            lambda _: data.sequence(seed=setup.seed, shard=shard),
            setup.config.cs_ip,
            environment,
        )
        return True

    def train(
        self,
        input_fn: InputFn,
        *,
        steps: int | None,
        max_steps: int | None,
        hooks: Sequence[Any] | None = None,
    ) -> TrainResult:
        """Train from the newest checkpoint, or from the initializers.

        Args:
            hooks: of TensorFlow, besides those of the spec.
        """
        setup, mode = self.setup, tf.estimator.ModeKeys.TRAIN
        refuse_second_training(setup.model_dir)
        model = setup.model(input_fn, mode)
        train_op = model.train_op
        assert train_op is not None
        all_hooks = hooks_of(model.graph.spec, hooks)
        values = setup.values(model, latest_checkpoint(setup.model_dir))
        step = global_step_of(values)
        started = setup.start(model, values, step=step)
        executor, behind = started.executor, started.behind
        writer = CheckpointWriter(
            setup.model_dir, model.graph.graph, keep_max=setup.config.keep_checkpoint_max
        )

        def save(progress: Progress) -> Path:
            at, state = progress.global_step, executor.state()
            return writer.save(
                at, variable_values(state, values, train_op, step=at, lag=behind.num_steps)
            )

        with ExitStack() as stack:
            stack.callback(executor.close)
            stack.enter_context(training_lock(setup.model_dir))
            stop = stack.enter_context(StopRequest())
            source = stack.enter_context(setup.source(input_fn, mode))
            per_step = train_op.optimizer.grad_accum_steps
            run = setup.run_config(steps=steps, max_steps=max_steps)
            often = checkpoint_steps(all_hooks, setup.model_dir, run.checkpoint_steps)
            start = setup.progress(input_fn, source, step=step, batches_per_step=per_step)
            called = SessionHooks(all_hooks, model.graph, stop, step=step)
            tools = self._train_tools(stack, stop, model.metrics, called, step, save)
            result = train(
                executor,
                source,
                run=replace(run, checkpoint_steps=often),
                learning_rate_at=train_op.learning_rate_at,
                tools=tools,
                grad_accum_steps=per_step,
                start=start,
            )
        self._report(result, tools.reporter, started.figures)
        return result

    def _train_tools(
        self,
        stack: ExitStack,
        stop: StopRequest,
        metrics: HostMetrics,
        hooks: Hooks,
        step: int,
        save: Any,
    ) -> TrainTools:
        reporter = Reporter(device=self.setup.device.type, with_rates=True)
        stack.callback(reporter.close)
        recorder = TrainRecorder(self.setup.model_dir, start_step=step, tags=_TAGS)
        stack.callback(recorder.close)
        return TrainTools(
            reporter=reporter,
            meter=Meter(),
            hooks=hooks,
            metrics=metrics.functions(),
            stop=stop,
            recorder=recorder,
            save=save,
        )

    def _report(self, result: TrainResult, reporter: Reporter, figures: PlanFigures) -> None:
        measured = result.performance
        if measured.total_samples:
            write_performance(self.setup.model_dir, measured, figures)
            reporter.train_finished(
                total_samples=measured.total_samples, total_seconds=measured.total_seconds
            )
        if result.last_loss is not None:
            _log.info("Loss for final step: %g.", result.last_loss)

    def evaluate(
        self, input_fn: InputFn, *, steps: int | None, checkpoint: str | None, name: str | None
    ) -> dict[str, Any]:
        """Loss and metrics of a checkpoint (None: the newest, or the initial weights where there is
        none), as the Estimator gives them."""
        setup, mode = self.setup, tf.estimator.ModeKeys.EVAL
        model = setup.model(input_fn, mode)
        values = setup.values(model, checkpoint_to_evaluate(setup.model_dir, checkpoint))
        step = global_step_of(values)
        executor = setup.start(model, values, step=step).executor
        with ExitStack() as stack:
            stack.callback(executor.close)
            reporter = Reporter(device=setup.device.type, with_rates=True)
            stack.callback(reporter.close)
            tools = EvalTools(
                reporter=reporter,
                meter=Meter(),
                hooks=Hooks(),
                metrics=model.metrics.functions(),
                stop=stack.enter_context(StopRequest()),
            )
            source = stack.enter_context(setup.source(input_fn, mode))
            run = setup.run_config(eval_steps=steps)
            result = evaluate(executor, source, run=run, step=step, tools=tools)
            reporter.evaluated(avg_loss=result.avg_loss, metrics=result.metrics)
            recorder = EvalRecorder(setup.model_dir / name if name else setup.model_dir)
            stack.callback(recorder.close)
            recorder.log_evaluation(step, avg_eval_loss=result.avg_loss, metrics=result.metrics)
        found = {key: np.float32(value) for key, value in result.metrics.items()}
        return {**found, "loss": np.float32(result.avg_loss), "global_step": step}

    def predict(
        self, input_fn: InputFn, *, checkpoint: str | None, num_samples: int | None = None
    ) -> Generator[dict[str, Array]]:
        """The predictions of one batch after the other."""
        setup, mode = self.setup, tf.estimator.ModeKeys.PREDICT
        model = setup.model(input_fn, mode)
        values = setup.values(model, checkpoint_to_evaluate(setup.model_dir, checkpoint))
        step = global_step_of(values)
        executor = setup.start(model, values, step=step).executor
        key, seen = model.metrics.receiver.name, 0
        with ExitStack() as stack:
            stack.callback(executor.close)
            source = stack.enter_context(setup.source(input_fn, mode))
            for batch in source.epoch(0):
                (tensors,) = executor.eval_step(batch, step=step).metrics[key]
                arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
                yield dict(zip(model.predicted, arrays, strict=True))
                seen += len(arrays[0])
                if num_samples is not None and seen >= num_samples:
                    return

"""Compiled runs of an Estimator: compile, train, evaluate, predict.

Decides how a model_fn and an input_fn become an executor and its data, and in which order. The
order within training is the loop's (train/loop.py); what is specific to TensorFlow, checkpoints and
metrics among it, is in the modules that this one puts together.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openwafer.config.runconfig import RunConfig
from openwafer.errors import ConfigError
from openwafer.frontends.tf.checkpoint import (
    CheckpointWriter,
    global_step_of,
    latest_checkpoint,
    read_checkpoint,
)
from openwafer.frontends.tf.host_metrics import HostMetrics
from openwafer.frontends.tf.input_data import InputFn, InputFunction
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import CallModelFn, variables_of
from openwafer.frontends.tf.nodes import Array
from openwafer.frontends.tf.prepared_model import PreparedModel, prepare_model
from openwafer.frontends.tf.run_config import CSRunConfig
from openwafer.frontends.tf.variables import (
    initial_values,
    model_state,
    optimizer_lag,
    variable_values,
)
from openwafer.frontends.torch.capture import Captured
from openwafer.frontends.torch.session import RunRules, choose_device, make_executor
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.machine.spec import load_machine
from openwafer.pipeline import CompiledProgram, choose_mode, compile_program, validate_program
from openwafer.plan.plan import Plan
from openwafer.plan.validation import ValidationReport, write_validation
from openwafer.runtime.executor import Executor
from openwafer.streaming import tasks
from openwafer.streaming.meeting import forget_meeting, open_coordinator
from openwafer.streaming.shard import Shard
from openwafer.streaming.source import BatchSource, Mode
from openwafer.streaming.worker import run_worker, worker_shard
from openwafer.train.evaluation import EvalTools, evaluate
from openwafer.train.hooks import Hooks
from openwafer.train.loop import TrainResult, TrainTools, train
from openwafer.train.performance import Meter, PlanFigures, write_performance
from openwafer.train.position import Progress
from openwafer.train.progress import Reporter
from openwafer.train.signals import StopRequest
from openwafer.train.summaries import EvalRecorder, TrainRecorder

__all__ = ["CompiledRuns"]

_log = logging.getLogger("openwafer")

_ONLY_AT_THE_END = 2**62
_MODES: Mapping[str, Mode] = {"train": "train", "eval": "eval", "infer": "predict"}


@dataclass(slots=True, kw_only=True)
class CompiledRuns:
    """What an Estimator does where there is a machine.

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

    # ------------------------------------------------------------------ compile

    def validate(self, input_fn: InputFn, mode: str) -> ValidationReport:
        """Match every operation with a kernel; writes validate.json.

        Raises:
            OpenWaferError: something is refused; it lists all of it.
        """
        captured, _ = self._model(input_fn, mode).captured({})
        report = validate_program(captured.program, self._mode_of(captured))
        write_validation(report, self.model_dir / "validate.json")
        report.raise_if_refused()
        return report

    def plan(self, input_fn: InputFn, mode: str) -> Plan:
        """Compile; the plan is written to `compile_dir`, or found there."""
        model = self._model(input_fn, mode)
        captured, _ = model.captured({})
        return self._compile(model, captured).plan

    def _mode_of(self, captured: Captured) -> Any:
        requested: Any = self.config.execution_mode
        return choose_mode(requested, captured.program, self._device())

    def _device(self) -> torch.device:
        return choose_device(self.config.compute_device, cpu=False)

    def _seed(self) -> int:
        seed = self.config.tf_random_seed
        return 1 if seed is None else int(seed)

    def _input(self, input_fn: InputFn, mode: str) -> InputFunction:
        return InputFunction(function=input_fn, params=self.params, mode=mode)

    def _warm_start_of(self, mode: str) -> Any:
        """A training run without a checkpoint of its own begins with what was given."""
        begins = mode == tf.estimator.ModeKeys.TRAIN and latest_checkpoint(self.model_dir) is None
        return self.warm_start if begins else None

    def _model(self, input_fn: InputFn, mode: str) -> PreparedModel:
        return prepare_model(
            self.call,
            self._input(input_fn, mode).element_spec(),
            mode,
            name=self.name,
            seed=self._seed(),
            warm_start=self._warm_start_of(mode),
        )

    def _compile(self, model: PreparedModel, captured: Captured) -> CompiledProgram:
        compiled = compile_program(
            captured.program,
            machine=load_machine(self.config.machine),
            execution_mode=self._mode_of(captured),
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

    # ------------------------------------------------------------------ run

    def stream(self, input_fn: InputFn, mode: str) -> bool:
        """What a worker task does of a run: stream its shard of the data. False: this is none."""
        environment = tasks.current()
        if environment.role == "peer":
            raise ConfigError(
                "several tasks are to compute one TensorFlow model",
                allowed="one task that computes; the others stream data",
            )
        if environment.role != "worker":
            return False
        if self.config.cs_ip == "local":
            _log.info("nothing to do here: task 0 alone runs this")
            return True
        assert self.config.cs_ip is not None
        data, shard = self._input(input_fn, mode), worker_shard(environment)
        run_worker(
            lambda _: data.sequence(seed=self._seed(), shard=shard),
            self.config.cs_ip,
            environment,
        )
        return True

    @contextmanager
    def _source(self, input_fn: InputFn, mode: str) -> Generator[BatchSource]:
        environment, cs_ip = tasks.current(), self.config.cs_ip
        if environment.role != "coordinator" or cs_ip in (None, "local"):
            yield self._input(input_fn, mode).sequence(seed=self._seed(), shard=Shard(0, 1))
            return
        with open_coordinator(cs_ip, environment) as coordinator:
            coordinator.wait_for_workers()
            forget_meeting(environment)
            yield coordinator.source(_MODES[mode])

    def _executor(
        self, model: PreparedModel, values: dict[str, Array], *, step: int
    ) -> tuple[Executor, PlanFigures, int]:
        """With the state that `values` say, and how far the optimizer's own steps lag behind."""
        captured, module = model.captured(values)
        compiled = self._compile(model, captured)
        train_op = model.train_op
        lag = optimizer_lag(values, train_op, step=step) if train_op else 0
        rules = RunRules(
            optimizer=train_op.optimizer if train_op else None,
            learning_rate_at=train_op.learning_rate_from(lag) if train_op else lambda _: 0.0,
            device=self._device(),
            seed=self._seed(),
            streaming=StreamingRules(weight_store=self.config.weight_store),
        )
        executor = make_executor(compiled, None, {"model": module}, rules)
        executor.load_state(model_state(values, train_op, step=step))
        return executor, PlanFigures.of(compiled.plan, compiled.seconds), lag

    def _values(self, model: PreparedModel, checkpoint: str | None) -> dict[str, Array]:
        if checkpoint is None:
            return initial_values(model.graph)
        names = [variable.op.name for variable in variables_of(model.graph.graph)]
        return read_checkpoint(checkpoint, names)

    def train(
        self, input_fn: InputFn, *, steps: int | None, max_steps: int | None, hooks: Hooks
    ) -> TrainResult:
        """Train from the newest checkpoint, or from the initializers."""
        model = self._model(input_fn, tf.estimator.ModeKeys.TRAIN)
        assert model.train_op is not None
        values = self._values(model, latest_checkpoint(self.model_dir))
        step = global_step_of(values)
        executor, figures, lag = self._executor(model, values, step=step)
        writer = CheckpointWriter(
            self.model_dir, model.graph.graph, keep_max=self.config.keep_checkpoint_max
        )
        train_op = model.train_op

        def save(progress: Progress) -> Path:
            at = progress.global_step
            return writer.save(
                at, variable_values(executor.state(), values, train_op, step=at, lag=lag)
            )

        with ExitStack() as stack:
            stack.callback(executor.close)
            stop = stack.enter_context(StopRequest())
            source = stack.enter_context(self._source(input_fn, tf.estimator.ModeKeys.TRAIN))
            tools = self._train_tools(stack, stop, model.metrics, hooks, step, save)
            result = train(
                executor,
                source,
                run=self._run_config(steps=steps, max_steps=max_steps),
                learning_rate_at=train_op.learning_rate_at,
                tools=tools,
                start=Progress(global_step=step, origin_step=step),
            )
        self._report(result, tools.reporter, figures)
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
        reporter = Reporter(device=self._device().type, with_rates=True)
        stack.callback(reporter.close)
        recorder = TrainRecorder(self.model_dir, start_step=step)
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
            write_performance(self.model_dir, measured, figures)
            reporter.train_finished(
                total_samples=measured.total_samples, total_seconds=measured.total_seconds
            )
        if result.last_loss is not None:
            _log.info("Loss for final step: %g.", result.last_loss)

    def _run_config(
        self,
        *,
        steps: int | None = None,
        max_steps: int | None = None,
        eval_steps: int | None = None,
    ) -> RunConfig:
        config = self.config
        return RunConfig(
            max_steps=max_steps,
            num_steps=steps,
            eval_steps=eval_steps,
            log_steps=config.log_step_count_steps or 0,
            checkpoint_steps=config.save_checkpoints_steps or _ONLY_AT_THE_END,
            save_initial_checkpoint=True,
            seed=self._seed(),
            model_dir=self.model_dir,
            cs_ip=config.cs_ip,
        )

    def evaluate(
        self, input_fn: InputFn, *, steps: int | None, checkpoint: str | None, name: str | None
    ) -> dict[str, Any]:
        """Loss and metrics of a checkpoint (None: the newest), as the Estimator gives them."""
        mode = tf.estimator.ModeKeys.EVAL
        model = self._model(input_fn, mode)
        values = self._values(model, self._checkpoint(checkpoint))
        step = global_step_of(values)
        executor, _, _ = self._executor(model, values, step=step)
        with ExitStack() as stack:
            stack.callback(executor.close)
            reporter = Reporter(device=self._device().type, with_rates=True)
            stack.callback(reporter.close)
            tools = EvalTools(
                reporter=reporter,
                meter=Meter(),
                hooks=Hooks(),
                metrics=model.metrics.functions(),
                stop=stack.enter_context(StopRequest()),
            )
            source = stack.enter_context(self._source(input_fn, mode))
            run = self._run_config(eval_steps=steps)
            result = evaluate(executor, source, run=run, step=step, tools=tools)
            reporter.evaluated(avg_loss=result.avg_loss, metrics=result.metrics)
            folder = self.model_dir / name if name else self.model_dir
            recorder = EvalRecorder(folder)
            stack.callback(recorder.close)
            recorder.log_evaluation(step, avg_eval_loss=result.avg_loss, metrics=result.metrics)
        found = {key: np.float32(value) for key, value in result.metrics.items()}
        return {**found, "loss": np.float32(result.avg_loss), "global_step": step}

    def predict(
        self, input_fn: InputFn, *, checkpoint: str | None, num_samples: int | None = None
    ) -> Generator[dict[str, Array]]:
        """The predictions of one batch after the other."""
        mode = tf.estimator.ModeKeys.PREDICT
        model = self._model(input_fn, mode)
        values = self._values(model, self._checkpoint(checkpoint))
        step = global_step_of(values)
        executor, _, _ = self._executor(model, values, step=step)
        key, seen = model.metrics.receiver.name, 0
        with ExitStack() as stack:
            stack.callback(executor.close)
            source = stack.enter_context(self._source(input_fn, mode))
            for batch in source.epoch(0):
                (tensors,) = executor.eval_step(batch, step=step).metrics[key]
                arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
                yield dict(zip(model.predicted, arrays, strict=True))
                seen += len(arrays[0])
                if num_samples is not None and seen >= num_samples:
                    return

    def _checkpoint(self, given: str | None) -> str:
        found = given or latest_checkpoint(self.model_dir)
        if found is None:
            raise ConfigError(
                "there is no trained model",
                where=str(self.model_dir),
                allowed="a folder with model.ckpt-<step>, or checkpoint_path",
                hint="train first, with the same model_dir",
            )
        return found

"""The user's model and data, and the plan that is made of them: what a run runs.

Decides in which order they are built, how batches are split into microbatches, which execution mode
is planned, and what the executor is told of the run's parameters. Does not decide what is done with
them (run.py).
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from openwafer.config.params import Params
from openwafer.config.runconfig import RunConfig
from openwafer.errors import PlanError
from openwafer.frontends.torch.capture import Captured, capture_step
from openwafer.frontends.torch.session import RunRules, choose_device
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.frontends.torch.user_code import (
    Functions,
    Mode,
    build_model,
    first_batch,
    make_sequence,
)
from openwafer.frontends.torch.weights_in_files import WeightsInFiles
from openwafer.graph.program import Program
from openwafer.kernels.kernel import ExecutionMode
from openwafer.machine.spec import load_machine
from openwafer.optim.schedule import learning_rate_at
from openwafer.pipeline import CompiledProgram, choose_mode, compile_program
from openwafer.runtime.executor import Batch
from openwafer.runtime.microbatches import split_batch
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stages.layout import choose_split
from openwafer.streaming import tasks
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.shard import Shard
from openwafer.train.evaluation import samples_in

__all__ = ["PreparedModel", "compile_captured", "compile_model", "grad_accum_steps"]

_log = logging.getLogger("openwafer")


class PreparedModel:
    """The user's model and what is made of it, each part when it is first asked for."""

    def __init__(self, params: Params, functions: Functions) -> None:
        self.params, self.functions = params, functions
        config = params.runconfig
        self.device = choose_device(config.device, cpu=config.cpu)
        self.sequences = {mode: self._local(mode) for mode in self.modes}
        self.examples = {mode: first_batch(self.sequences[mode], mode) for mode in self.modes}
        self.num_parts = _num_parts(params, self.examples.get("train"))
        if "train" in self.examples:
            self.examples["train"] = split_batch(self.examples["train"], self.num_parts)[0]
        torch.manual_seed(config.seed)
        with _weights_in_files(config):
            self.base = build_model(functions.model, params, self.device)

    @property
    def modes(self) -> tuple[Mode, ...]:
        mode = self.params.runconfig.mode
        if mode == "train_and_eval":
            return ("train", "eval")
        return ("eval",) if mode == "eval_all" else (mode,)

    def _local(self, mode: Mode) -> BatchSequence:
        return make_sequence(self.params, self.functions, mode, Shard(0, 1))

    def rules(self, group: ComputeGroup | None = None) -> RunRules:
        params, config = self.params, self.params.runconfig
        optimizer = params.optimizer if config.trains else None
        schedule = optimizer.learning_rate if optimizer else None
        return RunRules(
            optimizer=optimizer,
            learning_rate_at=lambda step: learning_rate_at(schedule, step) if schedule else 0.0,
            device=group.device if group is not None else self.device,
            seed=config.seed,
            compute_dtype=params.compute_dtype,
            layer_compiler=config.layer_compiler,
            streaming=StreamingRules(
                weight_store=config.weight_store,
                device_memory_bytes=config.device_memory_bytes,
                activations=config.activations,
                num_microbatches=(
                    grad_accum_steps(params) * self.num_parts // config.streaming_replicas
                ),
            ),
            guard_loss=config.check_loss_values,
            num_stages=config.num_stages,
            num_replicas=config.pipeline_replicas,
            pipeline_schedule=config.pipeline_schedule,
        )

    def execution_mode(self, program: Program) -> ExecutionMode:
        config = self.params.runconfig
        if config.num_csx > 1:
            return "weight_streaming"
        if config.num_compute > 1:
            return "layer_pipelined"
        return choose_mode(config.execution_mode, program, self.device)

    def capture(self, mode: Mode) -> Captured:
        return capture_step(
            self.base.modules(),
            self.base,
            self.examples[mode],
            training=mode == "train",
            name=self.base.display_name(),
            autocast_dtype=self.rules().autocast_dtype,
        )


def _weights_in_files(config: RunConfig) -> AbstractContextManager[Any]:
    """Where little of a model is to stay in memory, it is built in files: where a store on disk
    takes its weights, and in a process that keeps only its own stages of them."""
    folder = StreamingRules(weight_store=config.weight_store).folder
    streams = config.use_cs and config.execution_mode != "layer_pipelined"
    if streams and folder and folder.is_dir():
        return WeightsInFiles(folder)
    if config.num_stages > 1 and tasks.current().role == "peer":
        above = config.model_dir.absolute()
        return WeightsInFiles(next(path for path in (above, *above.parents) if path.is_dir()))
    return nullcontext()


def _num_parts(params: Params, example: Batch | None) -> int:
    """Into how many microbatches each training batch is split."""
    config = params.runconfig
    num_replicas = config.pipeline_replicas * config.streaming_replicas
    alone = config.num_stages == num_replicas == 1
    if example is None or (config.num_microbatches is None and alone):
        return 1
    return choose_split(
        asked=config.num_microbatches,
        batch_size=samples_in(example),
        batches_per_step=grad_accum_steps(params),
        num_stages=config.num_stages,
        num_replicas=num_replicas,
        schedule=config.pipeline_schedule,
    )


def compile_model(
    model: PreparedModel, *, writes: bool = True
) -> tuple[CompiledProgram, Captured | None]:
    """What is trained, or evaluated where nothing is; and what is evaluated between."""
    captured = {mode: model.capture(mode) for mode in model.modes}
    main = captured[model.modes[0]]
    compiled = compile_captured(model, main, model.execution_mode(main.program), writes=writes)
    return compiled, captured["eval"] if len(model.modes) > 1 else None


def compile_captured(
    model: PreparedModel, captured: Captured, execution_mode: ExecutionMode, *, writes: bool = True
) -> CompiledProgram:
    """The plan of one captured form, from the cache where it is there; `writes` it there.

    Raises:
        OpenWaferError: an operation has no kernel, or the model does not fit.
    """
    params, config = model.params, model.params.runconfig

    def compile_for(mode: ExecutionMode) -> CompiledProgram:
        return compile_program(
            captured.program,
            machine=load_machine(config.machine, config.fabric_config_file),
            execution_mode=mode,
            compile_dir=(config.compile_dir or config.model_dir) if writes else None,
            optimizer=params.optimizer if captured.program.training else None,
            compute_dtype=params.compute_dtype,
            num_stages=config.num_stages,
            num_microbatches=grad_accum_steps(params) * model.num_parts,
            num_replicas=_num_replicas(config) if captured.program.training else 1,
            num_systems=config.num_csx,
        )

    try:
        compiled = compile_for(execution_mode)
    except PlanError as error:
        decided = config.execution_mode != "auto" or config.num_compute > 1
        if decided or execution_mode == "weight_streaming":
            raise
        _log.warning("auto takes weight_streaming: %s", error.what)
        compiled = compile_for("weight_streaming")
    if compiled.from_cache:
        _log.info("Found a cached compilation for this model configuration")
    _log.info(
        "%s plan in %.2f s: %s", compiled.plan.execution_mode, compiled.seconds, compiled.directory
    )
    return compiled


def _num_replicas(config: RunConfig) -> int:
    """`multireplica` without a number lets the compiler choose (-1)."""
    return -1 if config.multireplica and config.num_replicas == 1 else config.num_replicas


def grad_accum_steps(params: Params) -> int:
    """Batches of one training step."""
    return params.optimizer.grad_accum_steps if params.optimizer else 1

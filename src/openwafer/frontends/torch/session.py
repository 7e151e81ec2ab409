"""From a captured model to an executor: the one place where the torch frontend meets the compiler.

Decides how weights and buffers are handed over, which precision is compiled in, and which executor
runs a plan. Does not decide what is in a plan or how a step runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.runconfig import PipelineSchedule
from openwafer.errors import PlanError
from openwafer.frontends.torch.capture import Captured, flatten_batch
from openwafer.frontends.torch.streaming_setup import (
    StreamingRules,
    make_weight_streaming,
    plan_memory,
)
from openwafer.frontends.torch.weights_in_files import drop_pages
from openwafer.graph.program import Program
from openwafer.pipeline import CompiledProgram
from openwafer.plan.layers import cut_layers
from openwafer.plan.plan import WeightStreamingSchedule
from openwafer.runtime.compiled import CompiledModel, compile_layers
from openwafer.runtime.executor import Executor
from openwafer.runtime.forms.inductor import LayerCompiler
from openwafer.runtime.layer_pipelined import LayerPipelined
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.replicas import (
    ReplicatedStreaming,
    refuse_changing_buffers,
    serve_replica,
)
from openwafer.runtime.stages.executor import PipelineStages, own_part, serve
from openwafer.runtime.stages.layout import PipelineLayout, lay_out, layer_cost
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder
from openwafer.runtime.weight_streaming import WeightStreaming
from openwafer.runtime.workload import Workload

__all__ = ["RunRules", "check_memory", "choose_device", "make_executor", "serve_stages"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRules:
    """What an executor needs to know besides the model. `compute_dtype` is torch's dtype name.

    streaming: how weight streaming stores weights and uses memory.
    num_stages, num_replicas, pipeline_schedule: layer pipelined over the processes of a group.
    recorder: is told what weight streaming does when.
    """

    optimizer: OptimizerConfig | None
    learning_rate_at: Callable[[int], float]
    device: torch.device
    seed: int
    compute_dtype: str = "float32"
    layer_compiler: LayerCompiler = "auto"
    streaming: StreamingRules = field(default_factory=StreamingRules)
    guard_loss: bool = True
    num_stages: int = 1
    num_replicas: int = 1
    pipeline_schedule: PipelineSchedule = "1f1b"
    recorder: Recorder = NO_RECORDER

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype == "float32" else getattr(torch, self.compute_dtype)


def choose_device(requested: str, *, cpu: bool) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        PlanError: `cuda` was asked for and there is none.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "there is no CUDA device",
            where="--device cuda",
            allowed="cpu, or auto",
            hint="check that this torch build has CUDA and that a GPU is visible",
        )
    if cpu or requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def make_executor(
    compiled: CompiledProgram,
    evaluation: Captured | None,
    modules: Mapping[str, nn.Module],
    rules: RunRules,
    group: ComputeGroup | None = None,
) -> Executor:
    """The executor for a plan, in the mode it was compiled for.

    Args:
        compiled: the program that is trained, or the evaluation one where nothing is.
        evaluation: the evaluation form of the same model, where both are needed.
        modules: as given to the capture; they hold the first weights and buffers.
        group: the processes that compute it together, of which this is the first.
    """
    workload = _workload(compiled, evaluation, modules, rules)
    schedule = compiled.plan.schedule
    if isinstance(schedule, WeightStreamingSchedule):
        executor = _streaming(workload, compiled, schedule, rules, group)
        return executor if group is None else ReplicatedStreaming(workload, executor, group)
    if group is not None:
        return PipelineStages(workload, _layout(workload, compiled, rules), group)
    return LayerPipelined(workload)


def check_memory(
    compiled: CompiledProgram, modules: Mapping[str, nn.Module], rules: RunRules
) -> None:
    """Plan the memory of a streamed step without running it.

    Raises:
        PlanError: it does not fit the budget.
    """
    schedule = compiled.plan.schedule
    if isinstance(schedule, WeightStreamingSchedule):
        workload = _workload(compiled, None, modules, rules)
        plan_memory(
            workload, compiled.layers, rules.streaming, prefetch_depth=schedule.prefetch_depth
        )


def serve_stages(
    compiled: CompiledProgram,
    evaluation: Captured | None,
    modules: Mapping[str, nn.Module],
    rules: RunRules,
    group: ComputeGroup,
) -> None:
    """What every process of a group but the first does with the same arguments as
    `make_executor`'s, until the first one closes its executor."""
    schedule = compiled.plan.schedule
    if isinstance(schedule, WeightStreamingSchedule):
        executor = _streaming(
            # Rank 0 sends the leaves of batches.
            replace(_workload(compiled, evaluation, modules, rules), leaves=_as_it_is),
            compiled,
            schedule,
            rules,
            group,
        )
        _forget_weights(modules)
        serve_replica(executor, group)
    else:
        workload = _workload(compiled, evaluation, modules, rules)
        layout = _layout(workload, compiled, rules)
        workload = own_part(workload, layout, group.rank)
        _forget_weights(modules)
        serve(workload, layout, group)


def _forget_weights(modules: Mapping[str, nn.Module]) -> None:
    """Let go of what the user's modules hold: this process has its own part of it elsewhere, and no
    user code runs here any more."""
    for module in modules.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


def _as_it_is(batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return batch


def _streaming(
    workload: Workload,
    compiled: CompiledProgram,
    schedule: WeightStreamingSchedule,
    rules: RunRules,
    group: ComputeGroup | None,
) -> WeightStreaming:
    if group is not None:
        refuse_changing_buffers(workload)
    executor = make_weight_streaming(
        workload,
        compiled.layers,
        rules.streaming,
        prefetch_depth=schedule.prefetch_depth,
        recorder=rules.recorder,
        group=group,
    )
    drop_pages(workload.weights.values())  # the store has read them
    return executor


def _layout(workload: Workload, compiled: CompiledProgram, rules: RunRules) -> PipelineLayout:
    return lay_out(
        workload.train,
        workload.evaluation,
        [layer_cost(layer) for layer in compiled.plan.layers],
        num_stages=rules.num_stages,
        num_replicas=rules.num_replicas if workload.train is not None else 1,
        schedule=rules.pipeline_schedule,
    )


def _workload(
    compiled: CompiledProgram,
    evaluation: Captured | None,
    modules: Mapping[str, nn.Module],
    rules: RunRules,
) -> Workload:
    trains = compiled.program.training
    programs = [compiled.program, *([evaluation.program] if evaluation else [])]
    model = _compile(compiled.program, compiled, rules)
    other = _compile(evaluation.program, None, rules) if evaluation else None
    state = _named_tensors(modules)
    main = compiled.program
    return Workload(
        train=model if trains else None,
        evaluation=other if trains else model,
        weights={p.name: state[p.name] for p in main.parameters},
        buffers=_buffers(programs, state),
        trained=tuple(p.name for p in main.parameters if p.trainable) if trains else (),
        optimizer=rules.optimizer if trains else None,
        learning_rate_at=rules.learning_rate_at,
        leaves=flatten_batch,
        device=rules.device,
        seed=rules.seed,
        guard_loss=rules.guard_loss,
    )


def _compile(program: Program, compiled: CompiledProgram | None, rules: RunRules) -> CompiledModel:
    """The casts of mixed precision are in the Program already: it was captured with them."""
    layers = compiled.layers if compiled else cut_layers(program)
    return compile_layers(program, layers, device=rules.device, layer_compiler=rules.layer_compiler)


def _named_tensors(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Weights and buffers by the names that a Program uses: the first module's without a prefix."""
    tensors: dict[str, torch.Tensor] = {}
    for index, (key, module) in enumerate(modules.items()):
        prefix = "" if index == 0 else f"{key}."
        buffers = module.named_buffers(remove_duplicate=False)
        for name, tensor in [*module.named_parameters(), *buffers]:
            tensors[prefix + name] = tensor.detach()
    return tensors


def _buffers(
    programs: Sequence[Program], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Buffers and lifted constants by placeholder node."""
    found: dict[str, torch.Tensor] = {}
    for program in programs:
        for buffer in program.buffers:
            value = state[buffer.name] if buffer.name else buffer.value
            assert value is not None, "a constant has its value"
            found[buffer.node] = value.clone()
    return found

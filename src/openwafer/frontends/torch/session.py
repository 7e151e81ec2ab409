"""From a captured model to an executor: the one place where the torch frontend meets the compiler.

Decides how weights and buffers are handed over, which precision is compiled in, and which executor
runs a plan. Does not decide what is in a plan or how a step runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import PlanError
from openwafer.frontends.torch.capture import Captured, flatten_batch
from openwafer.graph.program import Program
from openwafer.pipeline import CompiledProgram
from openwafer.plan.layers import cut_layers
from openwafer.plan.plan import WeightStreamingSchedule
from openwafer.runtime.compiled import CompiledModel, compile_layers
from openwafer.runtime.disk_store import DiskStore
from openwafer.runtime.executor import Executor
from openwafer.runtime.layer_pipelined import LayerPipelined
from openwafer.runtime.store import RamStore, Shard, WeightStore, make_shards
from openwafer.runtime.weight_streaming import WeightStreaming
from openwafer.runtime.workload import Workload

__all__ = ["RunRules", "choose_device", "make_executor"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRules:
    """What an executor needs to know besides the model. `compute_dtype` is torch's dtype name."""

    optimizer: OptimizerConfig | None
    learning_rate_at: Callable[[int], float]
    device: torch.device
    seed: int
    compute_dtype: str = "float32"
    weight_store: str = "ram"
    guard_loss: bool = True

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
) -> Executor:
    """The executor for a plan, in the mode it was compiled for.

    Args:
        compiled: the program that is trained, or the evaluation one where nothing is.
        evaluation: the evaluation form of the same model, where both are needed.
        modules: as given to the capture; they hold the first weights and buffers.
    """
    trains = compiled.program.training
    programs = [compiled.program, *([evaluation.program] if evaluation else [])]
    model = _compile(compiled.program, compiled, rules)
    other = _compile(evaluation.program, None, rules) if evaluation else None
    state = _named_tensors(modules)
    main = compiled.program
    workload = Workload(
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
    schedule = compiled.plan.schedule
    if isinstance(schedule, WeightStreamingSchedule):
        shards = make_shards(compiled.layers, list(workload.weights), workload.trained)
        store = _store(workload, shards, rules.weight_store)
        return WeightStreaming(workload, store, shards, prefetch_depth=schedule.prefetch_depth)
    return LayerPipelined(workload)


def _compile(program: Program, compiled: CompiledProgram | None, rules: RunRules) -> CompiledModel:
    """The casts of mixed precision are in the Program already: it was captured with them."""
    layers = compiled.layers if compiled else cut_layers(program)
    return compile_layers(program, layers, device=rules.device)


def _store(workload: Workload, shards: Sequence[Shard], where: str) -> WeightStore:
    if where == "ram":
        return RamStore(workload.weights, shards, workload.optimizer)
    folder = Path(where.removeprefix("disk:"))
    return DiskStore(workload.weights, shards, workload.optimizer, folder)


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

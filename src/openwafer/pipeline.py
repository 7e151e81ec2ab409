"""The whole compiler on one page: from a Program to a Plan.

Decides the order of the stages, each a function between frozen values. What a stage does is in its
room: matching in kernels/, cutting and estimating in plan/. Ends where execution begins (runtime/).

    Program ── validate: every operation has a kernel, or a report of those that have none
       │
       └────── compile: layers → matched kernels → plan for the machine, cached by content
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import openwafer.plan.artifacts as artifacts
from openwafer.config.optimizer import OptimizerConfig
from openwafer.graph.program import Program
from openwafer.graph.text import program_text
from openwafer.kernels.kernel import ExecutionMode, OptimizerCost
from openwafer.machine.spec import Machine
from openwafer.optim.build import build_optimizer
from openwafer.plan.layers import Layer, cut_layers
from openwafer.plan.plan import Plan, build_plan
from openwafer.plan.validation import ValidationReport, validation_report

__all__ = ["CompiledProgram", "auto_mode", "choose_mode", "compile_program", "validate_program"]

_log = logging.getLogger("openwafer")

PIPELINED_MAX_PARAMETERS = 1_000_000_000
"""Largest model for layer pipelined execution (CS-2 software 1.6 documentation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """A Program with its plan. `directory` holds the artifacts; None where none were written."""

    program: Program
    layers: tuple[Layer, ...]
    plan: Plan
    directory: Path | None
    from_cache: bool
    seconds: float


def validate_program(program: Program, execution_mode: ExecutionMode) -> ValidationReport:
    """Match every operation with a kernel. Where `--validate_only` stops."""
    return validation_report(program, execution_mode)


def compile_program(
    program: Program,
    *,
    machine: Machine,
    execution_mode: ExecutionMode,
    compile_dir: Path | None,
    optimizer: OptimizerConfig | None = None,
    compute_dtype: str = "float32",
    num_stages: int = 1,
    num_microbatches: int = 1,
    prefetch_depth: int = 1,
    num_replicas: int = 1,
    num_systems: int = 1,
) -> CompiledProgram:
    """Plan a Program for a machine, or read the plan from the cache. Where `--compile_only` stops.

    Args:
        compile_dir: where `cs_<hash>/` is looked for and written; None uses no files.
        num_stages: layer pipelined: processes that share the layers out.
        num_replicas: layer pipelined: copies of the model on the floor; -1 chooses.
        num_systems: weight streaming: systems that share the batch.

    Raises:
        UnsupportedOpError: some operation has no kernel; it lists all of them.
        PlanError: the model does not fit the machine, or the plan cannot be written.
    """
    began = time.perf_counter()
    layers = cut_layers(program)
    optimizer_cost = _optimizer_cost(optimizer)
    options = {
        "execution_mode": execution_mode,
        "compute_dtype": compute_dtype,
        "num_stages": num_stages,
        "num_microbatches": num_microbatches,
        "prefetch_depth": prefetch_depth,
        "num_replicas": num_replicas,
        "num_systems": num_systems,
        # What it keeps for a weight depends on more than its type: momentum, amsgrad, ...
        "optimizer": asdict(optimizer_cost),
        "layers": [layer.structure for layer in layers],
    }
    key = artifacts.plan_key(program_text(program), machine, options)
    plan = artifacts.find_plan(compile_dir, key) if compile_dir else None
    from_cache = plan is not None
    if plan is None:
        plan = build_plan(
            program,
            layers,
            validation_report(program, execution_mode).raise_if_refused(),
            machine,
            plan_hash=key,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            prefetch_depth=prefetch_depth,
            optimizer=optimizer_cost,
            num_replicas=num_replicas,
            num_systems=num_systems,
        )
    directory = None
    if compile_dir:
        directory = artifacts.plan_dir(compile_dir, key)
        if not from_cache:
            directory = artifacts.write_plan(plan, compile_dir)
    return CompiledProgram(
        program=program,
        layers=layers,
        plan=plan,
        directory=directory,
        from_cache=from_cache,
        seconds=time.perf_counter() - began,
    )


def choose_mode(
    requested: Literal["auto", "layer_pipelined", "weight_streaming"],
    program: Program,
    device: torch.device,
) -> ExecutionMode:
    """What was requested, or what `auto` takes for the program."""
    return auto_mode(program.num_parameters, device) if requested == "auto" else requested


def auto_mode(num_parameters: int, device: torch.device) -> ExecutionMode:
    """The documented rule for `auto`: layer pipelined below a billion parameters if weights,
    gradients and optimizer state (16 bytes a parameter) fit the device, else weight streaming."""
    if num_parameters >= PIPELINED_MAX_PARAMETERS:
        return "weight_streaming"
    needed_bytes = 16 * num_parameters
    return "layer_pipelined" if needed_bytes < _free_bytes(device) else "weight_streaming"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _optimizer_cost(config: OptimizerConfig | None) -> OptimizerCost:
    """State and work per weight: what the optimizer really keeps for a matrix of weights."""
    if config is None:
        return OptimizerCost(name="none", state_bytes_per_parameter=0, ops_per_parameter=0)
    probe = torch.empty(64, 64, device="meta")
    state = build_optimizer(config, {"weight": probe}).state[probe]
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    return OptimizerCost(
        name=config.optimizer_type,
        state_bytes_per_parameter=round(held / probe.numel()),
        ops_per_parameter=2 + 4 * len(tensors),
    )

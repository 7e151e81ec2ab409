"""`openwafer.validate` and `openwafer.compile`: from Python what the flags do.

Decides the two functions' arguments and defaults. Does not decide what validating or compiling is
(pipeline.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from openwafer.errors import ConfigError, nearest
from openwafer.frontends.torch.capture import capture_module
from openwafer.graph.program import Program
from openwafer.machine.spec import load_machine
from openwafer.pipeline import choose_mode, compile_program, validate_program
from openwafer.plan.plan import Plan
from openwafer.plan.validation import ValidationReport

__all__ = ["compile", "validate"]

RequestedMode = Literal["auto", "layer_pipelined", "weight_streaming"]
ComputeDtype = torch.dtype | Literal["auto"] | None
_MODES = ("auto", "layer_pipelined", "weight_streaming")


def validate(
    model: nn.Module,
    example_batch: Any,
    *,
    execution_mode: RequestedMode = "auto",
    training: bool = True,
    compute_dtype: ComputeDtype = "auto",
) -> ValidationReport:
    """Say which kernels a model runs on, and explain every operation that has none.

    Args:
        model: any module. It is called as `model(**example_batch)` for a dict,
            `model(*example_batch)` for a tuple or list, else `model(example_batch)`; the loss is
            the scalar returned, its `.loss` or `["loss"]`, or the first item.
        example_batch: shapes and dtypes count, values do not.
        training: match the training form (dropout, batch statistics) or the evaluation form.
        compute_dtype: what torch.autocast computes in; None for no mixed precision. "auto" is the
            model's attribute `compute_dtype`, which models of the zoo have, else None.

    Returns:
        A report with `.ok`, `.coverage`, `.kernels`, `.refusals`; `print(report)` explains.

    Raises:
        CaptureError: the model cannot be captured as a static graph.
    """
    program = _capture(model, example_batch, execution_mode, training, compute_dtype)
    return validate_program(program, choose_mode(execution_mode, program, torch.device("cpu")))


def compile(
    model: nn.Module,
    example_batch: Any,
    *,
    execution_mode: RequestedMode = "auto",
    machine: str = "wse2",
    batch_size: int | None = None,
    training: bool = True,
    compile_dir: str | Path | None = None,
    compute_dtype: ComputeDtype = "auto",
) -> Plan:
    """Plan a model for a machine; see `validate` for `model`, `example_batch` and `compute_dtype`.

    Args:
        machine: a machine's name, or the path of a specification.
        batch_size: plan for this many samples instead of the example's: every tensor whose first
            dimension is the example's batch size is taken with this one.
        compile_dir: cache the plan there, in `cs_<hash>/`; None writes nothing.

    Raises:
        CaptureError: the model cannot be captured.
        UnsupportedOpError: operations without a kernel, all of them.
        PlanError: the model does not fit the machine.
        ConfigError: unknown machine or mode, or a wrong batch size.
    """
    batch = example_batch if batch_size is None else _resized(example_batch, batch_size)
    program = _capture(model, batch, execution_mode, training, compute_dtype)
    return compile_program(
        program,
        machine=load_machine(machine),
        execution_mode=choose_mode(execution_mode, program, torch.device("cpu")),
        compile_dir=Path(compile_dir) if compile_dir else None,
    ).plan


def _capture(
    model: nn.Module,
    batch: Any,
    execution_mode: str,
    training: bool,
    compute_dtype: ComputeDtype,
) -> Program:
    if execution_mode not in _MODES:
        raise ConfigError(
            f"unknown execution_mode {execution_mode!r}",
            allowed=", ".join(_MODES),
            hint=nearest(execution_mode, _MODES),
        )
    if compute_dtype == "auto":
        compute_dtype = getattr(model, "compute_dtype", None)
    if compute_dtype not in (None, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"compute_dtype is {compute_dtype!r}",
            allowed='torch.bfloat16, torch.float16, None, or "auto"',
        )
    return capture_module(model, batch, training=training, autocast_dtype=compute_dtype).program


def _resized(batch: Any, batch_size: int) -> Any:
    """The batch with another number of samples; contents repeat, only shapes count."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}", allowed="a positive number")
    leaves = [t for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]
    current = next((t.shape[0] for t in leaves if t.dim()), None)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != current:
            return leaf
        return leaf[:1].expand(batch_size, *leaf.shape[1:]).contiguous()

    return pytree.tree_map(resize, batch)

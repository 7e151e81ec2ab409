"""What the runtime is compared with, and how its parts are put together for a test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openwafer.frontends.torch.capture import capture_module, extract_loss, flatten_batch
from openwafer.graph.program import Program
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import CompiledModel, compile_layers
from openwafer.runtime.randomness import DrawKey, KeyedDraws

__all__ = ["KEY", "Outcome", "buffers_of", "call_of", "compiled_outcome", "eager_outcome"]

KEY = DrawKey(seed=3, step=5, microbatch=0, ordinal=0)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """Loss, gradients by weight (None where there is none), buffers after the forward pass."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def call_of(model: nn.Module) -> Callable[[Any], Any]:
    """`model(**batch)` or `model(*batch)`, as capture_module calls it."""

    def call(batch: Any) -> Any:
        return model(**batch) if isinstance(batch, Mapping) else model(*batch)

    return call


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def eager_outcome(
    model: nn.Module, batch: Any, *, training: bool = True, dtype: torch.dtype | None = None
) -> Outcome:
    """Eager PyTorch with autograd; dropout drawn by KEY."""
    model = copy.deepcopy(model).train(training)
    with KeyedDraws(KEY), _autocast(dtype):
        loss = extract_loss(call_of(model)(batch)).reshape(())
    if training:
        loss.backward()
    return Outcome(
        loss.detach(),
        {name: weight.grad for name, weight in model.named_parameters()},
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
    )


def buffers_of(model: nn.Module, *programs: Program) -> dict[str, torch.Tensor]:
    """First values of buffers and constants, by node."""
    held = dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, torch.Tensor] = {}
    for program in programs:
        for buffer in program.buffers:
            value = held[buffer.name] if buffer.name else buffer.value
            assert value is not None
            found[buffer.node] = value.detach().clone()
    return found


def compiled_model(
    model: nn.Module, batch: Any, *, training: bool = True, dtype: torch.dtype | None = None
) -> CompiledModel:
    program = capture_module(model, batch, training=training, autocast_dtype=dtype).program
    return compile_layers(program, cut_layers(program))


def compiled_outcome(
    model: nn.Module,
    batch: Any,
    *,
    training: bool = True,
    dtype: torch.dtype | None = None,
    compiled: CompiledModel | None = None,
) -> Outcome:
    """Layer by layer. Between forward and backward every weight is overwritten with NaN, and the
    backward pass gets fresh copies: what it kept of the old memory would show."""
    model = copy.deepcopy(model)
    compiled = compiled or compiled_model(model, batch, training=training, dtype=dtype)
    program = compiled.program
    fresh = {name: weight.detach() for name, weight in model.named_parameters()}
    used = {name: weight.clone() for name, weight in fresh.items()}
    buffers = buffers_of(model, program)
    values = compiled.feed(flatten_batch(batch), CPU)
    saved = [
        layer.forward(KEY, [used[name] for name in layer.layer.parameters], buffers, values)
        for layer in compiled.layers
    ]
    loss = values[program.loss].clone()
    for weight in used.values():
        weight.fill_(float("nan"))
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(fresh)
    flowing = compiled.seed_gradients(values, 1.0) if training else {}
    for layer in reversed(compiled.layers) if training else ():
        names = layer.layer.parameters
        weights = [fresh[name].clone() for name in names]
        found = layer.backward(weights, saved.pop(), flowing)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                held = gradients[name]
                gradients[name] = gradient if held is None else held + gradient
    assert not flowing, "a gradient that no layer takes"
    named = {b.name: buffers[b.node] for b in program.buffers if b.name}
    return Outcome(loss, gradients, named)

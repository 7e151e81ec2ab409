"""Runs what a kernel matched by the runtime's layer functions, and the same by eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from openwafer.frontends.torch.capture import capture_module
from openwafer.graph.program import Program
from openwafer.kernels import KernelGraph, match
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import compile_layers
from openwafer.runtime.randomness import DrawKey, KeyedDraws

__all__ = ["Small", "check_against_eager", "floats", "kernel_names"]

KEY = DrawKey(1, 2, 3, 0)


class Small(nn.Module):
    """A function of tensors as a model: float arguments are its weights, the others its batch."""

    def __init__(self, function: Callable[..., Any], *arguments: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.is_weight = [a.is_floating_point() for a in arguments]
        self.weights = nn.ParameterList(a for a in arguments if a.is_floating_point())
        self.batch = tuple(a for a in arguments if not a.is_floating_point())

    def forward(self, _first: torch.Tensor, *batch: torch.Tensor) -> torch.Tensor:
        weights, rest = iter(self.weights), iter(batch)
        arguments = [next(weights) if w else next(rest) for w in self.is_weight]
        results = self.function(*arguments)
        if isinstance(results, torch.Tensor):
            results = (results,)
        total = torch.zeros(())
        for result in results:
            factors = torch.linspace(0.5, 1.5, result.numel()).view(result.shape)
            total = total + (result.to(torch.float32) * factors).sum()
        return total


_OWN = {"constant", "view", "mul", "add", "sum", "cast"}
"""What `Small.forward` itself adds."""


def floats(*shape: int, dtype: torch.dtype = torch.float32, low: float = -1.0) -> torch.Tensor:
    """Numbers between `low` and 1, the same every time."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (low + (1.0 - low) * torch.rand(shape, generator=generator)).to(dtype)


def kernel_names(graph: KernelGraph, *, own: bool = False) -> set[str]:
    """Names of the kernels that lie, without those that `Small` adds itself."""
    names = {m.kernel.name for m in graph.matches}
    return names if own else names - _OWN


def check_against_eager(
    function: Callable[..., Any],
    *arguments: torch.Tensor,
    training: bool = True,
    tolerance: float = 2e-5,
) -> KernelGraph:
    """Match, run forward and backward by the layer functions, compare; gives what was matched.

    `tolerance` is relative to the largest element of each gradient.
    """
    model = Small(function, *arguments).train(training)
    batch = (torch.zeros(2), *model.batch)
    program = capture_module(model, batch, training=training).program
    graph = match(program)
    loss, gradients = _run(program, dict(model.named_parameters()), batch)
    with KeyedDraws(KEY):
        expected = model(*batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=tolerance)
    if training and expected.requires_grad:
        expected.backward()
    for name, weight in model.named_parameters():
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        given = gradients.get(name)
        given = torch.zeros_like(weight) if given is None else given
        largest = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 0
        near = tolerance * (1 + float(largest))
        torch.testing.assert_close(given, wanted, rtol=tolerance, atol=near, equal_nan=True)
    return graph


def _run(
    program: Program, weights: Mapping[str, torch.Tensor], batch: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    compiled = compile_layers(program, cut_layers(program))
    values = compiled.feed({f"[{i}]": t for i, t in enumerate(batch)}, torch.device("cpu"))
    constants = {b.node: b.value for b in program.buffers if b.value is not None}
    held = {name: weight.detach() for name, weight in weights.items()}
    saved = []
    for layer in compiled.layers:
        read = [held[name] for name in layer.layer.parameters]
        saved.append(layer.forward(KEY, read, dict(constants), values))
    gradients = compiled.seed_gradients(values, 1.0)
    found: dict[str, torch.Tensor] = {}
    for layer, kept in zip(reversed(compiled.layers), reversed(saved), strict=True):
        read = [held[name] for name in layer.layer.parameters]
        grads = layer.backward(read, kept, gradients) if program.training else []
        for name, grad in zip(layer.layer.parameters, grads, strict=False):
            if grad is not None:
                wide = grad.to(held[name].dtype)
                found[name] = found[name] + wide if name in found else wide
    return values[program.loss], found

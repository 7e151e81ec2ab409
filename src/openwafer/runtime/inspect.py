"""Where a value that is not finite first appears.

Decides how a NaN loss is traced to a layer: the forward pass is run again, layer by layer, with the
same weights and random draws. Does not decide whether the run stops (train/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from openwafer.runtime.compiled import CompiledLayer, CompiledModel
from openwafer.runtime.executor import Batch
from openwafer.runtime.workload import Workload

__all__ = ["first_nonfinite", "nonfinite_loss"]


def nonfinite_loss(loss: torch.Tensor) -> bool:
    return not bool(torch.isfinite(loss))


def first_nonfinite(
    workload: Workload,
    model: CompiledModel,
    microbatches: Sequence[Batch],
    step: int,
    weights_of: Callable[[Sequence[str]], list[torch.Tensor]],
    buffers: dict[str, torch.Tensor],
) -> str:
    """One sentence: the first input, weight or layer output with a NaN or infinity in it.

    `model` is the form, for training or evaluation, that the value was computed by.
    """
    for index, batch in enumerate(microbatches):
        values = model.feed(workload.leaves(batch), workload.device)
        for entry in model.program.inputs:
            bad = _bad(values[entry.node])
            if bad:
                return f"the batch itself: entry {entry.path} of microbatch {index} has {bad}"
        for compiled in model.layers:
            weights = weights_of(compiled.layer.parameters)
            for name, weight in zip(compiled.layer.parameters, weights, strict=True):
                if _bad(weight):
                    return f"weight {name} has {_bad(weight)} before the step"
            found = _run_and_look(workload, compiled, weights, buffers, values, (step, index))
            if found:
                return found
    return "no layer's output: the loss became finite when it was computed again"


def _run_and_look(
    workload: Workload,
    compiled: CompiledLayer,
    weights: list[torch.Tensor],
    buffers: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    when: tuple[int, int],
) -> str:
    compiled.forward(workload.key(*when), weights, buffers, values)
    for name in compiled.layer.outputs:
        bad = _bad(values[name]) if name in values else ""
        if bad:
            return f"layer {compiled.layer.name} ({compiled.site}): its output {name} has {bad}"
    return ""


def _bad(tensor: torch.Tensor) -> str:
    """`3 NaN and 1 infinite of 640`, or an empty string where all is finite."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return ""
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nan} NaN and {infinite} infinite values of {tensor.numel()}"

"""What a module on "meta" is traced with under autocast: fake tensors on the CPU.

Decides that autocast, which knows devices and not "meta", sees a CPU, and that nothing is allocated
for it. Does not decide how the module is traced (export.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

__all__ = ["on_a_fake_cpu"]


@contextmanager
def on_a_fake_cpu(module: nn.Module, batch: Any) -> Generator[Any]:
    """While it lasts, weights, buffers and tensors in attributes of `module` are fake tensors on
    the CPU of the same shapes, strides and types. Gives the batch as such ones too."""
    stand_in = _stand_ins()
    attributes = [vars(child) for child in module.modules()]
    tables = [
        table for held in attributes for table in (held["_parameters"], held["_buffers"], held)
    ]
    tensors: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (table, name, value)
        for table in tables
        for name, value in table.items()
        if isinstance(value, torch.Tensor)
    ]
    for table, name, value in tensors:
        table[name] = stand_in(value)
    try:
        yield pytree.tree_map_only(torch.Tensor, stand_in, batch)
    finally:
        for table, name, value in tensors:
            table[name] = value


def _stand_ins() -> Callable[[torch.Tensor], torch.Tensor]:
    """One fake tensor for each tensor, so that tied weights stay tied."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    made: dict[torch.Tensor, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        known = made.get(tensor)
        if known is None:
            with mode:
                known = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            if isinstance(tensor, nn.Parameter):
                known = nn.Parameter(known, requires_grad=tensor.requires_grad)
            made[tensor] = known
        return known

    return stand_in

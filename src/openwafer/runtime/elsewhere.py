"""Tensors whose values another process has.

Decides how such a tensor is stood in for where only its shape is needed (a state that is made ready
to be saved), and how its values are brought here when they are. Does not decide who has them or how
they travel (replica_state.py).

A stand-in is one of torch's fake tensors: shape, strides and dtype without memory. Whoever takes it
for a real one gets an error, never zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from openwafer.runtime.executor import ModelState

__all__ = ["brought", "brought_state", "bytes_of", "is_elsewhere", "stand_in"]


def stand_in(
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
    bring: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """A tensor without memory, that alone is in its storage.

    Args:
        bring: gives the bytes of the storage [num_bytes], uint8.
    """
    with _mode():
        fake = torch.empty_strided(shape, stride, dtype=dtype)
    storage: Any = fake.untyped_storage()
    storage.bring = bring  # the storage is what views and detached copies of the tensor share
    return fake


def is_elsewhere(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of a stand-in: all bytes of its storage [num_bytes], uint8, brought here."""
    storage: Any = tensor.untyped_storage()
    found: torch.Tensor = storage.bring()
    assert found.numel() == storage.nbytes()
    return found


def brought(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what it stands in for, in memory of its own."""
    if not is_elsewhere(tensor):
        return tensor
    flat = bytes_of(tensor).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def brought_state(state: ModelState) -> ModelState:
    """The whole state here; tied weights stay one tensor."""
    model = {id(tensor): brought(tensor) for tensor in state.model.values()}
    return ModelState(
        model={name: model[id(tensor)] for name, tensor in state.model.items()},
        optimizer={
            name: {
                key: brought(value) if isinstance(value, torch.Tensor) else value
                for key, value in entries.items()
            }
            for name, entries in state.optimizer.items()
        },
        loss_scale=state.loss_scale,
    )


@cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode()

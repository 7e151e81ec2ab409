"""A model's outline: its modules and the shapes of its weights, at no cost.

Decides that it is on "meta" and that no initial values are drawn (on "meta" drawing changes nothing
and takes most of the time). Does not decide what it is for: counting, converting, compiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from openwafer.zoo.family import Family
from openwafer.zoo.model import ModelConfig, ZooModel

__all__ = ["outline"]


def outline(family: Family, config: ModelConfig) -> ZooModel:
    """The family's model of that configuration, on "meta"."""
    with torch.device("meta"), _WithoutInitialValues():
        return family.model(config)


class _WithoutInitialValues(TorchFunctionMode):
    """Leaves in-place operations out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            given = [*args, *(kwargs or {}).values()]
            return next(value for value in given if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))

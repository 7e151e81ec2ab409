"""A model's outline: its modules and the shapes of its weights, at no cost.

Decides that it is on "meta" and that no initial values are drawn (on "meta" drawing changes nothing
and takes most of the time), and that equal layers are counted, not built. Does not decide what it
is for: listing, converting, compiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from openwafer.zoo.family import Family
from openwafer.zoo.model import AnyModel, ModelConfig

__all__ = ["count_parameters", "outline"]


def outline(family: Family, config: ModelConfig) -> AnyModel:
    """The family's model of that configuration, on "meta"."""
    with torch.device("meta"), _WithoutInitialValues():
        return family.model(config)


def count_parameters(family: Family, config: ModelConfig) -> int:
    """What `outline(family, config).num_parameters` is, from outlines of one and two layers: what
    `layers` sets repeats equal layers in every family of the zoo (a test compares the two)."""
    depths: dict[str, int] = {
        key: depth for key in config.SHORT.get("layers", ()) if (depth := getattr(config, key)) > 1
    }

    def count(**changes: int) -> int:
        return outline(
            family, replace(config, **{**dict.fromkeys(depths, 1), **changes})
        ).num_parameters

    shallow = count()
    return shallow + sum(
        (depth - 1) * (count(**{key: 2}) - shallow) for key, depth in depths.items()
    )


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

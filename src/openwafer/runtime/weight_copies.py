"""Resident weights as layers take them.

Decides that the copy of a weight in another dtype (mixed precision) is made once per update and not
at each use. Does not decide which layer takes which dtype (compiled.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from openwafer.runtime.compiled import CompiledLayer, StreamedWeight

__all__ = ["WeightCopies"]


class WeightCopies:
    """Weights by name, which their owner changes in place and then calls `renew`."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._copies: dict[StreamedWeight, torch.Tensor] = {}

    def taken_by(self, layer: CompiledLayer) -> list[torch.Tensor]:
        """The layer's weights, each in the dtype that it takes."""
        return [self._in_dtype(wanted) for wanted in layer.streamed]

    def _in_dtype(self, wanted: StreamedWeight) -> torch.Tensor:
        weight = self._weights[wanted.name]
        if weight.dtype == wanted.dtype:
            return weight
        if wanted not in self._copies:
            self._copies[wanted] = weight.to(wanted.dtype)
        return self._copies[wanted]

    def renew(self) -> None:
        """The weights have changed."""
        for wanted, copy in self._copies.items():
            copy.copy_(self._weights[wanted.name])

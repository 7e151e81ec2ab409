"""Tensors in nested containers: what a data loader gives, what a checkpoint holds.

Decides which containers are looked into, and in which order: mappings of any kind, lists and
tuples, in theirs. Does not decide what anyone makes of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch

__all__ = ["tensors_in"]


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings, lists and tuples, in the order in which pickle comes to
    them; one that is there twice comes twice."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast("Mapping[object, object]", value).values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in cast("list[object]", value):
            yield from tensors_in(item)

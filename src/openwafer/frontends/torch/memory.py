"""Which nodes of an exported graph may show the same memory.

Decides it from the operations' schemas, so that a node which may share counts as sharing. Does not
decide what follows from it (functional.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

__all__ = ["SharedMemory", "may_share_memory", "schema_of"]

_SILENT_VIEWS = (
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsafe_chunk.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
    torch.ops.aten.lift_fresh.default,
)
"""Operations whose results share memory with their argument although their schema is silent."""


def schema_of(target: Any) -> torch.FunctionSchema:
    """An operation's schema, which torch has no public name for."""
    return target._schema


def may_share_memory(target: OpOverload) -> bool:
    """Whether a result may be, or show, the memory of an argument."""
    return (
        target in _SILENT_VIEWS
        or torch.Tag.maybe_aliasing_or_mutating in target.tags
        or any(argument.alias_info for argument in schema_of(target).arguments)
    )


class SharedMemory:
    """Groups of nodes that may show the same memory, as the walk over a graph finds them."""

    def __init__(self, graph: Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._group: dict[Node, set[Node]] = {}

    def add(self, node: Node, sources: Iterable[Node] = ()) -> None:
        """A node of the walk, and the earlier ones whose memory it may show."""
        group = {node}
        for source in sources:
            group |= self._group[source]
        for member in group:
            self._group[member] = group

    def shared_with(self, node: Node) -> set[Node]:
        """The nodes so far, with itself, that may show the memory of `node`."""
        return self._group[node]

    def is_read_after(self, node: Node, change: Node) -> bool:
        """Whether something after `change` reads `node`."""
        return any(self._position[user] > self._position[change] for user in node.users)

"""A small language of tree patterns over fx nodes.

Decides what a pattern is and whether one lies at a node. Does not decide which pattern wins or
whether inner nodes are used elsewhere (match.py).

A pattern is anchored at its last operation and reads upwards through positional arguments:

    Op("aten.nll_loss_nd.default", Op("aten.log_softmax.int", Leaf("input")), Leaf("target"))
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

__all__ = ["Const", "Found", "Leaf", "Op", "find", "target_name"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """Any node; it stays outside the match. The same name twice must be the same node."""

    name: str


@dataclass(frozen=True, slots=True)
class Const:
    """An argument that is no node and equals `value`."""

    value: Any


@dataclass(frozen=True, slots=True, init=False)
class Op:
    """An operation with this target whose first arguments fit `args`; further ones are free."""

    target: str
    args: tuple[Leaf | Const | Op, ...]

    def __init__(self, target: str, *args: Leaf | Const | Op) -> None:
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "args", args)

    @property
    def size(self) -> int:
        """Number of operations that the pattern covers."""
        return 1 + sum(arg.size for arg in self.args if isinstance(arg, Op))


@dataclass(slots=True)
class Found:
    """A place where a pattern lies: the covered nodes and the nodes bound to its leaves."""

    nodes: list[fx.Node] = field(default_factory=list[fx.Node])
    bound: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])


def target_name(node: fx.Node) -> str:
    """The operation's name as patterns write it: `aten.relu.default`, `getitem`."""
    return "getitem" if node.target is operator.getitem else str(node.target)


def find(pattern: Op, anchor: fx.Node) -> Found | None:
    """Lay `pattern` with its last operation on `anchor`; None if it does not fit."""
    found = Found()
    return found if _lay(pattern, anchor, found) else None


def _lay(pattern: Leaf | Const | Op, value: Any, found: Found) -> bool:
    if isinstance(pattern, Const):
        # bool is an int in Python; `1 == True` must not make a pattern fit.
        return type(value) is type(pattern.value) and value == pattern.value
    if not isinstance(value, fx.Node):
        return False
    if isinstance(pattern, Leaf):
        return found.bound.setdefault(pattern.name, value) is value
    if value.op != "call_function" or target_name(value) != pattern.target:
        return False
    arguments = _positional(value)
    if len(arguments) < len(pattern.args):
        return False
    for part, argument in zip(pattern.args, arguments, strict=False):
        if not _lay(part, argument, found):
            return False
    found.nodes.append(value)
    return True


def _positional(node: fx.Node) -> tuple[Any, ...]:
    """All arguments in the order of the operation's schema, those given by name too."""
    schema = getattr(node.target, "_schema", None)
    if not node.kwargs or schema is None:
        return node.args
    given: Mapping[str, Any] = node.kwargs
    arguments = list(node.args)
    for declared in schema.arguments[len(arguments) :]:
        if declared.name not in given:
            break
        arguments.append(given[declared.name])
    return tuple(arguments)

"""A small language of patterns over fx nodes.

Decides what a pattern is and whether one lies at a node. Does not decide which pattern wins or
whether inner nodes are used elsewhere (match.py).

A pattern is anchored at its last operation and reads upwards through positional arguments:

    Op("aten.nll_loss_nd.default", Op("aten.log_softmax.int", Leaf("input")), Leaf("target"))

A target without its overload (`aten.add`) stands for all overloads; several targets are separated
by spaces. `Either` tries parts in turn, `Wrapped` allows links such as views and masks around a
part, and an `Op` that `commutes` takes its first two arguments in either order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from torch import fx

__all__ = [
    "ANY",
    "HOLE",
    "Const",
    "Either",
    "Found",
    "Leaf",
    "Number",
    "Op",
    "Pattern",
    "Seq",
    "Wrapped",
    "find",
    "op_stem",
    "target_name",
]

_MAX_STEPS = 400
"""How many comparisons one attempt may take. The largest kernel of the library lies in under a
hundred; the limit keeps matching linear in the size of the graph, whatever the graph."""

_CONST_TOLERANCE = 1e-3
"""People write sqrt(2 / pi) as 0.79788456 or 0.7978; it is the same formula."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Any node; it stays outside the match. The same name twice must be the same node.

    Without a name: anything at all, a number or a list too, and nothing is remembered.
    """

    name: str = ""


ANY = Leaf()
HOLE = Leaf("(the wrapped part)")


@dataclass(frozen=True, slots=True)
class Const:
    """An argument that is no node and equals `value` (fractions: to a thousandth)."""

    value: Any


@dataclass(frozen=True, slots=True)
class Number:
    """A number, as such or as a tensor of one element."""


@dataclass(frozen=True, slots=True)
class Seq:
    """A list argument with exactly these items."""

    items: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """The first of `parts` that lies."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Wrapped:
    """`inner`, inside any number of `links`: operations with `HOLE` for what they wrap."""

    inner: Pattern
    links: tuple[Op, ...]
    filled: tuple[Op, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "filled", tuple(_fill(link, self) for link in self.links))


@dataclass(frozen=True, slots=True, init=False)
class Op:
    """An operation with this target whose first arguments fit `args`; further ones are free."""

    target: str
    args: tuple[Pattern, ...]
    commutes: bool

    def __init__(self, target: str, *args: Pattern, commutes: bool = False) -> None:
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "commutes", commutes)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.target.split())

    @property
    def size(self) -> int:
        """Number of operations that the pattern covers at least, links left out."""
        return _size(self)


Pattern: TypeAlias = Leaf | Const | Number | Seq | Either | Wrapped | Op


def _size(pattern: Pattern) -> int:
    if isinstance(pattern, Op):
        return 1 + sum(_size(arg) for arg in pattern.args)
    if isinstance(pattern, Seq):
        return sum(_size(item) for item in pattern.items)
    if isinstance(pattern, Either):
        return min(_size(part) for part in pattern.parts)
    return _size(pattern.inner) if isinstance(pattern, Wrapped) else 0


@dataclass(slots=True)
class Found:
    """A place where a pattern lies: the covered nodes and the nodes bound to its leaves."""

    nodes: list[fx.Node] = field(default_factory=list[fx.Node])
    bound: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])
    steps: int = 0


@lru_cache(maxsize=4096)
def _name_of(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target)


def target_name(node: fx.Node) -> str:
    """The operation's name as patterns write it: `aten.relu.default`, `getitem`."""
    return _name_of(node.target)


@lru_cache(maxsize=4096)
def op_stem(name: str) -> str:
    """An operation's name without its overload: `aten.relu`."""
    return name.rsplit(".", 1)[0] if name.count(".") > 1 else name


def find(pattern: Op, anchor: fx.Node) -> Found | None:
    """Lay `pattern` with its last operation on `anchor`; None if it does not fit."""
    found = Found()
    return found if _lay(pattern, anchor, found) else None


def _lay(pattern: Pattern, value: Any, found: Found) -> bool:
    found.steps += 1
    if found.steps > _MAX_STEPS:
        return False
    if isinstance(pattern, Op):
        return _lay_op(pattern, value, found)
    if isinstance(pattern, Leaf):
        return _lay_leaf(pattern, value, found)
    if isinstance(pattern, Const):
        return _is_const(pattern.value, value)
    if isinstance(pattern, Number):
        return _is_number(value)
    if isinstance(pattern, Either):
        return any(_try(part, value, found) for part in pattern.parts)
    if isinstance(pattern, Wrapped):
        return _lay_wrapped(pattern, value, found)
    items: Any = value
    return (
        isinstance(value, (list, tuple))
        and len(items) == len(pattern.items)
        and all(_lay(part, item, found) for part, item in zip(pattern.items, items, strict=True))
    )


def _try(pattern: Pattern, value: Any, found: Found) -> bool:
    """As `_lay`, but leaves `found` as it was where the pattern does not lie."""
    num_nodes, bound = len(found.nodes), dict(found.bound)
    if _lay(pattern, value, found):
        return True
    del found.nodes[num_nodes:]
    found.bound.clear()
    found.bound.update(bound)
    return False


def _lay_leaf(leaf: Leaf, value: Any, found: Found) -> bool:
    if not leaf.name:
        return True
    return isinstance(value, fx.Node) and found.bound.setdefault(leaf.name, value) is value


def _lay_op(pattern: Op, value: Any, found: Found) -> bool:
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    if not _is_target(pattern, target_name(value)):
        return False
    arguments = _positional(value)
    if len(arguments) < len(pattern.args):
        return False
    orders: list[tuple[Any, ...]] = [arguments]
    if pattern.commutes:
        orders.append((arguments[1], arguments[0], *arguments[2:]))
    for order in orders:
        if _try(Seq(pattern.args), order[: len(pattern.args)], found):
            found.nodes.append(value)
            return True
    return False


def _lay_wrapped(pattern: Wrapped, value: Any, found: Found) -> bool:
    if _try(pattern.inner, value, found):
        return True
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    name = target_name(value)
    return any(_is_target(link, name) and _try(link, value, found) for link in pattern.filled)


def _fill(link: Op, wrapped: Wrapped) -> Op:
    """The link with the wrapped pattern itself in its hole."""

    def fill(part: Pattern) -> Pattern:
        if part is HOLE:
            return wrapped
        return _fill(part, wrapped) if isinstance(part, Op) else part

    return Op(link.target, *(fill(part) for part in link.args), commutes=link.commutes)


def _is_target(pattern: Op, name: str) -> bool:
    targets = _target_set(pattern.target)
    return name in targets or op_stem(name) in targets


@lru_cache(maxsize=4096)
def _target_set(target: str) -> frozenset[str]:
    return frozenset(target.split())


def _is_const(expected: Any, value: Any) -> bool:
    # bool is an int in Python; `1 == True` must not make a pattern fit.
    if isinstance(expected, bool) or isinstance(value, bool):
        return type(expected) is type(value) and expected == value
    if isinstance(expected, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(expected, value, rel_tol=_CONST_TOLERANCE)
    return type(value) is type(expected) and value == expected


def _is_number(value: Any) -> bool:
    if isinstance(value, fx.Node):
        shape: Iterable[int] | None = getattr(value.meta.get("val"), "shape", None)
        return shape is not None and all(extent == 1 for extent in shape)
    return isinstance(value, (int, float))


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

"""A graph as text: the form that is hashed, compared and read.

Decides the canonical spelling of nodes and arguments. Does not decide what is hashed together with
it (plan/artifacts.py) or which nodes form a layer (plan/layers.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx
from torch._ops import OpOverload

from openwafer.graph.program import Program, site_of, tensor_specs

__all__ = ["node_text", "program_text", "sha256_of"]


def sha256_of(text: str) -> str:
    """Hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def node_text(node: fx.Node, name_of: Callable[[fx.Node], str]) -> str:
    """`name = target(arguments) : specs`, with nodes spelled by `name_of`."""
    arguments = [_value_text(value, name_of) for value in node.args]
    arguments += [f"{key}={_value_text(value, name_of)}" for key, value in node.kwargs.items()]
    specs = ", ".join(map(str, tensor_specs(node.meta.get("val"))))
    return f"{name_of(node)} = {_target_text(node.target)}({', '.join(arguments)}) : {specs}"


def program_text(program: Program) -> str:
    """Everything about a Program that a plan can depend on, but for the user's line numbers."""
    lines = [f"program {program.model_name} training={program.training} n={program.num_samples}"]
    lines += [
        f"parameter {p.name} {p.node} {p.spec} trainable={p.trainable} aliases={p.aliases}"
        for p in program.parameters
    ]
    lines += [f"buffer {b.name} {b.node} {b.spec} update={b.update}" for b in program.buffers]
    lines += [f"input {i.path} {i.node} {i.spec}" for i in program.inputs]
    lines += [
        f"{node_text(node, lambda n: n.name)} @ {site_of(node).module}"
        for node in program.operations
    ]
    lines += [f"metric {m.metric} {m.nodes}" for m in program.metrics]
    lines.append(f"loss {program.loss}")
    return "\n".join(lines)


def _target_text(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def _value_text(value: Any, name_of: Callable[[fx.Node], str]) -> str:
    if isinstance(value, fx.Node):
        return name_of(value)
    if isinstance(value, (list, tuple)):
        return f"[{_join(value, name_of)}]"
    return repr(value)


def _join(values: Iterable[Any], name_of: Callable[[fx.Node], str]) -> str:
    return ", ".join(_value_text(value, name_of) for value in values)

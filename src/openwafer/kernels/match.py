"""Which kernel covers which operation.

Decides the order in which kernels are tried (larger patterns first), that every operation is
covered exactly once, and that a gradient can pass wherever one must. Does not decide costs or
places, nor how a refusal is explained (refusal.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from openwafer.errors import UnsupportedOpError
from openwafer.graph.program import Parameter, Program, site_of
from openwafer.kernels.facts import GraphFacts, constant_nodes, graph_facts
from openwafer.kernels.kernel import Candidate, ExecutionMode, Kernel, Match, Rejection
from openwafer.kernels.pattern import Op, find, op_stem, target_name
from openwafer.kernels.refusal import Refusal, explain, refusals_text, tensors_text
from openwafer.kernels.shape import CONSTANT
from openwafer.kernels.table import KERNELS

__all__ = ["WITHOUT_DERIVATIVE", "Cover", "KernelGraph", "Refusal", "cover", "match"]

WITHOUT_DERIVATIVE = ("aten.floor_divide", "aten.heaviside")
"""Of the operations with a kernel, those whose result torch gives no derivative."""


@dataclass(frozen=True, slots=True)
class KernelGraph:
    """A program with a kernel on each operation, in execution order of the kernels' results."""

    matches: tuple[Match, ...]
    execution_mode: ExecutionMode

    def __post_init__(self) -> None:
        covered = [node for match in self.matches for node in match.nodes]
        assert len(covered) == len(set(covered)), "an operation is covered twice"

    def by_node(self) -> dict[str, Match]:
        """The match that covers each operation, by the operation's node name."""
        return {node.name: match for match in self.matches for node in match.nodes}

    @property
    def working(self) -> tuple[Match, ...]:
        """The matches that occupy PEs: all but views and constants."""
        return tuple(match for match in self.matches if not match.kernel.is_free)


@dataclass(frozen=True, slots=True)
class Cover:
    """What matching found: the kernels that lie, and every operation that none lies on or, in
    training, through which no gradient can pass though one must."""

    kernel_graph: KernelGraph
    refusals: tuple[Refusal, ...]


def match(
    program: Program,
    kernels: Sequence[Kernel] = KERNELS,
    execution_mode: ExecutionMode = "layer_pipelined",
) -> KernelGraph:
    """Cover every operation of `program` with exactly one kernel.

    Raises:
        UnsupportedOpError: some operation has none; it lists all of them.
    """
    found = cover(program, kernels, execution_mode)
    if found.refusals:
        count = len(found.refusals)
        head = "one operation has" if count == 1 else f"{count} operations have"
        raise UnsupportedOpError(
            f"{head} no kernel in {execution_mode} mode\n{refusals_text(found.refusals)}",
            refusals=found.refusals,
        )
    return found.kernel_graph


def cover(
    program: Program,
    kernels: Sequence[Kernel] = KERNELS,
    execution_mode: ExecutionMode = "layer_pipelined",
) -> Cover:
    """As `match`, but gives what is covered and what is refused instead of raising."""
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    covered, rejections = _cover(program, kernels, execution_mode, order)
    refusals = tuple(
        explain(node, rejections.get(node, ()), kernels, execution_mode)
        for node in program.operations
        if node not in covered
    )
    if program.training:
        refusals += tuple(_without_derivative(program, covered))
    places = sorted(
        dict.fromkeys(covered.values()), key=lambda place: order[place.candidate.anchor]
    )
    return Cover(KernelGraph(_name(places, program), execution_mode), refusals)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    kernel: Kernel
    candidate: Candidate


def _cover(
    program: Program,
    kernels: Sequence[Kernel],
    mode: ExecutionMode,
    order: Mapping[fx.Node, int],
) -> tuple[dict[fx.Node, _Place], dict[fx.Node, list[Rejection]]]:
    """Lay the ranked patterns on the operations, last operation first. What is known before the run
    is a constant, by whatever operations."""
    by_target: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in reversed(program.operations):
        name = target_name(node)
        for key in {name, op_stem(name)}:
            by_target[key].append(node)
    kept = {program.loss, *(name for metric in program.metrics for name in metric.nodes)}
    kept |= {buffer.update for buffer in program.buffers if buffer.update}
    constants = constant_nodes(program)
    covered: dict[fx.Node, _Place] = {}
    rejections: dict[fx.Node, list[Rejection]] = {}
    for kernel, pattern in _ranked(tuple(kernels)):
        for node in (n for target in pattern.targets for n in by_target.get(target, ())):
            candidate = None if node in covered else _lay(pattern, node, order)
            if candidate is None or not _is_closed(candidate, covered, kept):
                continue
            rejection = _reject(kernel, candidate, mode)
            if rejection is not None:
                rejections.setdefault(node, []).append(rejection)
                continue
            if not kernel.is_free and constants.issuperset(candidate.nodes):
                kernel = CONSTANT
            place = _Place(kernel, candidate)
            covered.update(dict.fromkeys(candidate.nodes, place))
    return covered, rejections


@lru_cache(maxsize=8)
def _ranked(kernels: tuple[Kernel, ...]) -> list[tuple[Kernel, Op]]:
    """Larger patterns first; among equal ones those that bind more, then the library's order."""
    pairs = [(kernel, pattern) for kernel in kernels for pattern in kernel.patterns]
    return sorted(pairs, key=lambda pair: (-pair[1].size, -len(pair[1].args)))


def _without_derivative(program: Program, covered: Collection[fx.Node]) -> Iterator[Refusal]:
    """The operations that a gradient would have to pass through and cannot."""
    found = {n for n in covered if op_stem(target_name(n)) in WITHOUT_DERIVATIVE}
    if not found:
        return
    gradients = graph_facts(program, ()).gradients
    for node in program.operations:
        if node in found and node in gradients:
            yield Refusal(
                node=node.name,
                op=target_name(node),
                tensors=tensors_text(node),
                site=site_of(node),
                reason="it has no derivative, and a gradient would pass through it",
                nearest="",
                suggestion="stop the gradient before it: `x.detach()`",
            )


def _lay(pattern: Op, node: fx.Node, order: Mapping[fx.Node, int]) -> Candidate | None:
    found = find(pattern, node)
    if found is None:
        return None
    nodes = sorted(dict.fromkeys(found.nodes), key=order.__getitem__)
    return Candidate(tuple(nodes), found.bound)


def _is_closed(
    candidate: Candidate, covered: Collection[fx.Node], kept: Collection[str | None]
) -> bool:
    """True if nothing is covered yet and no inner result is needed outside."""
    inside = set(candidate.nodes)
    for node in candidate.nodes:
        if node in covered:
            return False
        inner = node is not candidate.anchor
        if inner and (node.name in kept or any(user not in inside for user in node.users)):
            return False
    return True


def _reject(kernel: Kernel, candidate: Candidate, mode: ExecutionMode) -> Rejection | None:
    if mode not in kernel.modes:
        return Rejection(
            f"kernel `{kernel.name}` does not run in {mode} mode",
            f"execution_mode: {', '.join(kernel.modes)}",
        )
    for node in (*candidate.inputs, *candidate.nodes):
        for dtype in _dtypes(node.meta.get("val")):
            if dtype not in kernel.dtypes:
                allowed = ", ".join(kernel.dtypes)
                reason = f"kernel `{kernel.name}` takes {allowed}; `{node.name}` is {dtype}"
                return Rejection(reason, _cast_to_nearest(dtype, kernel.dtypes))
    return kernel.check(candidate)


def _dtypes(value: Any) -> tuple[str, ...]:
    if isinstance(value, torch.Tensor):
        return (_dtype_name(value.dtype),)
    if isinstance(value, (tuple, list)):
        items: Sequence[Any] = value
        return tuple(name for item in items for name in _dtypes(item))
    return ()


@lru_cache(maxsize=64)
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast_to_nearest(dtype: str, allowed: tuple[str, ...]) -> str:
    if dtype.startswith("complex"):
        return ""  # a cast would drop the imaginary part; refusal.py says what to do
    preferred = "float32" if dtype.startswith("float") else "int32"
    return f"`.to(torch.{preferred if preferred in allowed else allowed[0]})`"


def _name(places: Sequence[_Place], program: Program) -> tuple[Match, ...]:
    """Number the places and attach what costs depend on."""
    free = {node for p in places if p.kernel.is_free for node in p.candidate.nodes}
    facts = graph_facts(program, free)
    counts: dict[str, int] = {}
    taken: set[Parameter] = set()
    matches: list[Match] = []
    for place in places:
        family = place.kernel.family
        number = counts.get(family, 0)
        counts[family] = number + 1
        matches.append(_as_match(f"{family}{number}", place, facts, taken))
    return tuple(matches)


def _as_match(name: str, place: _Place, facts: GraphFacts, taken: set[Parameter]) -> Match:
    inputs = place.candidate.inputs
    read = (parameter for node in inputs for parameter in facts.parameters.get(node, ()))
    parameters = tuple(dict.fromkeys(read))
    owned: tuple[Parameter, ...] = ()
    if not place.kernel.is_free:
        owned = tuple(p for p in parameters if p.trainable and p not in taken)
        taken.update(owned)
    result_has_gradient = place.candidate.anchor in facts.gradients
    grads = (node for node in inputs if result_has_gradient and node in facts.gradients)
    return Match(
        name=name,
        kernel=place.kernel,
        nodes=place.candidate.nodes,
        bound=place.candidate.bound,
        inputs=inputs,
        resident=frozenset(node for node in inputs if node in facts.resident),
        parameters=parameters,
        owned=owned,
        grad_inputs=frozenset(grads),
    )

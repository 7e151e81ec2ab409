"""Which kernel covers which operation.

Decides the order in which kernels are tried (larger patterns first), that every operation is
covered exactly once, and how refusals read. Does not decide costs or places.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from openwafer.errors import UnsupportedOpError
from openwafer.graph.program import Parameter, Program, Site, site_of
from openwafer.kernels.facts import GraphFacts, graph_facts
from openwafer.kernels.kernel import (
    Candidate,
    ExecutionMode,
    Kernel,
    Match,
    Rejection,
    specs_of,
)
from openwafer.kernels.pattern import Op, find, target_name
from openwafer.kernels.table import ALTERNATIVES, KERNELS

__all__ = ["KernelGraph", "Refusal", "match"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An operation that no kernel takes: what it is, where it is, why, and what to do."""

    node: str
    op: str
    tensors: str
    site: Site
    reason: str
    alternative: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}  {self.tensors}", f"  at       {_place(self.site)}"]
        lines.append(f"  why      {self.reason}")
        if self.alternative:
            lines.append(f"  try      {self.alternative}")
        return "\n".join(lines)


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


def match(
    program: Program,
    kernels: Sequence[Kernel] = KERNELS,
    execution_mode: ExecutionMode = "layer_pipelined",
) -> KernelGraph:
    """Cover every operation of `program` with exactly one kernel.

    Raises:
        UnsupportedOpError: some operation has none; it lists all of them.
    """
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    covered, rejections = _cover(program, kernels, execution_mode, order)
    uncovered = [node for node in program.operations if node not in covered]
    if uncovered:
        refusals = tuple(_refusal(node, rejections.get(node), kernels) for node in uncovered)
        raise _unsupported(refusals, execution_mode)
    places = sorted(
        dict.fromkeys(covered.values()), key=lambda place: order[place.candidate.anchor]
    )
    return KernelGraph(_name(places, program), execution_mode)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    kernel: Kernel
    candidate: Candidate


def _cover(
    program: Program,
    kernels: Sequence[Kernel],
    mode: ExecutionMode,
    order: dict[fx.Node, int],
) -> tuple[dict[fx.Node, _Place], dict[fx.Node, list[Rejection]]]:
    """Lay the ranked patterns on the operations, last operation first."""
    by_target: dict[str, list[fx.Node]] = {}
    for node in reversed(program.operations):
        by_target.setdefault(target_name(node), []).append(node)
    kept = {program.loss, *(name for metric in program.metrics for name in metric.nodes)}
    kept |= {buffer.update for buffer in program.buffers if buffer.update}
    covered: dict[fx.Node, _Place] = {}
    rejections: dict[fx.Node, list[Rejection]] = {}
    for kernel, pattern in _ranked(kernels):
        for node in by_target.get(pattern.target, ()):
            candidate = None if node in covered else _lay(pattern, node, order)
            if candidate is None or not _is_closed(candidate, covered, kept):
                continue
            rejection = _reject(kernel, candidate, mode)
            if rejection is not None:
                rejections.setdefault(node, []).append(rejection)
                continue
            place = _Place(kernel, candidate)
            covered.update(dict.fromkeys(candidate.nodes, place))
    return covered, rejections


def _ranked(kernels: Sequence[Kernel]) -> list[tuple[Kernel, Op]]:
    """Larger patterns first; among equal ones those that bind more, then the library's order."""
    pairs = [(kernel, pattern) for kernel in kernels for pattern in kernel.patterns]
    return sorted(pairs, key=lambda pair: (-pair[1].size, -len(pair[1].args)))


def _lay(pattern: Op, node: fx.Node, order: dict[fx.Node, int]) -> Candidate | None:
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
        for spec in specs_of(node):
            if spec.dtype not in kernel.dtypes:
                allowed = ", ".join(kernel.dtypes)
                return Rejection(
                    f"kernel `{kernel.name}` takes {allowed}; `{node.name}` is {spec.dtype}",
                    f"`.to(torch.{_nearest_dtype(spec.dtype, kernel.dtypes)})`",
                )
    return kernel.check(candidate)


def _nearest_dtype(dtype: str, allowed: tuple[str, ...]) -> str:
    preferred = "float32" if dtype.startswith(("float", "complex")) else "int32"
    return preferred if preferred in allowed else allowed[0]


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


def _refusal(
    node: fx.Node, rejections: list[Rejection] | None, kernels: Sequence[Kernel]
) -> Refusal:
    op = target_name(node)
    if rejections:
        reason = "; ".join(dict.fromkeys(rejection.reason for rejection in rejections))
        alternative = next((r.alternative for r in rejections if r.alternative), "")
    else:
        reason, alternative = f"there is no kernel for `{op}`", _nearest_op(op, kernels)
    return Refusal(
        node=node.name,
        op=op,
        tensors=_tensors(node),
        site=site_of(node),
        reason=reason,
        alternative=alternative,
    )


def _nearest_op(op: str, kernels: Sequence[Kernel]) -> str:
    """What to write instead: from the table, else the operation with the closest name."""
    if _stem(op) in ALTERNATIVES:
        return ALTERNATIVES[_stem(op)]
    known = {_stem(p.target): p.target for kernel in kernels for p in kernel.patterns}
    close = difflib.get_close_matches(_stem(op), list(known), n=1, cutoff=0.6)
    if close:
        return f"the nearest supported operation is `{known[close[0]]}`"
    return "`openwafer kernels` lists the supported operations"


def _stem(op: str) -> str:
    """An operation's name without its overload."""
    return op.rsplit(".", 1)[0]


def _tensors(node: fx.Node) -> str:
    read = [str(spec) for source in node.all_input_nodes for spec in specs_of(source)]
    given = [str(spec) for spec in specs_of(node)]
    return f"({', '.join(read)}) -> {', '.join(given) or 'nothing'}"


def _place(site: Site) -> str:
    module = site.module or "(top)"
    if site.module_type:
        module += f" ({site.module_type})"
    return f"{module}, {site.file}:{site.line}" if site.file else f"{module}, unknown line"


def _unsupported(refusals: tuple[Refusal, ...], mode: ExecutionMode) -> UnsupportedOpError:
    count = "one operation has" if len(refusals) == 1 else f"{len(refusals)} operations have"
    lines = [f"{count} no kernel in {mode} mode"]
    for number, refusal in enumerate(refusals, start=1):
        head, *rest = str(refusal).splitlines()
        lines.append(f"{number:>3}. {head}")
        lines.extend(f"     {line}" for line in rest)
    return UnsupportedOpError("\n".join(lines), refusals=refusals)

"""What each kernel asks of the fabric, from its cost: work, memory, data, place in the pipeline.

Decides how costs of a batch become demands of one sample, which kernels need the whole sample
before they can give anything, and what crosses between kernels. Does not decide sizes (sizing.py).

A sample is a row of positions (tokens, pixels; one for a plain vector) that pass one after the
other. Most kernels begin with a position as soon as it is there, so that a sample moves on through
them while it is still coming in. Attention cannot: its first result needs the last key. The number
of such steps behind a kernel says how many samples are on their way between its forward and its
backward pass, and so how many it must remember.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from openwafer.graph.program import Program, site_of
from openwafer.kernels.kernel import CostContext, KernelCost, Match, OptimizerCost, Work, specs_of
from openwafer.kernels.match import KernelGraph
from openwafer.kernels.pattern import target_name
from openwafer.machine.spec import Machine
from openwafer.plan.layers import Layer

__all__ = ["Demand", "Net", "demands_of", "nets_of"]

_WHOLE_SAMPLE = ("attention", "matmul", "recurrent", "sort", "fourier")
"""Families whose first result needs all positions of their operands."""
_SPATIAL = ("conv", "pool")
"""Families whose tensors are [batch, channels, ...]."""
_SOFTMAXES = ("cross_entropy", "log_softmax", "softmax")
"""Kernels that need all elements of a position together."""
_CLASS_LOSSES = ("cross_entropy", "nll_loss")
"""Losses whose input is [batch, classes, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one kernel asks for. Work is in PE-cycles: what one PE alone would take.

    module: path of the module that it is in.
    forward, backward: per sample. update: per batch.
    positions, width: what passes one after the other, and the elements of one position.
    grid: (in, out) of the weight of a matrix product; None for other kernels.
    row_cycles: PE-cycles per element of its slowest stage where a position's elements lie along
        one row of PEs (a softmax needs them together); 0 for other kernels.
    parallelism: the most PEs that can work on one sample.
    edge_bytes: per sample, of the largest tensor of the batch that it reads or gives.
    static_bytes: weights, gradients, optimizer state. waiting_bytes: per sample that waits.
    step: the share of a sample's time that passes before the first result.
    steps_after: the same, summed over the longest way from here to the loss.
    weight_bytes, gradient_bytes: as streamed.
    """

    match: Match
    layer: str
    module: str
    cost: KernelCost
    forward: float
    backward: float
    update: float
    macs: float
    positions: int
    width: int
    grid: tuple[int, int] | None
    row_cycles: int
    parallelism: int
    edge_bytes: float
    static_bytes: int
    waiting_bytes: float
    step: float
    steps_after: float

    @property
    def name(self) -> str:
        return self.match.name

    @property
    def work(self) -> float:
        """PE-cycles per sample, forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A tensor on its way from one kernel to others, per sample. `source` is a batch entry's path
    where it comes from outside. The gradient goes the other way if there is one."""

    source: str
    targets: tuple[str, ...]
    num_bytes: float
    has_gradient: bool
    from_host: bool


def demands_of(
    graph: KernelGraph,
    layers: Sequence[Layer],
    program: Program,
    machine: Machine,
    optimizer: OptimizerCost,
) -> list[Demand]:
    """The demands of all kernels with work, in execution order."""
    context = CostContext(
        num_samples=program.num_samples, training=program.training, optimizer=optimizer
    )
    layer_of = {node: layer.name for layer in layers for node in layer.nodes}
    steps = {m.name: _step(m, program.num_samples) for m in graph.matches}
    after = _steps_after(graph, steps)
    return [
        _demand(match, layer_of, context, machine, steps[match.name], after[match.name])
        for match in graph.working
    ]


def pe_cycles(work: Work, match: Match, dtype: str, machine: Machine) -> float:
    """What one PE alone would take for `work`."""
    activations = _is_activation_product(match)
    rates = machine.activation_macs_per_cycle if activations else machine.planning_macs_per_cycle
    return work.macs / rates.of(dtype) + (
        work.elementwise_ops / machine.elementwise_ops_per_cycle.of(dtype)
    )


def _demand(
    match: Match,
    layer_of: Mapping[str, str],
    context: CostContext,
    machine: Machine,
    step: float,
    after: float,
) -> Demand:
    cost = match.cost(context)
    samples = context.num_samples
    positions, width = _positions(match, samples)
    return Demand(
        match=match,
        layer=layer_of.get(match.anchor.name, ""),
        module=site_of(match.anchor).module,
        cost=cost,
        forward=pe_cycles(cost.forward, match, cost.dtype, machine) / samples,
        backward=pe_cycles(cost.backward, match, cost.dtype, machine) / samples,
        update=pe_cycles(cost.update, match, "float32", machine),
        macs=(cost.forward.macs + cost.backward.macs) / samples,
        positions=positions,
        width=width,
        grid=_grid(match),
        row_cycles=_row_cycles(match),
        parallelism=max(1, cost.parallelism),
        edge_bytes=_edge_bytes(match) / samples,
        static_bytes=cost.weight_bytes + cost.gradient_bytes + cost.owned_bytes,
        waiting_bytes=cost.saved_bytes / samples,
        step=step,
        steps_after=after,
    )


def _edge_bytes(match: Match) -> int:
    flowing = [node for node in (*match.inputs, match.anchor) if node not in match.resident]
    return max((sum(s.num_bytes for s in specs_of(node)) for node in flowing), default=0)


def _is_activation_product(match: Match) -> bool:
    """Products of two tensors of the batch: attention, and matmul without a weight."""
    family = match.kernel.family
    return family == "attention" or (family == "matmul" and not match.parameters)


def _grid(match: Match) -> tuple[int, int] | None:
    """In and out of a product with one two-dimensional weight."""
    if match.kernel.family not in ("fc", "matmul"):
        return None
    shapes = [specs_of(node)[0].shape for node in match.inputs if node in match.resident]
    matrices = [shape for shape in shapes if len(shape) == 2]
    return (matrices[0][1], matrices[0][0]) if len(matrices) == 1 else None


def _row_cycles(match: Match) -> int:
    """Of a softmax over a row: exp and its difference are the slowest stage."""
    from openwafer.kernels.activation import OPS_PER_EXP

    return OPS_PER_EXP + 1 if match.kernel.name in _SOFTMAXES else 0


def _positions(match: Match, samples: int) -> tuple[int, int]:
    """How many positions of how many elements pass per sample, by the widest tensor."""
    specs = [specs_of(node)[0] for node in (*match.inputs, match.anchor) if specs_of(node)]
    flowing = [s for s in specs if s.shape and s.numel >= samples]
    if not flowing:
        return 1, 1
    if match.kernel.family == "loss":
        largest = flowing[0]
    elif match.kernel.family == "attention":
        largest = match.spec("query") if "query" in match.bound else flowing[0]
    else:
        largest = specs_of(match.anchor)[0] if match.output.numel >= samples else flowing[0]
    shape = largest.shape or (1,)
    width = shape[_position_axis(match, len(shape))]
    return max(1, largest.numel // samples // max(1, width)), width


def _position_axis(match: Match, rank: int) -> int:
    """The axis that a position's elements lie along: the classes of a loss, what a softmax runs
    over, the channels of an image; the last one of other tensors."""
    if match.kernel.name in _SOFTMAXES:
        for node in match.nodes:
            if "softmax" in target_name(node):
                axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
                return int(axis)
    channels_first = match.kernel.family in _SPATIAL or match.kernel.name in _CLASS_LOSSES
    return 1 if channels_first and rank > 2 else -1


def _step(match: Match, samples: int) -> float:
    """The share of a sample's time before the first result."""
    if match.kernel.is_free:
        return 0.0
    positions, _ = _positions(match, samples)
    family = match.kernel.family
    if family in _WHOLE_SAMPLE or positions == 1:
        return 1.0
    if family in _SPATIAL and len(match.output.shape) > 2:
        return min(1.0, 3 / match.output.shape[2])  # a few rows of the image
    return 1 / positions


def _steps_after(graph: KernelGraph, steps: Mapping[str, float]) -> dict[str, float]:
    """Per kernel, the steps on the longest way from its result to the last one."""
    by_node = {node: match for match in graph.matches for node in match.nodes}
    after: dict[str, float] = {match.name: 0.0 for match in graph.matches}
    for match in reversed(graph.matches):
        behind = after[match.name] + steps[match.name]
        for node in match.inputs:
            source = by_node.get(node)
            if source is not None:
                after[source.name] = max(after[source.name], behind)
    return after


# ------------------------------------------------------------------------------------------ nets


def nets_of(graph: KernelGraph, program: Program) -> list[Net]:
    """Every tensor that crosses between kernels or comes in from the batch. What views, joins and
    casts stand between is looked through."""
    paths = {entry.node: entry.path for entry in program.inputs}
    producer: dict[fx.Node, Match] = {node: m for m in graph.matches for node in m.nodes}
    sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
    readers: dict[fx.Node, dict[str, bool]] = {}
    for match in graph.matches:
        read = tuple(
            dict.fromkeys(
                origin
                for node in match.inputs
                if node not in match.resident
                for origin in _origins(node, producer, sources)
            )
        )
        if match.kernel.is_free:
            sources.update(dict.fromkeys(match.nodes, read))
            continue
        grads = {o for n in match.grad_inputs for o in _origins(n, producer, sources)}
        for origin in read:
            readers.setdefault(origin, {})[match.name] = origin in grads
    samples = program.num_samples
    return [
        Net(
            source=producer[node].name if node in producer else f"batch{paths[node.name]}",
            targets=tuple(targets),
            num_bytes=sum(spec.num_bytes for spec in specs_of(node)) / samples,
            has_gradient=program.training and any(targets.values()),
            from_host=node not in producer,
        )
        for node, targets in readers.items()
        if node in producer or node.name in paths
    ]


def _origins(
    node: fx.Node,
    producer: Mapping[fx.Node, Match],
    sources: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> tuple[fx.Node, ...]:
    """The node itself, or what it is a view of."""
    match = producer.get(node)
    return sources.get(node, ()) if match is not None and match.kernel.is_free else (node,)

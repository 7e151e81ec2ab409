"""Where a compiled model is cut into pipeline stages, and what crosses the cuts.

Decides which contiguous layers form a stage (the most expensive stage as cheap as possible, by the
plan's own costs), and for each value that a later stage reads, from which stage to which it goes
directly: a skip does not pass through the stages between. Does not decide when a stage runs
(pipeline_schedule.py) or how values travel (stage_messages.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from openwafer.errors import PlanError
from openwafer.runtime.compiled import CompiledLayer, CompiledModel
from openwafer.runtime.trace import TensorFact

__all__ = ["Crossing", "Stage", "StagedModel", "balance", "cut_into_stages", "joined_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """The values that one stage reads of an earlier one, and the gradients that come back.

    names: node names, in the order they are sent. facts: their shapes and dtypes.
    returned: of those, the ones whose gradient the later stage gives; a value that the loss does
        not depend on by that way has none.
    """

    source: int
    target: int
    names: tuple[str, ...]
    facts: tuple[TensorFact, ...]
    returned: tuple[str, ...]

    def facts_of(self, names: Sequence[str]) -> list[TensorFact]:
        known = dict(zip(self.names, self.facts, strict=True))
        return [known[name] for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Contiguous layers that one process runs.

    batch_inputs: nodes of the batch entries they read.
    incoming: one crossing for each earlier stage they read from; outgoing: to each later one.
    results: nodes of the loss and of metrics that they compute.
    """

    index: int
    layers: tuple[CompiledLayer, ...]
    first_layer: int
    batch_inputs: tuple[str, ...]
    incoming: tuple[Crossing, ...]
    outgoing: tuple[Crossing, ...]
    results: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weights that its layers read."""
        return tuple(dict.fromkeys(n for one in self.layers for n in one.layer.parameters))

    @property
    def buffers(self) -> tuple[str, ...]:
        """Nodes of the buffers and constants that its layers read."""
        return tuple(dict.fromkeys(n for one in self.layers for n in one.layer.buffers))

    @property
    def updated_buffers(self) -> tuple[str, ...]:
        """Of those, the ones that its layers change."""
        return tuple(dict.fromkeys(b for one in self.layers for _, b in one.buffer_updates))


@dataclass(frozen=True)
class StagedModel:
    """A compiled model as stages. Stage s is run by process `s % num_processes`."""

    model: CompiledModel
    stages: tuple[Stage, ...]
    num_processes: int

    def process_of(self, stage: int) -> int:
        return stage % self.num_processes

    def of_process(self, process: int) -> tuple[Stage, ...]:
        return self.stages[process :: self.num_processes]

    @cached_property
    def first_holder(self) -> dict[str, int]:
        """By weight or buffer (name or node), the process that answers for it: the first one."""
        found: dict[str, int] = {}
        for stage in self.stages:
            for name in (*stage.parameters, *stage.buffers):
                holder = found.get(name, self.num_processes)
                found[name] = min(holder, self.process_of(stage.index))
        return found

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """By weight, the processes that have it: several for a tied one that they all read."""
        found: dict[str, set[int]] = {}
        for stage in self.stages:
            for name in stage.parameters:
                found.setdefault(name, set()).add(self.process_of(stage.index))
        return {name: tuple(sorted(held)) for name, held in found.items()}


def balance(
    costs: Sequence[int], num_stages: int, joined: frozenset[int] = frozenset()
) -> list[range]:
    """Cut layers into contiguous stages whose largest cost is as small as possible.

    Args:
        costs: of each layer.
        joined: layers that must be in one stage with the layer before them.

    Raises:
        PlanError: there are not that many places to cut at.
    """
    starts = [i for i in range(len(costs)) if i not in joined]
    if len(starts) < num_stages:
        raise PlanError(
            f"the model has {len(starts)} layers that can be parted, for {num_stages} stages",
            where="--num_stages",
            allowed=f"1 to {len(starts)}; interleaved has two stages in each process",
            hint="fewer stages; num_replicas takes further processes",
        )
    ends = [*starts[1:], len(costs)]
    sums = [0, *accumulate(sum(costs[a:b]) for a, b in zip(starts, ends, strict=True))]
    count = len(starts)
    # best[k][i]: the smallest largest cost of the first i blocks in k stages, and its last cut.
    best = [(sums[i], 0) for i in range(count + 1)]
    cuts: list[list[int]] = []
    for stages in range(2, num_stages + 1):
        following = [(sums[count] + 1, 0)] * (count + 1)
        for i in range(stages, count + 1):
            following[i] = min(
                (max(best[j][0], sums[i] - sums[j]), j) for j in range(stages - 1, i)
            )
        best = following
        cuts.append([cut for _, cut in best])
    bounds = [count]
    for row in reversed(cuts):
        bounds.append(row[bounds[-1]])
    places = [0, *(starts[b] for b in bounds[:0:-1]), len(costs)]
    return [range(a, b) for a, b in pairwise(places)]


def joined_layers(*models: CompiledModel | None) -> frozenset[int]:
    """Layers that share a buffer which changes (batch statistics) with an earlier layer: all from
    the first to the last such layer stay together, so that one process has its newest value."""
    joined: set[int] = set()
    for model in models:
        if model is None:
            continue
        users: dict[str, list[int]] = {}
        for index, one in enumerate(model.layers):
            for node in {*one.layer.buffers, *(b for _, b in one.buffer_updates)}:
                users.setdefault(node, []).append(index)
        for _, node in (pair for one in model.layers for pair in one.buffer_updates):
            joined.update(range(users[node][0] + 1, users[node][-1] + 1))
    return frozenset(joined)


def cut_into_stages(
    model: CompiledModel, parts: Sequence[range], num_processes: int
) -> StagedModel:
    """The stages of a model whose layers are cut as `balance` says."""
    stage_of = {i: s for s, part in enumerate(parts) for i in part}
    producer = {
        name: stage_of[i] for i, one in enumerate(model.layers) for name in one.layer.outputs
    }
    crossings = _crossings(model, parts, producer)
    batch = {entry.node for entry in model.program.inputs}
    kept = [model.program.loss, *(n for m in model.program.metrics for n in m.nodes)]
    stages: list[Stage] = []
    for index, part in enumerate(parts):
        layers = tuple(model.layers[i] for i in part)
        read = dict.fromkeys(name for one in layers for name in one.layer.inputs)
        stages.append(
            Stage(
                index=index,
                layers=layers,
                first_layer=part.start,
                batch_inputs=tuple(name for name in read if name in batch),
                incoming=tuple(c for c in crossings if c.target == index),
                outgoing=tuple(c for c in crossings if c.source == index),
                results=tuple(dict.fromkeys(n for n in kept if producer.get(n) == index)),
            )
        )
    return StagedModel(model, tuple(stages), num_processes)


def _crossings(
    model: CompiledModel, parts: Sequence[range], producer: dict[str, int]
) -> list[Crossing]:
    found: list[Crossing] = []
    for target, part in enumerate(parts):
        facts: dict[str, TensorFact] = {}
        returned: set[str] = set()
        for one in (model.layers[i] for i in part):
            names = [*one.layer.buffers, *one.layer.inputs]
            arguments = one.functions.arguments[len(one.layer.parameters) :]
            for name, fact, given in zip(names, arguments, one.functions.grad_inputs, strict=True):
                if producer.get(name, target) != target:
                    facts[name] = fact
                    returned |= {name} if given else set()
        for source in sorted({producer[name] for name in facts}):
            names = tuple(name for name in facts if producer[name] == source)
            found.append(
                Crossing(
                    source=source,
                    target=target,
                    names=names,
                    facts=tuple(facts[name] for name in names),
                    returned=tuple(name for name in names if name in returned),
                )
            )
    return found

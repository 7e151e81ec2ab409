"""Weight streaming: one layer at a time on the whole wafer, weights from outside.

Decides the time of each pass over each layer, how large a batch fits, and the step on one and on
several systems. Formulas (w, g: a layer's weights and gradients on their link; c: its work on all
PEs, by kernel the most that can be of use):

    forward:   max(w, c_forward)
    backward:  max(w, g, c_backward [+ c_forward where it is done again])
    (where a machine's streams do not overlap: the sums of these instead of the largest)
    each pass: + layer_switch_seconds
    step:      step_seconds + the sum of all passes

Activations stay on the wafer. Where all that the backward pass reads does not fit, only what
crosses between layers is kept, and each layer's forward pass is done again; where that does not fit
either, the batch is cut into microbatches that pass one after the other, weights streamed for each.
Weights and gradients go in opposite directions, gradients of a layer while the next one is at work.
Systems share the batch; weights reach all of them at once, gradients are summed on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from openwafer.errors import PlanError
from openwafer.graph.program import Program
from openwafer.kernels.kernel import OptimizerCost
from openwafer.kernels.match import KernelGraph
from openwafer.machine.spec import Machine
from openwafer.plan.fabric.demand import Demand, demands_of
from openwafer.plan.fabric.values import (
    FabricPlan,
    KernelRow,
    LayerTime,
    Prediction,
    Rectangle,
    SystemsRate,
)
from openwafer.plan.layers import Layer

__all__ = ["plan_streaming"]

_MOST_SYSTEMS = 64
_REDUCTION_HOP_SECONDS = 5e-6
"""Assumed latency of one level of the tree between systems; it never bounds a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _LayerWork:
    """One layer's demands, per sample where not said otherwise. `boundary` and `inner`: bytes that
    cross into it, and that its backward pass reads."""

    name: str
    members: tuple[Demand, ...]
    weight_seconds: float
    gradient_seconds: float
    boundary: float
    inner: float


def plan_streaming(
    layers: Sequence[Layer],
    kernel_graph: KernelGraph,
    program: Program,
    machine: Machine,
    *,
    optimizer: OptimizerCost,
    num_systems: int = 1,
    batch_size: int | None = None,
) -> tuple[FabricPlan, Prediction]:
    """Predict a step of the batch, on `num_systems` systems.

    Args:
        batch_size: samples of a step; None takes those of the program. Costs scale with it.

    Raises:
        PlanError: not even one sample's activations fit the wafer.
    """
    demands = demands_of(kernel_graph, layers, program, machine, optimizer)
    work = _layer_work(demands, layers, program, machine)
    samples = batch_size or program.num_samples
    step = _Step(work, program, samples, machine)
    timed = step.on(num_systems)
    total = timed.seconds
    counts = sorted({1, 2, 4, 8, 16, 32, _MOST_SYSTEMS, num_systems})
    systems = tuple(step.rate_of(count) for count in counts if count <= samples)
    delta_t = max(1, ceil(total / samples * machine.clock_hz))
    rows = _rows(demands, samples / num_systems, machine, samples / total)
    compute, link = max(timed.compute, 1e-12), max(timed.link, 1e-12)
    batch_in = max(step.input_seconds(num_systems), 1e-12)
    why, relief = _bottleneck(timed, work)
    prediction = Prediction(
        clock_hz=machine.clock_hz,
        delta_t_cycles=delta_t,
        compute_delta_t_cycles=compute / samples * machine.clock_hz,
        transmission_delta_t_cycles=link / samples * machine.clock_hz,
        input_delta_t_cycles=batch_in / samples * machine.clock_hz,
        samples_per_second=samples / total,
        compute_samples_per_second=samples / compute,
        transmission_samples_per_second=samples / link,
        input_samples_per_second=samples / batch_in,
        batch_seconds=total,
        batch_samples_per_second=samples / total,
        pipeline_depth=0.0,
        fill_cycles=0.0,
        update_cycles=0.0,
        largest_batch=step.largest_batch * num_systems,
        num_microbatches=timed.num_microbatches,
        recomputes=timed.recomputes,
        bottleneck=why,
        relief=relief,
        notes=_notes(timed, step, num_systems),
        timeline=timed.passes,
        systems=systems,
    )
    return _fabric(rows, machine), prediction


def _layer_work(
    demands: Sequence[Demand], layers: Sequence[Layer], program: Program, machine: Machine
) -> tuple[_LayerWork, ...]:
    by_layer: dict[str, list[Demand]] = {}
    for demand in demands:
        by_layer.setdefault(demand.layer, []).append(demand)
    boundary = {layer.name: layer.input_bytes / program.num_samples for layer in layers}
    rate = machine.weight_bytes_per_second
    return tuple(
        _LayerWork(
            name=name,
            members=tuple(members),
            weight_seconds=sum(_streamed_bytes(d) for d in members) / rate,
            gradient_seconds=sum(d.cost.gradient_bytes for d in members) / rate,
            boundary=boundary.get(name, 0.0),
            inner=sum(d.waiting_bytes for d in members),
        )
        for name, members in by_layer.items()
    )


def _streamed_bytes(demand: Demand) -> int:
    """Weights as they are sent; of a table that is looked up, no more rows than are asked for."""
    if demand.match.kernel.family == "embedding":
        asked = demand.cost.forward.elementwise_ops * 2
        return min(demand.cost.weight_bytes, asked)
    return demand.cost.weight_bytes


@dataclass(frozen=True, slots=True)
class _Timed:
    """One step. compute, link: seconds of work, and of weights and gradients, in all."""

    passes: tuple[LayerTime, ...]
    seconds: float
    compute: float
    link: float
    num_microbatches: int
    recomputes: bool


class _Step:
    """The times of one model on one machine."""

    def __init__(
        self, work: Sequence[_LayerWork], program: Program, samples: int, machine: Machine
    ) -> None:
        self.work, self.samples, self.machine = work, samples, machine
        self.input_bytes = sum(e.spec.num_bytes for e in program.inputs) / program.num_samples
        room = machine.data_bytes
        self.kept_all = sum(layer.inner for layer in work)
        self.boundaries = sum(layer.boundary for layer in work)
        self.inner = max((layer.inner for layer in work), default=0.0)
        self.training = program.training
        if not self.training:
            widest = max((layer.boundary for layer in work), default=0.0)
            self.kept_all = self.boundaries = 2 * widest
            self.inner = 0.0
        self.fits_all = int(room / self.kept_all) if self.kept_all else 1 << 40
        # One sample at a time is enough of the layer whose forward pass is done again.
        left = room - self.inner
        self.largest_batch = max(
            self.fits_all, int(left / self.boundaries) if self.boundaries else 1 << 40
        )
        if self.largest_batch < 1:
            raise PlanError(
                f"the activations of one sample do not fit machine `{machine.name}`: between "
                f"layers {self.boundaries:,.0f} bytes and inside of one {self.inner:,.0f}, "
                f"{room:,} are there",
                hint="a shorter sequence, or a narrower dtype",
            )

    def on(self, num_systems: int) -> _Timed:
        """The step with the batch shared by so many systems."""
        samples = ceil(self.samples / num_systems)
        parts = ceil(samples / self.largest_batch)
        size = samples / parts
        again = self.training and size > self.fits_all
        passes = self._passes(size, parts, again)
        extra = _REDUCTION_HOP_SECONDS * max(0, (num_systems - 1).bit_length())
        seconds = self.machine.step_seconds + sum(p.seconds for p in passes) + extra
        return _Timed(
            passes=tuple(passes),
            seconds=max(seconds, self.input_seconds(num_systems)),
            compute=sum(p.compute_seconds for p in passes),
            link=sum(p.weight_seconds + p.gradient_seconds for p in passes),
            num_microbatches=parts,
            recomputes=again,
        )

    def input_seconds(self, num_systems: int) -> float:
        """The batch on the links to the hosts."""
        share = self.input_bytes * self.samples / num_systems
        return share / self.machine.io_bytes_per_second

    def rate_of(self, num_systems: int) -> SystemsRate:
        seconds = self.on(num_systems).seconds
        return SystemsRate(
            num_systems=num_systems,
            step_seconds=seconds,
            samples_per_second=self.samples / seconds,
        )

    def _passes(self, samples: float, parts: int, again: bool) -> list[LayerTime]:
        switch = self.machine.layer_switch_seconds
        passes: list[LayerTime] = []
        now = 0.0

        def add(layer: _LayerWork, phase: str, work: float, gradient: float) -> None:
            nonlocal now
            seconds = parts * (self._together(work, layer.weight_seconds, gradient) + switch)
            passes.append(
                LayerTime(
                    layer=layer.name,
                    phase="forward" if phase == "forward" else "backward",
                    start_seconds=now,
                    seconds=seconds,
                    compute_seconds=parts * work,
                    weight_seconds=parts * layer.weight_seconds,
                    gradient_seconds=parts * gradient,
                )
            )
            now += seconds

        for layer in self.work:
            add(layer, "forward", self._seconds(layer, samples, backward=False), 0.0)
        if self.training:
            for layer in reversed(self.work):
                work = self._seconds(layer, samples, backward=True)
                if again:
                    work += self._seconds(layer, samples, backward=False)
                add(layer, "backward", work, layer.gradient_seconds)
        return passes

    def _together(self, *seconds: float) -> float:
        """Of what goes on in one pass over a layer, as far as the machine does it side by side."""
        overlap = self.machine.streams_overlap
        return overlap * max(seconds) + (1 - overlap) * sum(seconds)

    def _seconds(self, layer: _LayerWork, samples: float, *, backward: bool) -> float:
        cycles = 0.0
        for demand in layer.members:
            pes = _pes_of(demand, samples, self.machine)
            cycles += samples * (demand.backward if backward else demand.forward) / pes
        return cycles / self.machine.clock_hz


def _pes_of(demand: Demand, samples: float, machine: Machine) -> int:
    return max(1, min(machine.num_pes, int(demand.parallelism * max(1.0, samples))))


def _rows(
    demands: Sequence[Demand], samples: float, machine: Machine, rate: float
) -> tuple[KernelRow, ...]:
    rows: list[KernelRow] = []
    for demand in demands:
        pes = _pes_of(demand, samples, machine)
        compute = max(demand.work / pes, 1e-9)
        link_bytes = _streamed_bytes(demand) * (2 if demand.backward else 1)
        seconds = (link_bytes + demand.cost.gradient_bytes) / machine.weight_bytes_per_second
        link = max(seconds * machine.clock_hz / samples, 1e-9)
        rows.append(
            KernelRow(
                name=demand.name,
                kernel=demand.match.kernel.name,
                layer=demand.layer,
                group=demand.layer,
                pes=pes,
                transport_pes=0,
                forward_cycles=demand.forward / pes,
                backward_cycles=demand.backward / pes,
                update_cycles=0.0,
                compute_cycles=compute,
                transmission_cycles=link,
                samples_per_second=machine.clock_hz / max(compute, link),
                compute_samples_per_second=machine.clock_hz / compute,
                transmission_samples_per_second=machine.clock_hz / link,
                memory_bytes=ceil(demand.waiting_bytes * samples),
                memory_room=machine.data_bytes,
                waiting_samples=samples,
                utilization=min(1.0, rate * compute / machine.clock_hz),
            )
        )
    return tuple(rows)


def _fabric(rows: tuple[KernelRow, ...], machine: Machine) -> FabricPlan:
    active = max((row.pes for row in rows), default=0)
    area = sum(row.pes for row in rows)
    return FabricPlan(
        fabric_rows=machine.fabric_rows,
        fabric_cols=machine.fabric_cols,
        fabric_pes=machine.num_pes,
        active_pes=active,
        active_fraction=active / machine.num_pes,
        utilization=sum(r.pes * r.utilization for r in rows) / area if area else 0.0,
        num_replicas=1,
        kernels=rows,
        rectangles=(
            Rectangle(
                kernel="all layers in turn", x=0, y=0,
                width=machine.fabric_cols, height=machine.fabric_rows,
            ),
        ),
        wire_length=0.0,
        max_link_load=0.0,
        max_colors=0,
        free_colors=machine.free_colors,
        area_bound_cycles=0,
    )  # fmt: skip


def _bottleneck(timed: _Timed, work: Sequence[_LayerWork]) -> tuple[str, str]:
    total = sum(p.seconds for p in timed.passes)
    by_layer: dict[str, float] = {}
    for one in timed.passes:
        by_layer[one.layer] = by_layer.get(one.layer, 0.0) + one.seconds
    slowest = max(by_layer, key=lambda name: by_layer[name], default="none")
    share = by_layer.get(slowest, 0.0) / max(total, 1e-12)
    bound = sum(p.seconds for p in timed.passes if p.compute_seconds >= p.weight_seconds)
    most = f"; layer {slowest or '(none)'} takes {share:.0%} of the passes"
    if timed.seconds > 2 * total:
        return (
            f"bound by what a step takes besides its layers{most}",
            "a larger batch, so that there are fewer steps",
        )
    if bound >= 0.5 * total:
        again = " (the forward pass twice)" if timed.recomputes else ""
        return (
            f"bound by work on the wafer{again}{most}",
            "more systems (num_csx)" + (", or a smaller batch" if timed.recomputes else ""),
        )
    return (
        f"bound by weights and gradients on their link to the wafer{most}",
        "a larger batch, so that weights are sent for more samples",
    )


def _notes(timed: _Timed, step: _Step, num_systems: int) -> tuple[str, ...]:
    notes: list[str] = []
    if timed.num_microbatches > 1:
        notes.append(
            f"the batch passes in {timed.num_microbatches} microbatches: the activations of "
            f"{step.largest_batch * num_systems:,} samples fit"
        )
    if timed.recomputes:
        notes.append(
            f"forward passes are done again in the backward pass: all that it reads fits for "
            f"{step.fits_all * num_systems:,} samples"
        )
    return tuple(notes)

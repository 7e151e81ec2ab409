"""How many PEs each kernel gets, and how fast samples go through.

Decides sizes and rates from the kernels' costs and the machine's numbers. Does not place or route:
it is the stand-in behind the seam that a fabric compiler will fill, and what it assumes is here.

Layer pipelined. All kernels are on the wafer at once and each takes one sample per delta-t cycles.
For a delta-t of T cycles a kernel needs the largest of
    work:   PE-cycles of forward, backward and its share of the update, over T;
    memory: weights, gradients, optimizer state and waiting activations, over a PE's memory;
    edge:   a square whose side has enough links for its activations in T cycles.
The smallest T whose sum of PEs fits the fabric is the estimate, but T is at least what the slowest
kernel takes on all PEs that it can use, and at least what a batch tensor takes on one link (or the
samples on the host link). Where that is the bound, PEs stay unused.
    Assumed: each tensor of the batch enters over one link; two kernels are joined along an edge
    of a square rectangle; routes never wait for each other; one delta-t passes from a kernel to the
    next, so a kernel d steps before the last keeps 2 d + 1 samples; the pipeline is full (filling
    and draining at batch edges is left out); forward and backward traffic share no link, since
    links are full duplex. Limits of the hosts are left out, and small models meet them first
    (the one published performance.json of fc_mnist that has both measured 8 % of its estimate).

Weight streaming. One layer at a time has all PEs, with all samples of the batch. A pass over a
layer takes the larger of its work and of its weights (in the backward pass: its gradients too,
which go the other way at the same time) on the host link, which the batch comes in by as well.
    Assumed: weights of the next layer arrive during the work on the present one; the optimizer at
    the weight store is never waited for; work divides evenly over PEs.

Rates are `Machine.planning_macs_per_cycle` and `elementwise_ops_per_cycle`, with their sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isqrt

from openwafer.errors import PlanError
from openwafer.graph.program import Program
from openwafer.kernels.kernel import (
    ADAM,
    CostContext,
    ExecutionMode,
    KernelCost,
    Match,
    OptimizerCost,
    Work,
)
from openwafer.kernels.match import KernelGraph
from openwafer.machine.spec import Machine
from openwafer.plan.layers import Layer

__all__ = ["FabricEstimate", "KernelRow", "estimate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One kernel of the estimate. Cycles are per sample.

    utilization: the whole plan's samples/s over this kernel's compute samples/s. It tells how well
        the kernel is balanced against the slowest, not what share of the arithmetic peak it reaches
        (the meaning that the compile reports of release 1.6 have).
    """

    name: str
    kernel: str
    layer: str
    pes: int
    compute_cycles: float
    transmission_cycles: float
    samples_per_sec: float
    compute_samples_per_sec: float
    transmission_samples_per_sec: float
    utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricEstimate:
    """What a plan is expected to do on the machine.

    delta_t: cycles per sample in steady state, rounded up.
    samples_per_sec: layer pipelined: the smaller of the two below. Weight streaming: each layer has
        its own bound, so it can be below both.
    active_pes: PEs in use; the most at one time in weight streaming.
    total_utilization: active PEs over the PEs of the fabric.
    compute_utilization: mean of the kernels' utilization, weighted by PEs.
    kernels: the kernels that do work, in execution order.
    bottleneck: what sets delta_t, in one sentence.
    notes: what the user should know, such as a batch that is too large for the wafer's memory.
    """

    execution_mode: ExecutionMode
    machine: str
    clock_hz: int
    fabric_pes: int
    num_samples: int
    delta_t: int
    samples_per_sec: float
    compute_samples_per_sec: float
    transmission_samples_per_sec: float
    active_pes: int
    total_utilization: float
    compute_utilization: float
    kernels: tuple[KernelRow, ...]
    bottleneck: str
    notes: tuple[str, ...] = ()


def estimate(
    layers: Sequence[Layer],
    kernel_graph: KernelGraph,
    program: Program,
    machine: Machine,
    mode: ExecutionMode,
    *,
    optimizer: OptimizerCost = ADAM,
) -> FabricEstimate:
    """Size the kernels and predict the rate (see the module header for the model).

    Raises:
        PlanError: layer pipelined, and the model does not fit the fabric at any rate.
    """
    context = CostContext(
        num_samples=program.num_samples, training=program.training, optimizer=optimizer
    )
    layer_of = {node: layer.name for layer in layers for node in layer.nodes}
    demands = _demands(kernel_graph, layer_of, context, machine)
    size = _pipelined if mode == "layer_pipelined" else _streamed
    return size(demands, program, machine)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """What one kernel asks for. PE-cycles are those of one PE doing it all, for one batch;
    `sample_cycles` for one sample, with its share of the update."""

    match: Match
    layer: str
    cost: KernelCost
    forward_cycles: int
    backward_cycles: int
    sample_cycles: int
    edge_bytes: int
    memory_bytes: int


def _demands(
    graph: KernelGraph, layer_of: dict[str, str], context: CostContext, machine: Machine
) -> list[_Demand]:
    waits = _samples_in_flight(graph)
    demands: list[_Demand] = []
    for match in graph.working:
        cost = match.cost(context)
        forward = _pe_cycles(cost.forward, cost.dtype, machine)
        backward = _pe_cycles(cost.backward, cost.dtype, machine)
        update = _pe_cycles(cost.update, "float32", machine)
        samples = context.num_samples
        edge = max(
            cost.forward.bytes_in, cost.forward.bytes_out,
            cost.backward.bytes_in, cost.backward.bytes_out,
        )  # fmt: skip
        kept = cost.weight_bytes + cost.gradient_bytes + cost.owned_bytes
        demands.append(
            _Demand(
                match=match,
                layer=layer_of.get(match.anchor.name, ""),
                cost=cost,
                forward_cycles=max(1, ceil(forward)),
                backward_cycles=ceil(backward),
                sample_cycles=max(1, ceil((forward + backward + update) / samples)),
                edge_bytes=_divide(edge, samples),
                memory_bytes=kept + _divide(cost.saved_bytes, samples) * waits[match.name],
            )
        )
    return demands


def _pe_cycles(work: Work, dtype: str, machine: Machine) -> float:
    macs = work.macs / machine.planning_macs_per_cycle.of(dtype)
    return macs + work.elementwise_ops / machine.elementwise_ops_per_cycle.of(dtype)


def _samples_in_flight(graph: KernelGraph) -> dict[str, int]:
    """Per kernel, the samples between its forward and its backward pass: 2 d + 1 with d steps from
    it to the end of the longest chain."""
    by_node = {node: match for match in graph.matches for node in match.nodes}
    depth: dict[str, int] = {}
    for match in graph.matches:
        sources = (by_node[node].name for node in match.inputs if node in by_node)
        before = max((depth[name] for name in sources), default=0)
        depth[match.name] = before + (0 if match.kernel.is_free else 1)
    last = max(depth.values(), default=0)
    return {name: 2 * (last - steps) + 1 for name, steps in depth.items()}


# ------------------------------------------------------------------------------ layer pipelined


def _pipelined(demands: list[_Demand], program: Program, machine: Machine) -> FabricEstimate:
    entry_cycles, entry = _entry_cycles(program, machine)
    target = _smallest_target(demands, entry_cycles, machine)
    rows = [_pipelined_row(demand, target, machine) for demand in demands]
    compute = max((row.compute_cycles for row in rows), default=1)
    transmission = max(entry_cycles, *(row.transmission_cycles for row in rows), 1)
    delta_t = int(max(compute, transmission))
    active = sum(row.pes for row in rows)
    bound = max(rows, key=lambda r: max(r.compute_cycles, r.transmission_cycles), default=None)
    if bound is None or entry_cycles >= delta_t:
        why = f"bound by the batch entering the wafer: {entry} takes {entry_cycles:,} cycles"
    else:
        full = active >= 0.99 * machine.num_pes
        rest = "all PEs are in use" if full else "more PEs would not speed it up"
        why = f"bound by {bound.name} (layer {bound.layer or 'none'}): {delta_t:,} cycles; {rest}"
    return _finish(rows, program, machine, "layer_pipelined", delta_t, (compute, transmission), why)


def _entry_cycles(program: Program, machine: Machine) -> tuple[int, str]:
    """Cycles per sample that the batch takes to come in, and which tensor takes them."""
    sizes = [(_divide(i.spec.num_bytes, program.num_samples), i.path) for i in program.inputs]
    largest, path = max(sizes, default=(0, "nothing"))
    link = _divide(largest, machine.link_bytes_per_cycle)
    total = sum(size for size, _ in sizes)
    host = ceil(total * machine.clock_hz / machine.io_bytes_per_second)
    if host > link:
        return host, f"{total:,} bytes per sample on the host link"
    return link, f"batch{path} ({largest:,} bytes per sample on one link)"


def _smallest_target(demands: list[_Demand], lowest: int, machine: Machine) -> int:
    """The smallest number of cycles per sample at which all kernels fit the fabric."""

    def pes_at(target: int) -> int:
        return sum(_pes(demand, target, machine) for demand in demands)

    parallel = (_divide(d.sample_cycles, d.cost.parallelism) for d in demands)
    low = max(1, lowest, *parallel)
    high = max(low, *(d.sample_cycles for d in demands), *(d.edge_bytes for d in demands))
    if pes_at(high) > machine.num_pes:
        raise PlanError(
            f"the model does not fit machine `{machine.name}` in layer_pipelined mode: "
            f"its weights and waiting activations need {pes_at(high):,} PEs, "
            f"{machine.num_pes:,} are there",
            hint="execution_mode: weight_streaming, or a smaller model",
        )
    if pes_at(low) <= machine.num_pes:
        return low
    while high - low > 1:  # pes_at(low) does not fit, pes_at(high) does
        middle = (low + high) // 2
        if pes_at(middle) <= machine.num_pes:
            high = middle
        else:
            low = middle
    return high


def _pes(demand: _Demand, target: int, machine: Machine) -> int:
    lanes = _divide(_divide(demand.edge_bytes, target), machine.link_bytes_per_cycle)
    memory = _divide(demand.memory_bytes, machine.data_bytes_per_pe)
    return max(1, _divide(demand.sample_cycles, target), memory, lanes * lanes)


def _pipelined_row(demand: _Demand, target: int, machine: Machine) -> KernelRow:
    pes = _pes(demand, target, machine)
    computing = min(pes, demand.cost.parallelism)
    links = isqrt(pes)
    return _row(
        demand,
        machine,
        pes=pes,
        compute=_divide(demand.sample_cycles, computing),
        transmission=max(1, _divide(demand.edge_bytes, links * machine.link_bytes_per_cycle)),
    )


# ----------------------------------------------------------------------------- weight streaming


def _streamed(demands: list[_Demand], program: Program, machine: Machine) -> FabricEstimate:
    samples = program.num_samples
    by_layer: dict[str, list[_Demand]] = {}
    for demand in demands:
        by_layer.setdefault(demand.layer, []).append(demand)
    compute = io = total = 0.0
    slowest = (0.0, "", "")
    for layer, members in by_layer.items():
        for time, work, link in _passes(members, samples, machine):
            compute, io, total = compute + work, io + link, total + time
            kind = "its work" if work >= link else "its weights on the host link"
            slowest = max(slowest, (time, layer or "(no layer)", kind))
    io += _link_cycles(sum(i.spec.num_bytes for i in program.inputs), machine)
    share = slowest[0] / max(total, 1.0)
    why = f"bound most by {slowest[2]} in layer {slowest[1]}: {share:.0%} of the time"
    if io >= total:
        why = "bound by the host link, over which weights, gradients and the batch pass"
    total = max(total, io, 1.0)
    rows = [_streamed_row(demand, samples, machine) for demand in demands]
    per_sample = (max(compute, 1.0) / samples, max(io, 1.0) / samples)
    result = _finish(rows, program, machine, "weight_streaming", total / samples, per_sample, why)
    return replace(result, notes=_memory_notes(demands, samples, machine))


def _passes(
    demands: list[_Demand], samples: int, machine: Machine
) -> list[tuple[float, float, float]]:
    """Forward and backward over one layer, each as cycles (in all, of work, on the link)."""
    weights = _link_cycles(sum(d.cost.weight_bytes for d in demands), machine)
    gradients = _link_cycles(sum(d.cost.gradient_bytes for d in demands), machine)
    forward = sum(d.forward_cycles / _streamed_pes(d, samples, machine) for d in demands)
    backward = sum(d.backward_cycles / _streamed_pes(d, samples, machine) for d in demands)
    passes = [(max(forward, weights), forward, weights)]
    if backward:
        link = max(weights, gradients)
        passes.append((max(backward, link), backward, link))
    return passes


def _streamed_pes(demand: _Demand, samples: int, machine: Machine) -> int:
    return max(1, min(machine.num_pes, demand.cost.parallelism * samples))


def _streamed_row(demand: _Demand, samples: int, machine: Machine) -> KernelRow:
    pes = _streamed_pes(demand, samples, machine)
    streams = 2 if demand.backward_cycles else 1
    link = _link_cycles(demand.cost.weight_bytes * streams, machine)
    return _row(
        demand,
        machine,
        pes=pes,
        compute=max(1.0, (demand.forward_cycles + demand.backward_cycles) / pes) / samples,
        transmission=max(1.0, link) / samples,
    )


def _memory_notes(demands: list[_Demand], samples: int, machine: Machine) -> tuple[str, ...]:
    saved = sum(demand.cost.saved_bytes for demand in demands)
    room = machine.num_pes * machine.data_bytes_per_pe
    if saved <= room:
        return ()
    return (
        f"the activations of a batch of {samples:,} need {saved:,} bytes and the wafer has "
        f"{room:,}: a batch of {max(1, samples * room // saved):,} would fit",
    )


def _link_cycles(num_bytes: int, machine: Machine) -> float:
    return num_bytes * machine.clock_hz / machine.io_bytes_per_second


# ------------------------------------------------------------------------------------- the result


def _row(
    demand: _Demand, machine: Machine, *, pes: int, compute: float, transmission: float
) -> KernelRow:
    """A row whose utilization is filled in when the whole plan's rate is known."""
    return KernelRow(
        name=demand.match.name,
        kernel=demand.match.kernel.name,
        layer=demand.layer,
        pes=pes,
        compute_cycles=float(compute),
        transmission_cycles=float(transmission),
        samples_per_sec=machine.clock_hz / max(compute, transmission),
        compute_samples_per_sec=machine.clock_hz / compute,
        transmission_samples_per_sec=machine.clock_hz / transmission,
        utilization=0.0,
    )


def _finish(
    rows: list[KernelRow],
    program: Program,
    machine: Machine,
    mode: ExecutionMode,
    cycles_per_sample: float,
    bounds: tuple[float, float],
    bottleneck: str,
) -> FabricEstimate:
    rate = machine.clock_hz / cycles_per_sample
    done = tuple(replace(row, utilization=rate / row.compute_samples_per_sec) for row in rows)
    pes = [row.pes for row in done]
    active = sum(pes) if mode == "layer_pipelined" else max(pes, default=0)
    busy = sum(row.pes * row.utilization for row in done)
    return FabricEstimate(
        execution_mode=mode,
        machine=machine.name,
        clock_hz=machine.clock_hz,
        fabric_pes=machine.num_pes,
        num_samples=program.num_samples,
        delta_t=ceil(cycles_per_sample),
        samples_per_sec=rate,
        compute_samples_per_sec=machine.clock_hz / bounds[0],
        transmission_samples_per_sec=machine.clock_hz / bounds[1],
        active_pes=active,
        total_utilization=active / machine.num_pes,
        compute_utilization=busy / sum(pes) if pes else 0.0,
        kernels=done,
        bottleneck=bottleneck,
    )


def _divide(amount: int, by: int) -> int:
    """Division rounded up."""
    return -(-amount // by)

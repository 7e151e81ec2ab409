"""Layer pipelined: all kernels on the wafer at once, one sample after the other.

Decides the stages of the fabric compiler (demands, sizes, floorplan, routes) and what they predict:
cycles per sample, filling and draining, the update, replicas. What a stage does is in its module.

samples/s = clock / T, with T the largest of
    compute:      the slowest kernel on its PEs,
    transmission: the busiest link, the widest tensor on its lanes,
    input:        a batch entry on its link, all of them on the link to the hosts.
A batch of B samples takes filling (the way of the first sample to the loss and back, less what it
overlaps), (B - 1) T, and the update of the slowest kernel. With R replicas each takes B / R samples
on its part of the floor; then gradients are summed over replicas along the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from openwafer.errors import PlanError
from openwafer.graph.program import Program
from openwafer.kernels.kernel import OptimizerCost
from openwafer.kernels.match import KernelGraph
from openwafer.machine.spec import Machine
from openwafer.plan.fabric.demand import Demand, Net, demands_of, nets_of
from openwafer.plan.fabric.floorplan import Floorplan, floorplan
from openwafer.plan.fabric.routes import Routing, lanes_of, route
from openwafer.plan.fabric.sizing import Needs, Sizing, size_kernels
from openwafer.plan.fabric.values import FabricPlan, KernelRow, Prediction, Rectangle
from openwafer.plan.layers import Layer

__all__ = ["plan_pipelined"]


def plan_pipelined(
    layers: Sequence[Layer],
    kernel_graph: KernelGraph,
    program: Program,
    machine: Machine,
    *,
    optimizer: OptimizerCost,
    num_replicas: int = 1,
) -> tuple[FabricPlan, Prediction]:
    """Size, place, route and predict.

    Args:
        num_replicas: copies of the model side by side; -1 takes the number with the highest rate.

    Raises:
        PlanError: the model (or so many replicas) does not fit; says what is short.
    """
    demands = demands_of(kernel_graph, layers, program, machine, optimizer)
    nets = nets_of(kernel_graph, program)
    entry, entry_name = _entry_cycles(program, machine)
    if not demands:
        raise PlanError("the model has no kernel that does work", hint="a model with operations")
    if num_replicas == -1:
        num_replicas = _best_replicas(demands, program, machine, entry, entry_name)
    part = _part_of(machine, num_replicas)
    sizing = size_kernels(demands, part, lowest=entry, lowest_name=entry_name)
    placed = floorplan(demands, nets, sizing, part)
    routing = route(nets, placed.rectangles, placed.cycles, part)
    if routing.max_colors > routing.free_colors:
        raise PlanError(
            f"{routing.max_colors} routes meet at one router and {routing.free_colors} colors are "
            f"free on machine `{machine.name}`",
            hint="a smaller model, or execution_mode: weight_streaming",
        )
    return _result(
        _Compiled(demands, nets, sizing, placed, routing, num_replicas),
        program, machine, part, (entry, entry_name),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Compiled:
    demands: list[Demand]
    nets: list[Net]
    sizing: Sizing
    placed: Floorplan
    routing: Routing
    num_replicas: int


# --------------------------------------------------------------------------------------- replicas


def _part_of(machine: Machine, num_replicas: int) -> Machine:
    """The floor of one replica: the most square of the cuts into so many equal rectangles."""
    if num_replicas == 1:
        return machine
    if num_replicas < 1:
        raise PlanError(f"num_replicas is {num_replicas}", allowed="a positive number, or -1")
    down, across = _cut(machine, num_replicas)
    rows, cols = machine.fabric_rows // down, machine.fabric_cols // across
    if not rows or not cols:
        raise PlanError(
            f"{num_replicas} replicas do not fit machine `{machine.name}`",
            allowed=f"at most {machine.num_pes}",
        )
    return replace(machine, fabric_rows=rows, fabric_cols=cols)


def _cut(machine: Machine, count: int) -> tuple[int, int]:
    cuts = [(down, count // down) for down in range(1, count + 1) if count % down == 0]

    def shape(cut: tuple[int, int]) -> float:
        rows, cols = machine.fabric_rows / cut[0], machine.fabric_cols / cut[1]
        return max(rows / cols, cols / rows)

    return min(cuts, key=shape)


def _best_replicas(
    demands: list[Demand], program: Program, machine: Machine, entry: float, entry_name: str
) -> int:
    """The number of replicas (a divisor of the batch) whose rates add up to most."""
    best, best_rate = 1, 0.0
    host = _host_cycles(program, machine)
    for count in range(1, min(program.num_samples, 256) + 1):
        if program.num_samples % count:
            continue
        try:
            part = _part_of(machine, count)
            sizing = size_kernels(demands, part, lowest=entry, lowest_name=entry_name)
        except PlanError:
            break
        rate = 1 / max(sizing.cycles / count, host)
        if rate > best_rate * 1.02:  # more replicas for a real gain only
            best, best_rate = count, rate
    return best


# ------------------------------------------------------------------------------------------ input


def _entry_cycles(program: Program, machine: Machine) -> tuple[float, str]:
    """Cycles per sample that the batch takes to come in, and which part of it takes them. Each
    tensor has one lane."""
    samples = program.num_samples
    sizes = [(ceil(i.spec.num_bytes / samples), i.path) for i in program.inputs]
    largest, path = max(sizes, default=(0, "nothing"))
    link = ceil(largest / machine.link_bytes_per_cycle)
    host = _host_cycles(program, machine)
    if host > link:
        return host, f"{sum(size for size, _ in sizes):,} bytes per sample on the host links"
    return max(1.0, link), f"batch{path} ({largest:,} bytes per sample on one link)"


def _host_cycles(program: Program, machine: Machine) -> float:
    total = sum(entry.spec.num_bytes for entry in program.inputs) / program.num_samples
    return total * machine.clock_hz / machine.io_bytes_per_second


# ----------------------------------------------------------------------------------------- result


def _result(
    done: _Compiled,
    program: Program,
    machine: Machine,
    part: Machine,
    entry: tuple[float, str],
) -> tuple[FabricPlan, Prediction]:
    arriving = _transmission(done.nets, done.demands, done.placed, part)
    compute = max(done.placed.kernel_cycles)
    step_bound = max(compute, done.placed.cycles if done.sizing.pace < 1 else 0.0)
    transmission = max(*arriving.values(), done.routing.max_load * done.placed.cycles, 1.0)
    count = done.num_replicas
    host = _host_cycles(program, machine)
    cycles = max(step_bound / count, transmission / count, entry[0] / count, host)
    delta_t = ceil(cycles * (1 - 1e-12))
    rate = machine.clock_hz / delta_t
    rows = _rows(done, arriving, machine, rate)
    fabric = _fabric(done, rows, machine, part, rate)
    fill, update = _fill_cycles(done), _update_cycles(done, machine)
    share = ceil(program.num_samples / count)
    batch = (fill + (share - 1) * delta_t * count + update) / machine.clock_hz
    why, relief = _bottleneck(done, rows, cycles, entry, step_bound / count, transmission / count)
    return fabric, Prediction(
        clock_hz=machine.clock_hz,
        delta_t_cycles=delta_t,
        compute_delta_t_cycles=step_bound / count,
        transmission_delta_t_cycles=transmission / count,
        input_delta_t_cycles=max(entry[0] / count, host),
        samples_per_second=rate,
        compute_samples_per_second=machine.clock_hz * count / step_bound,
        transmission_samples_per_second=machine.clock_hz * count / transmission,
        input_samples_per_second=machine.clock_hz / max(entry[0] / count, host),
        batch_seconds=batch,
        batch_samples_per_second=program.num_samples / batch,
        pipeline_depth=max(row.waiting_samples for row in rows),
        fill_cycles=fill,
        update_cycles=update,
        largest_batch=0,
        num_microbatches=1,
        recomputes=False,
        bottleneck=why,
        relief=relief,
        notes=_notes(done),
    )


def _transmission(
    nets: Sequence[Net], demands: Sequence[Demand], placed: Floorplan, machine: Machine
) -> dict[str, float]:
    """Cycles per sample of each kernel's widest tensor on its lanes, in or out."""
    most = {demand.name: 1 for demand in demands}
    for rect in placed.rectangles:
        if rect.role == "kernel":
            most[rect.kernel] = max(rect.width, rect.height)
    cycles = {demand.name: 1.0 for demand in demands}
    for net in nets:
        ends = [*net.targets] if net.from_host else [net.source, *net.targets]
        for name in ends:
            lanes = lanes_of(
                net.num_bytes, placed.cycles, machine, 1 if net.from_host else most[name]
            )
            cycles[name] = max(cycles[name], net.num_bytes / lanes / machine.link_bytes_per_cycle)
    return cycles


def _rows(
    done: _Compiled, arriving: dict[str, float], machine: Machine, rate: float
) -> tuple[KernelRow, ...]:
    needs = Needs(done.demands, machine)
    memory, waiting = needs.memory(done.placed.pace), needs.waiting_samples(done.placed.pace)
    group_of = {i: _group_name(done.demands, g) for g in done.placed.groups for i in g}
    rows: list[KernelRow] = []
    for index, demand in enumerate(done.demands):
        cycles = max(done.placed.kernel_cycles[index], 1.0)
        forward = cycles * demand.forward / demand.work if demand.work else 0.0
        pes = done.placed.pes[index]
        compute = machine.clock_hz / cycles
        transmission = machine.clock_hz / arriving[demand.name]
        rows.append(
            KernelRow(
                name=demand.name,
                kernel=demand.match.kernel.name,
                layer=demand.layer,
                group=group_of[index],
                pes=pes,
                transport_pes=done.placed.transport_pes[index],
                forward_cycles=forward,
                backward_cycles=cycles - forward,
                update_cycles=demand.update / max(1, pes),
                compute_cycles=cycles,
                transmission_cycles=arriving[demand.name],
                samples_per_second=min(compute, transmission),
                compute_samples_per_second=compute,
                transmission_samples_per_second=transmission,
                memory_bytes=ceil(float(memory[index])),
                memory_room=pes * machine.data_bytes_per_pe,
                waiting_samples=float(waiting[index]),
                utilization=min(1.0, rate / done.num_replicas / compute),
            )
        )
    return tuple(rows)


def _group_name(demands: Sequence[Demand], members: Sequence[int]) -> str:
    """The module that a block's first dense kernel is in, as far as it lies inside its layer; the
    layer's name else."""
    first = next((demands[i] for i in members if demands[i].macs > 0), demands[members[0]])
    module = first.module.rpartition(".")[0] if first.grid else first.module
    if module.startswith(first.layer) and module:
        return module
    return first.layer or first.name


def _fabric(
    done: _Compiled,
    rows: tuple[KernelRow, ...],
    machine: Machine,
    part: Machine,
    rate: float,
) -> FabricPlan:
    used = sum(row.pes + row.transport_pes for row in rows)
    busy = sum(row.pes * row.utilization for row in rows)
    active = used * done.num_replicas
    return FabricPlan(
        fabric_rows=machine.fabric_rows,
        fabric_cols=machine.fabric_cols,
        fabric_pes=machine.num_pes,
        active_pes=active,
        active_fraction=active / machine.num_pes,
        utilization=busy / used if used else 0.0,
        num_replicas=done.num_replicas,
        kernels=rows,
        rectangles=_replicated(done, machine, part),
        wire_length=done.routing.byte_hops * done.num_replicas,
        max_link_load=done.routing.max_load,
        max_colors=done.routing.max_colors,
        free_colors=done.routing.free_colors,
        area_bound_cycles=done.placed.bound_cycles,
    )


def _replicated(done: _Compiled, machine: Machine, part: Machine) -> tuple[Rectangle, ...]:
    if done.num_replicas == 1:
        return done.placed.rectangles
    down, across = _cut(machine, done.num_replicas)
    return tuple(
        replace(
            rect,
            x=rect.x + column * part.fabric_cols,
            y=rect.y + row * part.fabric_rows,
            replica=row * across + column,
        )
        for row in range(down)
        for column in range(across)
        for rect in done.placed.rectangles
    )


def _fill_cycles(done: _Compiled) -> float:
    """The first sample's way to the loss and back."""
    steps = max(demand.steps_after + demand.step for demand in done.demands)
    ways = 2 if any(demand.backward for demand in done.demands) else 1
    return ways * steps * done.placed.pace * done.placed.cycles + done.placed.cycles


def _update_cycles(done: _Compiled, machine: Machine) -> float:
    """The slowest kernel's update; with replicas, its gradients' sum along a line of replicas."""
    own = max(d.update / max(1, p) for d, p in zip(done.demands, done.placed.pes, strict=True))
    if done.num_replicas == 1 or not any(d.update for d in done.demands):
        return own
    largest = max(
        d.cost.gradient_bytes / max(1, p)
        for d, p in zip(done.demands, done.placed.pes, strict=True)
    )
    span = (machine.fabric_rows + machine.fabric_cols) * machine.hop_latency_cycles
    down, across = _cut(machine, done.num_replicas)
    # Each PE's gradients go to the next replica and back, all links of a cut side by side; a link
    # carries those of all PEs of its line in one replica.
    line = max(machine.fabric_rows // down, machine.fabric_cols // across)
    return own + span + 2 * largest * line / machine.link_bytes_per_cycle


def _bottleneck(
    done: _Compiled,
    rows: tuple[KernelRow, ...],
    cycles: float,
    entry: tuple[float, str],
    compute: float,
    transmission: float,
) -> tuple[str, str]:
    """What bounds the rate, and what would help."""
    if cycles > max(compute, transmission) * (1 + 1e-9) or (
        done.sizing.bound == entry[1] and entry[0] / done.num_replicas >= cycles * (1 - 1e-9)
    ):
        return (
            f"bound by the batch entering the wafer: {entry[1]} takes {entry[0]:,.0f} cycles",
            "a narrower dtype for the batch, or replicas with lanes of their own (num_replicas)",
        )
    if transmission >= compute and transmission >= cycles * (1 - 1e-9):
        if done.routing.max_load * done.placed.cycles / done.num_replicas >= transmission:
            return (
                f"bound by the busiest link: {transmission:,.0f} cycles",
                "smaller tensors between kernels, or a larger floor",
            )
        row = max(rows, key=lambda r: r.transmission_cycles)
        return (
            f"bound by transmission at {row.name} (layer {row.layer or 'none'}): "
            f"{transmission:,.0f} cycles",
            "a smaller tensor there, or a layout with wider edges",
        )
    if done.placed.pace < 0.999:
        row = max(rows, key=lambda r: r.waiting_samples * (r.memory_bytes > 0))
        return (
            f"bound by memory: up to {row.waiting_samples:,.0f} samples wait for their backward "
            f"pass (at {row.name}), so that kernels idle {1 - done.placed.pace:.0%} of the time",
            "fewer layers, shorter sequences, or execution_mode: weight_streaming",
        )
    row = max(rows, key=lambda r: r.compute_cycles)
    where = f"bound by {row.name} (layer {row.layer or 'none'}): {row.compute_cycles:,.0f} cycles"
    if done.sizing.bound != "area":
        return (
            where + "; more PEs would not speed it up",
            "replicas use the idle PEs (num_replicas)",
        )
    return where + "; all PEs are given out", "a larger floor, or a model with less work"


def _notes(done: _Compiled) -> tuple[str, ...]:
    if done.routing.max_load > 1:
        return (f"the busiest link is asked for {done.routing.max_load:.1f} times what it carries",)
    return ()

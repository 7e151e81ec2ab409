"""How many PEs each kernel gets: the cycles per sample T that the whole model can keep.

Decides T and the speed of the kernels from work and memory, before anything has a shape. Does not
decide heights and widths (blocks.py) or places (floorplan.py).

For T cycles per sample, a kernel needs the larger of
    work:   its PE-cycles over the cycles that it may take, and
    memory: weights, gradients and optimizer state, and the activations of every sample that waits
            for its backward pass, over a PE's memory.
By Little's law the samples that wait are the way to the loss and back over T. That way is made of
the kernels that need a whole sample before they give anything (demand.py), so these may have to be
faster than T: with more of them than memory allows, the model takes PEs to shorten the way, T grows
with the third power of the depth, and most PEs wait (the collapse of the deep models in the public
sweep). `pace` is the cycles of such a step over T; the sizing chooses the one that needs the fewest
PEs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from openwafer.errors import PlanError
from openwafer.machine.spec import Machine
from openwafer.plan.fabric.demand import Demand

__all__ = ["Needs", "Sizing", "size_kernels"]

_PACES = np.geomspace(1.0, 1e-4, 90)
_SLOWEST = 1e13
"""Cycles per sample beyond which a model is said not to fit (three hours a sample)."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """cycles: T that the search starts from. pace: see the module header.

    floor_cycles: no placement of these kernels can go below this: all of the floor's PEs at work or
        full, no transport, no tile rounded up.
    bound: "area" where all PEs are asked for, else the name of what else sets T.
    """

    cycles: float
    floor_cycles: float
    pace: float
    bound: str


class Needs:
    """The kernels' demands as arrays, one entry a kernel."""

    def __init__(self, demands: Sequence[Demand], machine: Machine) -> None:
        self.work = np.array([d.work for d in demands])
        self.static = np.array([float(d.static_bytes) for d in demands])
        self.waiting = np.array([d.waiting_bytes for d in demands])
        self.after = np.array([d.steps_after for d in demands])
        self.steps = [d.step >= 0.5 and d.positions > 1 for d in demands]
        self.is_step = np.array(self.steps)
        self.is_dense = np.array([d.macs > 0 for d in demands])
        self.machine = machine
        self._pes: dict[tuple[float, float], _Floats] = {}
        self._memory: dict[float, _Floats] = {}
        self._listed: dict[tuple[float, float], tuple[list[float], list[float]]] = {}

    def cycles(self, target: float, pace: float) -> _Floats:
        """Cycles per sample that each kernel may take."""
        return np.where(self.is_step, target * pace, target)

    def waiting_samples(self, pace: float) -> _Floats:
        """Samples between a kernel's forward and its backward pass, at most."""
        return 1.0 + 2.0 * self.machine.waiting_per_step * pace * self.after

    def memory(self, pace: float) -> _Floats:
        """Bytes that each kernel holds."""
        known = self._memory.get(pace)
        if known is None:
            known = self.static + self.waiting * self.waiting_samples(pace)
            self._memory[pace] = known
        return known

    def pes(self, target: float, pace: float) -> _Floats:
        """PEs that each kernel needs, as a fraction, without transport."""
        known = self._pes.get((target, pace))
        if known is None:
            memory = self.memory(pace) / self.machine.data_bytes_per_pe
            work = self.work / self.cycles(target, pace)
            known = self._pes[target, pace] = np.maximum(np.maximum(work, memory), 1.0)
        return known

    def listed(self, target: float, pace: float) -> tuple[list[float], list[float]]:
        """PEs and bytes of each kernel as plain numbers, which single look-ups are faster in."""
        known = self._listed.get((target, pace))
        if known is None:
            known = (self.pes(target, pace).tolist(), self.memory(pace).tolist())
            self._listed[target, pace] = known
        return known

    def area(self, target: float, pace: float) -> float:
        """PEs of all kernels with their transport columns, if each were a square."""
        pes = self.pes(target, pace)
        beside = self.machine.transport_columns * np.sqrt(pes) * (self.is_dense & (pes > 16))
        return float((pes + beside).sum())

    def least_pes(self, target: float) -> float:
        """PEs by work and memory alone, at the pace that needs the fewest."""
        fewest = min(float(self.pes(target, float(pace)).sum()) for pace in _PACES)
        self._pes.clear()
        return fewest

    def best_pace(self, target: float) -> tuple[float, float]:
        """The pace that needs the fewest PEs, and these."""
        areas = [self.area(target, float(pace)) for pace in _PACES]
        self._pes.clear()
        best = int(np.argmin(areas))
        return float(_PACES[best]), areas[best]


def size_kernels(
    demands: Sequence[Demand], machine: Machine, *, lowest: float, lowest_name: str
) -> Sizing:
    """The smallest T whose PEs fit the floor (`max_fill` of it).

    Args:
        lowest, lowest_name: a bound from elsewhere (the batch coming in), and what it is.

    Raises:
        PlanError: the model does not fit at any rate; says what is short.
    """
    needs = Needs(demands, machine)
    low, bound = lowest, lowest_name
    for demand in demands:
        cycles = least_cycles(demand, machine)
        if cycles > low:
            low, bound = cycles, demand.name
    room = machine.num_pes * machine.max_fill
    if needs.best_pace(low)[1] <= room:
        pace = needs.best_pace(low)[0]
        return Sizing(cycles=low, floor_cycles=low, pace=pace, bound=bound)
    if needs.best_pace(_SLOWEST)[1] > room:
        raise _does_not_fit(demands, needs, machine)
    _, high = _bisect(low, _SLOWEST, lambda cycles: needs.best_pace(cycles)[1] <= room)
    least, _ = _bisect(low, high, lambda cycles: needs.least_pes(cycles) <= machine.num_pes)
    pace = needs.best_pace(high)[0]
    return Sizing(cycles=high, floor_cycles=least, pace=pace, bound="area")


def _bisect(low: float, high: float, fits: Callable[[float], bool]) -> tuple[float, float]:
    """Around the smallest number that fits: the largest known not to (or `low`), and one that
    does."""
    if fits(low):
        return low, low
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        if fits(middle):
            high = middle
        else:
            low = middle
    return low, high


def least_cycles(demand: Demand, machine: Machine) -> float:
    """Cycles per sample that a kernel takes on as many PEs as can be of use."""
    cycles = demand.work / demand.parallelism
    if demand.row_cycles:
        edge = max(machine.fabric_rows, machine.fabric_cols)
        rate = machine.vector_ops_per_cycle.float32
        cycles = max(
            cycles, demand.positions * ceil(demand.width / edge) * demand.row_cycles / rate
        )
    return cycles


def _does_not_fit(demands: Sequence[Demand], needs: Needs, machine: Machine) -> PlanError:
    memory = needs.memory(float(_PACES[-1]))
    needed, room = int(memory.sum()), int(machine.data_bytes * machine.max_fill)
    largest = sorted(zip(memory, demands, strict=True), key=lambda pair: -pair[0])[:3]
    named = ", ".join(f"{d.name} of layer {d.layer or '(none)'} {b:,.0f}" for b, d in largest)
    weights = int(needs.static.sum())
    short = (
        f"memory is short: weights, gradients and optimizer state take {weights:,} bytes and the "
        f"activations of one sample {needed - weights:,}; PEs for kernels hold {room:,}"
        if needed > room
        else f"PEs are short: {len(demands):,} kernels need {needs.best_pace(_SLOWEST)[1]:,.0f}, "
        f"{machine.num_pes * machine.max_fill:,.0f} are there for kernels"
    )
    return PlanError(
        f"the model does not fit machine `{machine.name}` in layer_pipelined mode: {short}. "
        f"The largest: {named} bytes",
        hint="execution_mode: weight_streaming, or a smaller model",
    )

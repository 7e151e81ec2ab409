"""Routes between kernels: which links they load and how many colors meet at a router.

Decides the way of each connection over the mesh: of a few ways with at most two bends, the least
loaded one; connections that meet too many others are laid again. A tensor with several readers is
one tree (routers copy for nothing), its gradient the same tree backwards. Does not decide places.

A connection with more bytes per sample than one link carries in that time has several lanes side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from openwafer.machine.spec import Machine
from openwafer.plan.fabric.demand import Net
from openwafer.plan.fabric.values import Rectangle

__all__ = ["KERNEL_COLORS", "Routing", "lanes_of", "route"]

KERNEL_COLORS = 5
"""Colors that a kernel needs for itself: a two-dimensional reduction with its broadcast takes up to
five (arXiv 2404.15888). Routes may use the others."""
_ROUNDS = 6
_LANE_LOAD = 0.5
_BENDS = (0.5, 0.25, 0.75)

_Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Routing:
    """max_load: bytes per cycle of the busiest link over what a link carries. byte_hops: sum over
    connections of bytes per sample times hops, forward and backward."""

    max_load: float
    max_colors: int
    free_colors: int
    byte_hops: float


def lanes_of(num_bytes: float, cycles: float, machine: Machine, most: int) -> int:
    """Links side by side that carry so many bytes in so many cycles, at least one; up to `most`,
    twice as many as would just do, so that two connections may share a link."""
    needed = num_bytes / (cycles * machine.link_bytes_per_cycle) / _LANE_LOAD
    return max(1, min(most, ceil(needed - 1e-9)))


def route(
    nets: Sequence[Net],
    rectangles: Sequence[Rectangle],
    cycles: float,
    machine: Machine,
) -> Routing:
    """Lay all connections for `cycles` per sample. Batch entries come in at x = 0."""
    mesh = _Mesh(machine)
    jobs = _jobs(nets, rectangles, cycles, machine)
    laid: list[_Laid] = [mesh.lay(job) for job in jobs]
    free = machine.free_colors - KERNEL_COLORS
    for _ in range(_ROUNDS):
        bad = [i for i, one in enumerate(laid) if mesh.is_over(one, free)]
        if not bad:
            break
        for index in bad:
            mesh.lift(laid[index], jobs[index])
            laid[index] = mesh.lay(jobs[index], careful=True)
    hops = sum(
        one.links.size * job.load * cycles * job.passes for one, job in zip(laid, jobs, strict=True)
    )
    return Routing(
        max_load=float(mesh.loads.max(initial=0.0)) / machine.link_bytes_per_cycle,
        max_colors=int(mesh.colors.max(initial=0)),
        free_colors=free,
        byte_hops=float(hops),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One tree to lay. load: bytes per cycle of each lane. passes: 2 with a gradient."""

    source: tuple[int, int]
    targets: tuple[tuple[int, int], ...]
    lanes: int
    load: float
    passes: int


@dataclass(frozen=True, slots=True)
class _Laid:
    """links: indices into `_Mesh.loads`, forward. routers: into `_Mesh.colors`."""

    links: _Indices
    routers: _Indices


def _jobs(
    nets: Sequence[Net], rectangles: Sequence[Rectangle], cycles: float, machine: Machine
) -> list[_Job]:
    ports = _Ports(rectangles)
    jobs: list[_Job] = []
    for net in nets:
        if net.num_bytes <= 0:
            continue
        targets = tuple(ports.of(name) for name in net.targets)
        if net.from_host:
            source, most = (0, targets[0][1]), 1
        else:
            source, most = ports.of(net.source), ports.edge(net.source)
        lanes = lanes_of(net.num_bytes, cycles, machine, most)
        load = net.num_bytes / cycles / lanes
        jobs.append(_Job(source, targets, lanes, load, 2 if net.has_gradient else 1))
    return sorted(jobs, key=lambda job: -job.load * job.lanes)


class _Ports:
    """Where connections begin and end: beside one another along a rectangle's longer side, from
    its middle outward."""

    def __init__(self, rectangles: Sequence[Rectangle]) -> None:
        self.at = {r.kernel: r for r in rectangles if r.role == "kernel"}
        self.used: dict[str, int] = {}

    def edge(self, name: str) -> int:
        return max(self.at[name].width, self.at[name].height)

    def of(self, name: str) -> tuple[int, int]:
        rect = self.at[name]
        count = self.used[name] = self.used.get(name, -1) + 1
        length = max(rect.width, rect.height)
        away = (count + 1) // 2 * max(1, length // 8)
        offset = (length // 2 + (away if count % 2 else -away)) % length
        if rect.width >= rect.height:
            return rect.x + offset, rect.y + rect.height // 2
        return rect.x + rect.width // 2, rect.y + offset


class _Mesh:
    """Loads of all links [direction, y, x] (east, west, north, south) and colors [y, x]."""

    def __init__(self, machine: Machine) -> None:
        self.rows, self.cols = machine.fabric_rows, machine.fabric_cols
        self.size = self.rows * self.cols
        self.loads = np.zeros(4 * self.size)
        self.colors = np.zeros(self.size, dtype=np.int32)
        self.capacity = machine.link_bytes_per_cycle

    def lay(self, job: _Job, *, careful: bool = False) -> _Laid:
        links: list[_Indices] = []
        routers: list[_Indices] = []
        for target in job.targets:
            best: tuple[float, _Indices, _Indices] | None = None
            for ways in self._ways(job.source, target, careful):
                cost = self._cost(*ways)
                if best is None or cost < best[0]:
                    best = (cost, *ways)
            assert best is not None
            for lane in range(job.lanes):
                shift = self._shift(job.source, target, lane - job.lanes // 2)
                links.append(self._moved(best[1], shift))
                routers.append(np.mod(best[2] + shift, self.size))
        laid = _Laid(np.unique(np.concatenate(links)), np.unique(np.concatenate(routers)))
        self._add(laid, job, 1)
        return laid

    def lift(self, laid: _Laid, job: _Job) -> None:
        self._add(laid, job, -1)

    def is_over(self, laid: _Laid, free: int) -> bool:
        return bool(
            (self.colors[laid.routers] > free).any()
            or (self.loads[laid.links] > self.capacity * 1.0001).any()
        )

    def _add(self, laid: _Laid, job: _Job, sign: int) -> None:
        self.loads[laid.links] += sign * job.load
        self.colors[laid.routers] += sign * job.passes
        if job.passes == 2:
            self.loads[self._reversed(laid.links)] += sign * job.load

    def _reversed(self, links: _Indices) -> _Indices:
        """The links of the other direction between the same routers."""
        direction, place = np.divmod(links, self.size)
        step = np.array([1, -1, self.cols, -self.cols])[direction]
        return (direction ^ 1) * self.size + np.mod(place + step, self.size)

    def _moved(self, links: _Indices, shift: int) -> _Indices:
        direction, place = np.divmod(links, self.size)
        return direction * self.size + np.mod(place + shift, self.size)

    def _shift(self, source: tuple[int, int], target: tuple[int, int], lane: int) -> int:
        """Where a lane beside the first lies: across the longer part of the way."""
        wide = abs(target[0] - source[0]) >= abs(target[1] - source[1])
        return lane * (self.cols if wide else 1)

    def _cost(self, links: _Indices, routers: _Indices) -> float:
        if not routers.size:
            return 0.0
        full = float(self.colors[routers].max()) + 4.0 * float(
            self.loads[links].max(initial=0.0) / self.capacity
        )
        return full * 1e6 + routers.size

    def _ways(
        self, source: tuple[int, int], target: tuple[int, int], careful: bool
    ) -> list[tuple[_Indices, _Indices]]:
        (x0, y0), (x1, y1) = source, target
        corners: list[list[tuple[int, int]]] = [
            [(x0, y0), (x1, y0), (x1, y1)],
            [(x0, y0), (x0, y1), (x1, y1)],
        ]
        for part in _BENDS:
            x, y = round(x0 + part * (x1 - x0)), round(y0 + part * (y1 - y0))
            corners.append([(x0, y0), (x, y0), (x, y1), (x1, y1)])
            corners.append([(x0, y0), (x0, y), (x1, y), (x1, y1)])
        if careful:
            for off in (-40, -17, -7, -3, 3, 7, 17, 40):
                x = min(max(x0 + off, 0), self.cols - 1)
                y = min(max(y0 + off, 0), self.rows - 1)
                corners.append([(x0, y0), (x, y0), (x, y1), (x1, y1)])
                corners.append([(x0, y0), (x0, y), (x1, y), (x1, y1)])
        return [self._path(way) for way in corners]

    def _path(self, corners: Sequence[tuple[int, int]]) -> tuple[_Indices, _Indices]:
        links: list[_Indices] = []
        routers: list[_Indices] = []
        for (x0, y0), (x1, y1) in pairwise(corners):
            if y0 == y1:
                step = 1 if x1 >= x0 else -1
                xs = np.arange(x0, x1, step)
                places = y0 * self.cols + xs
                direction = 0 if step > 0 else 1
            else:
                step = 1 if y1 >= y0 else -1
                places = np.arange(y0, y1, step) * self.cols + x0
                direction = 2 if step > 0 else 3
            links.append(direction * self.size + places)
            routers.append(places)
        routers.append(np.array([corners[-1][1] * self.cols + corners[-1][0]]))
        return np.concatenate(links), np.concatenate(routers)

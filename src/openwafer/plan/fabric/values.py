"""What the fabric compiler gives: the fabric with its rectangles, and the prediction.

Decides the values and their units. Does not decide how they come about (pipelined.py, streaming.py)
or how they read (plan/text.py, plan/report_html.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FabricPlan", "KernelRow", "LayerTime", "Prediction", "Rectangle", "SystemsRate"]

Role = Literal["kernel", "transport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Cores that one kernel has, in units of PEs from a corner of the floor.

    role: `transport` for the columns beside a kernel that hand its data in and out.
    replica: 0 for the first copy of the model.
    """

    kernel: str
    x: int
    y: int
    width: int
    height: int
    role: Role = "kernel"
    replica: int = 0

    @property
    def pes(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One kernel. Cycles are per sample but for `update_cycles`, which are per batch.

    group: the block that it is placed with; its parent in the compile report.
    pes, transport_pes: PEs that compute, and that hand data in and out.
    compute_cycles: forward and backward together, on its PEs.
    memory_bytes, memory_room: what it holds, and what its PEs can hold.
    waiting_samples: samples whose activations it keeps for their backward pass, at most.
    utilization: the whole plan's samples/s over this kernel's compute samples/s. It tells how well
        the kernel is balanced against the slowest, not what share of the arithmetic peak it reaches
        (the meaning that the compile reports of release 1.6 have).
    """

    name: str
    kernel: str
    layer: str
    group: str
    pes: int
    transport_pes: int
    forward_cycles: float
    backward_cycles: float
    update_cycles: float
    compute_cycles: float
    transmission_cycles: float
    samples_per_second: float
    compute_samples_per_second: float
    transmission_samples_per_second: float
    memory_bytes: int
    memory_room: int
    waiting_samples: float
    utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricPlan:
    """The floor and what is on it.

    fabric_rows, fabric_cols, fabric_pes: the floor.
    active_pes: PEs in use, transport too; the most at one time in weight streaming.
    active_fraction: of the floor's PEs.
    utilization: mean of the kernels' utilization, weighted by PEs; transport PEs count as idle.
    kernels: the kernels that do work, in execution order (of the first replica).
    rectangles: where they are.
    wire_length: sum over connections of bytes per sample times hops.
    max_link_load: the busiest link's bytes per cycle over what a link carries.
    max_colors: the most routes through one router; `free_colors` are there.
    area_bound_cycles: cycles per sample that no placement of these kernels could go below: work and
        memory alone on all of the floor (of one replica).
    """

    fabric_rows: int
    fabric_cols: int
    fabric_pes: int
    active_pes: int
    active_fraction: float
    utilization: float
    num_replicas: int
    kernels: tuple[KernelRow, ...]
    rectangles: tuple[Rectangle, ...]
    wire_length: float
    max_link_load: float
    max_colors: int
    free_colors: int
    area_bound_cycles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Weight streaming: one pass over one layer, for one batch.

    compute_seconds, weight_seconds, gradient_seconds: each on its own; `seconds` is what the pass
        takes, `start_seconds` when it begins in the step.
    """

    layer: str
    phase: Literal["forward", "backward"]
    start_seconds: float
    seconds: float
    compute_seconds: float
    weight_seconds: float
    gradient_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemsRate:
    """Weight streaming on several systems, each with its share of the batch."""

    num_systems: int
    step_seconds: float
    samples_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How fast it will go.

    delta_t_cycles: cycles per sample in steady state, rounded up: the largest of the three bounds
        `compute_`, `transmission_` and `input_delta_t_cycles`. In weight streaming, where each
        layer has its own bound, it can be above all three.
    samples_per_second and its parts: clock over these cycles. The meaning of the compile reports.
    batch_seconds, batch_samples_per_second: one whole batch: layer pipelined, filling and draining
        the pipeline and the update too; weight streaming, the step.
    pipeline_depth: samples between the first and the last kernel and back (0: not pipelined).
    fill_cycles, update_cycles: layer pipelined: once per batch.
    largest_batch: samples whose activations fit the wafer (0: no limit in this mode).
    num_microbatches: parts that the batch is cut into because of that.
    recomputes: weight streaming: whether the forward pass is done again in the backward pass.
    bottleneck, relief: what bounds it, and what would help; one sentence each.
    timeline: weight streaming: the passes of one step.
    systems: weight streaming: the same batch on 1 ... N systems.
    """

    clock_hz: int
    delta_t_cycles: int
    compute_delta_t_cycles: float
    transmission_delta_t_cycles: float
    input_delta_t_cycles: float
    samples_per_second: float
    compute_samples_per_second: float
    transmission_samples_per_second: float
    input_samples_per_second: float
    batch_seconds: float
    batch_samples_per_second: float
    pipeline_depth: float
    fill_cycles: float
    update_cycles: float
    largest_batch: int
    num_microbatches: int
    recomputes: bool
    bottleneck: str
    relief: str
    notes: tuple[str, ...] = ()
    timeline: tuple[LayerTime, ...] = ()
    systems: tuple[SystemsRate, ...] = ()

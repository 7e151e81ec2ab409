"""A plan as text: for the terminal, and as compile_report.txt.

Decides how plans read and how repeated layers are folded. Computes nothing that is not in the plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from openwafer.plan.fabric.values import KernelRow
from openwafer.plan.plan import LayerPipelinedSchedule, LayerPlan, Plan

__all__ = ["LayerGroup", "compile_report", "fold_layers", "format_bytes", "plan_text", "table"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Neighbouring layers with the same structure."""

    layers: tuple[LayerPlan, ...]

    @property
    def label(self) -> str:
        """`fc_layers.0 … 9 ×10` for copies, the name alone for one layer."""
        first, last = self.layers[0].name, self.layers[-1].name
        if len(self.layers) == 1:
            return first
        return f"{first} … {_short_last(first, last)} ×{len(self.layers)}"


def _short_last(first: str, last: str) -> str:
    """What of the last name differs: its number, where that is all."""
    pattern = re.compile(r"^(.*?)(\d+)$")
    begin, end = pattern.match(first), pattern.match(last)
    same_stem = begin is not None and end is not None and begin.group(1) == end.group(1)
    return end.group(2) if same_stem and end is not None else last


def fold_layers(layers: Sequence[LayerPlan]) -> tuple[LayerGroup, ...]:
    """Runs of neighbouring layers that have the same structure."""
    runs: list[list[LayerPlan]] = []
    for layer in layers:
        if runs and runs[-1][-1].structure == layer.structure:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return tuple(LayerGroup(tuple(run)) for run in runs)


def compile_report(plan: Plan) -> str:
    """compile_report.txt: the overall block, then the kernels in the blocks that they are placed
    in. A block's numbers are its slowest kernel's, the sum of its PEs, and the mean of its kernels'
    utilization weighted by PEs (its transport PEs count as idle)."""
    total, fabric = plan.predicted, plan.fabric
    head = [
        ("Samples/s", f"{total.samples_per_second:.1f}"),
        ("Compute Samples/s", f"{total.compute_samples_per_second:.1f}"),
        ("Transmission Samples/s", f"{total.transmission_samples_per_second:.1f}"),
        ("Active PEs", _percent(fabric.active_fraction)),
        ("Compute Utilization", _percent(fabric.utilization)),
    ]
    lines = [f"Estimated performance ({plan.execution_mode}, {plan.machine})"]
    lines.extend(f"  {label + ':':<24} {value}" for label, value in head)
    lines.extend(["", table(_report_rows(plan)), ""])
    lines.extend(f"{label + ':':<26} {value}" for label, value in _report_foot(plan))
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "Kernel Name", "Samples/s", "Compute Samples/s", "Transmission Samples/s",
    "Active PEs", "Compute Utilization",
)  # fmt: skip


def _report_rows(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    groups: dict[str, list[KernelRow]] = {}
    for row in plan.fabric.kernels:
        groups.setdefault(row.group, []).append(row)
    for name, members in groups.items():
        rows.append(_cells(name or "(top)", members))
        rows.extend(_cells(f"  {row.name}", [row], transport=False) for row in members)
        beside = sum(row.transport_pes for row in members)
        if beside:
            rows.append(("  transport", "", "", "", f"{beside}", "0%"))
    return rows


def _cells(name: str, rows: Sequence[KernelRow], *, transport: bool = True) -> tuple[str, ...]:
    pes = sum(row.pes for row in rows)
    used = pes + sum(row.transport_pes for row in rows) if transport else pes
    busy = sum(row.pes * row.utilization for row in rows)
    return (
        name,
        f"{min(row.samples_per_second for row in rows):.1f}",
        f"{min(row.compute_samples_per_second for row in rows):.1f}",
        f"{min(row.transmission_samples_per_second for row in rows):.1f}",
        f"{used}",
        _percent(busy / max(1, used)),
    )


def _report_foot(plan: Plan) -> list[tuple[str, str]]:
    total, fabric = plan.predicted, plan.fabric
    foot = [("Bottleneck", total.bottleneck), ("Would help", total.relief)]
    foot.append(
        ("Batch Samples/s", f"{total.batch_samples_per_second:.1f} (batch {plan.num_samples:,})")
    )
    if plan.execution_mode == "layer_pipelined":
        foot.append(("Input Samples/s", f"{total.input_samples_per_second:.1f}"))
        foot.append(
            (
                "Pipeline fill, update",
                f"{total.fill_cycles:,.0f}, {total.update_cycles:,.0f} cycles",
            )
        )
        foot.append(("Replicas", f"{fabric.num_replicas}"))
        bound = fabric.area_bound_cycles
        slowest = total.delta_t_cycles * fabric.num_replicas
        foot.append(
            (
                "Distance to the bound",
                f"{slowest / max(1, bound):.3f} (work and memory alone need {bound:,} cycles)",
            )
        )
        foot.append(("Busiest link", _percent(fabric.max_link_load)))
        foot.append(("Colors at one router", f"{fabric.max_colors} of {fabric.free_colors} free"))
    else:
        foot.append(("Largest batch", f"{total.largest_batch:,}"))
        rates = ", ".join(f"{s.num_systems}: {s.samples_per_second:.1f}" for s in total.systems)
        foot.append(("Samples/s by systems", rates))
    return foot + [("Note", note) for note in total.notes]


def plan_text(plan: Plan) -> str:
    """The plan for the terminal: summary, memory, schedule, layers with copies folded."""
    total, fabric = plan.predicted, plan.fabric
    lines = [
        f"{plan.model_name}: {plan.num_parameters:,} parameters in {len(plan.layers)} layers, "
        f"batch {plan.num_samples:,}, {'training' if plan.training else 'evaluation'}",
        f"{plan.execution_mode} on {plan.machine}  (plan {plan.hash[:12]})",
        f"  delta-t  {total.delta_t_cycles:,} cycles per sample, "
        f"{total.samples_per_second:,.1f} samples/s"
        f"{_batch_rate(plan)}",
        f"  PEs      {fabric.active_pes:,} of {fabric.fabric_pes:,} "
        f"({_percent(fabric.active_fraction)})"
        + (f" in {fabric.num_replicas} replicas" if fabric.num_replicas > 1 else ""),
        f"  limit    {total.bottleneck}",
        *(f"  memory   {line}" for line in _memory_lines(plan)),
        f"  order    {_schedule_line(plan)}",
        *(f"  note     {note}" for note in total.notes),
        "",
        _layer_table(plan),
    ]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first left, the others right aligned; the first row is the
    head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def format_bytes(count: int) -> str:
    """`1.5 MiB`; exact below one KiB."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def _batch_rate(plan: Plan) -> str:
    """With filling and update, where that makes a difference."""
    total = plan.predicted
    if total.batch_samples_per_second > 0.995 * total.samples_per_second:
        return ""
    return f" ({total.batch_samples_per_second:,.1f} over a whole batch)"


def _memory_lines(plan: Plan) -> list[str]:
    lines: list[str] = []
    for tier, uses in plan.memory.items():
        total = sum(uses.values())
        if total:
            parts = ", ".join(f"{use} {format_bytes(n)}" for use, n in uses.items() if n)
            lines.append(f"{tier} {format_bytes(total)} ({parts})")
    return lines


def _schedule_line(plan: Plan) -> str:
    schedule = plan.schedule
    if isinstance(schedule, LayerPipelinedSchedule):
        return f"stages {schedule.num_stages}, microbatches {schedule.num_microbatches}"
    passes = "forward and backward" if schedule.backward else "forward"
    return (
        f"{len(schedule.forward)} layers {passes}, {schedule.prefetch_depth} ahead, "
        f"{schedule.num_slots} slots of {format_bytes(schedule.slot_bytes)}"
    )


def _layer_table(plan: Plan) -> str:
    rows = [("Layer", "Parameters", "Forward MACs", "Kernels", "PEs")]
    pes = {row.name: row.pes for row in plan.kernels}
    for group in fold_layers(plan.layers):
        layers = group.layers
        in_use = [sum(pes[name] for name in layer.kernels) for layer in layers]
        if plan.execution_mode == "weight_streaming":  # one kernel after the other
            in_use = [max((pes[name] for name in layer.kernels), default=0) for layer in layers]
        rows.append(
            (
                group.label,
                f"{sum(layer.num_parameters for layer in layers):,}",
                f"{sum(layer.forward_macs for layer in layers):,}",
                f"{sum(len(layer.kernels) for layer in layers):,}",
                f"{_sum_or_max(in_use, plan):,}",
            )
        )
    return table(rows)


def _sum_or_max(pes: list[int], plan: Plan) -> int:
    return max(pes) if plan.execution_mode == "weight_streaming" else sum(pes)


def _percent(fraction: float) -> str:
    """Whole per cents, as the reports of release 1.6 have them; two digits for small ones."""
    percent = 100 * fraction
    return f"{percent:.0f}%" if percent >= 10 or percent == 0 else f"{percent:.2g}%"

"""The pictures of report.html, as SVG: floorplan to scale, memory per kernel, a step's timeline.

Decides their form. They read without a script (colors and titles are in them) and so on paper; the
script adds zoom, another coloring and a line with the numbers of the kernel that is pointed at.
"""

from __future__ import annotations

from html import escape

from openwafer.plan.fabric.values import KernelRow, LayerTime
from openwafer.plan.plan import Plan
from openwafer.plan.text import format_bytes

__all__ = ["floorplan_picture", "memory_picture", "timeline_picture"]

_MOST_BARS = 40
_GOLDEN_ANGLE = 137.508
"""Degrees between the hues of neighbouring layers: no two near ones look alike."""


def floorplan_picture(plan: Plan) -> str:
    """Every rectangle at its place, one unit a PE."""
    fabric = plan.fabric
    rows = {row.name: row for row in fabric.kernels}
    order = {name: i for i, name in enumerate(dict.fromkeys(r.layer for r in fabric.kernels))}
    shapes: list[str] = []
    for rect in fabric.rectangles:
        row = rows[rect.kernel]
        transport = rect.role == "transport"
        share = 0.0 if transport else row.utilization
        hue = order[row.layer] * _GOLDEN_ANGLE % 360
        label = _described(row, rect.pes, transport, rect.replica)
        place = f"x='{rect.x}' y='{rect.y}' width='{rect.width}' height='{rect.height}'"
        shapes.append(
            f"<rect {place} style='fill:{_heat(share)}' data-u='{_heat(share)}' "
            f"data-l='hsl({hue:.0f} 60% {35 if transport else 60}%)'>"
            f"<title>{escape(label)}</title></rect>"
        )
    size = f"{fabric.fabric_cols} {fabric.fabric_rows}"
    return (
        "<figure class='floor' tabindex='0' aria-label='Floorplan. Arrow keys move, plus and minus "
        "zoom, 0 shows all.'><div class='tools'><button type='button' data-color='u'>by "
        "utilization</button> <button type='button' data-color='l'>by layer</button> "
        "<button type='button' data-zoom='in'>+</button> <button type='button' data-zoom='out'>−"
        "</button> <button type='button' data-zoom='all'>all</button></div>"
        f"<svg viewBox='0 0 {size}' data-all='0 0 {size}' role='img' aria-label='Kernels on the "
        f"floor'><rect class='ground' x='0' y='0' width='{fabric.fabric_cols}' "
        f"height='{fabric.fabric_rows}'/>{''.join(shapes)}</svg>"
        "<p class='pointed' aria-live='polite'>Point at a kernel.</p>"
        f"<figcaption>The floor of {fabric.fabric_cols} × {fabric.fabric_rows} PEs to scale. "
        "Red kernels keep the whole model waiting, blue ones wait; grey columns hand data in and "
        f"out. {100 * fabric.active_fraction:.1f} % of the floor is in use.</figcaption></figure>"
    )


def _described(row: KernelRow, pes: int, transport: bool, replica: int) -> str:
    where = f"{row.name} ({row.kernel}), layer {row.layer or '(none)'}"
    if replica:
        where += f", replica {replica}"
    if transport:
        return f"{where}: {pes:,} PEs that hand data in and out"
    return (
        f"{where}: {pes:,} PEs, {row.compute_cycles:,.0f} cycles per sample "
        f"(forward {row.forward_cycles:,.0f}, backward {row.backward_cycles:,.0f}), transmission "
        f"{row.transmission_cycles:,.0f}, utilization {100 * row.utilization:.0f} %, memory "
        f"{format_bytes(row.memory_bytes)} of {format_bytes(row.memory_room)}, "
        f"{row.waiting_samples:,.1f} samples wait"
    )


def _heat(share: float) -> str:
    """Blue for idle over yellow to red for busy; grey for none."""
    if share <= 0:
        return "#9aa4b0"
    return f"hsl({220 - 215 * min(1.0, share):.0f} 70% 55%)"


def memory_picture(plan: Plan) -> str:
    """The kernels that hold the most, against what their PEs can hold."""
    rows = sorted(plan.kernels, key=lambda row: -row.memory_bytes)[:_MOST_BARS]
    largest = max((row.memory_room for row in rows), default=1) or 1
    bars: list[str] = []
    for index, row in enumerate(rows):
        y = 20 * index
        room = 560 * row.memory_room / largest
        used = 560 * row.memory_bytes / largest
        label = f"{row.name}: {format_bytes(row.memory_bytes)} of {format_bytes(row.memory_room)}"
        bars.append(
            f"<g><title>{escape(label)}</title><text x='0' y='{y + 14}' class='name'>"
            f"{escape(row.name)}</text><rect class='room' x='150' y='{y + 3}' width='{room:.1f}' "
            f"height='14'/><rect class='used' x='150' y='{y + 3}' width='{max(used, 1):.1f}' "
            f"height='14'/><text x='{155 + room:.1f}' y='{y + 14}' class='name'>"
            f"{escape(format_bytes(row.memory_bytes))}</text></g>"
        )
    return (
        f"<figure><svg viewBox='0 0 800 {20 * len(rows) + 4}' role='img' "
        f"aria-label='Memory per kernel'>{''.join(bars)}</svg><figcaption>The {len(rows)} kernels "
        "that hold the most: weights, gradients, optimizer state and waiting activations, in the "
        "memory of their PEs (outlined).</figcaption></figure>"
    )


def timeline_picture(plan: Plan) -> str:
    """Passes of one step on a time axis: what each is made of, one lane a kind."""
    passes = plan.predicted.timeline
    total = plan.predicted.batch_seconds
    lanes = ("compute_seconds", "weight_seconds", "gradient_seconds")
    bars: list[str] = []
    for index, one in enumerate(passes):
        x = 90 + 700 * one.start_seconds / total
        label = _pass_label(one)
        whole = 700 * one.seconds / total
        bars.append(
            f"<g class='{one.phase}'><title>{escape(label)}</title>"
            f"<rect class='room' x='{x:.2f}' y='4' width='{max(whole, 0.3):.2f}' height='88'/>"
        )
        for lane, field in enumerate(lanes):
            width = 700 * min(getattr(one, field), one.seconds) / total
            if width > 0:
                tone = "even" if index % 2 else "odd"
                bars.append(
                    f"<rect class='{tone}' x='{x:.2f}' y='{8 + 28 * lane}' "
                    f"width='{max(width, 0.2):.2f}' height='22'/>"
                )
        bars.append("</g>")
    names = "".join(
        f"<text x='0' y='{24 + 28 * lane}' class='name'>{name}</text>"
        for lane, name in enumerate(("work", "weights in", "gradients"))
    )
    return (
        "<figure class='floor' tabindex='0'><svg viewBox='0 0 800 112' data-all='0 0 800 112' "
        f"role='img' aria-label='One step'>{names}{''.join(bars)}"
        f"<text x='90' y='108' class='name'>0 s</text><text x='740' y='108' class='name'>"
        f"{total:.4g} s</text></svg><p class='pointed' aria-live='polite'>Point at a pass.</p>"
        "<figcaption>One step: each box is a pass over a layer, forward and then backward. What "
        "fills its box bounds it.</figcaption></figure>"
    )


def _pass_label(one: LayerTime) -> str:
    return (
        f"{one.phase} {one.layer or '(none)'}: {1e3 * one.seconds:,.3f} ms (work "
        f"{1e3 * one.compute_seconds:,.3f}, weights {1e3 * one.weight_seconds:,.3f}, gradients "
        f"{1e3 * one.gradient_seconds:,.3f})"
    )

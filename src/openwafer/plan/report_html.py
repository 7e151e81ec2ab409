"""report.html: the plan as one page that needs no network.

Decides what the page shows. Its style and script are in report.css and report.js beside this file.
The picture has one square for each kernel, its area in proportion to the kernel's PEs; it shows
sizes, not places.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from math import ceil, sqrt

from openwafer.plan.estimate import KernelRow
from openwafer.plan.plan import LayerPlan, Plan
from openwafer.plan.text import fold_layers, format_bytes

__all__ = ["report_html"]

PICTURE_WIDTH = 960.0
MAX_SQUARES = 400
"""More kernels than this are drawn as the largest ones and one square for the rest."""


def report_html(plan: Plan) -> str:
    """The page as text, UTF-8."""
    title = escape(f"{plan.model_name} on {plan.machine}")
    parts = (
        f"<h1>{title}</h1>",
        _summary(plan),
        f"<p class='bottleneck'>{escape(_sentence(plan.estimate.bottleneck))}</p>",
        *(f"<p class='note'>{escape(_sentence(note))}</p>" for note in plan.estimate.notes),
        "<h2>Processing elements per kernel</h2>",
        _picture(plan),
        "<h2>Kernels</h2>",
        _kernel_table(plan.kernels),
        "<h2>Layers</h2>",
        _layer_table(plan.layers),
        "<h2>Memory</h2>",
        _memory_table(plan),
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{_asset('report.css')}</style></head>\n<body><main>"
        + "\n".join(parts)
        + f"</main><script>{_asset('report.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("openwafer.plan") / name).read_text("utf-8")


def _summary(plan: Plan) -> str:
    total = plan.estimate
    kind = "training" if plan.training else "evaluation"
    facts = (
        ("samples/s", f"{total.samples_per_sec:,.1f}"),
        ("cycles per sample", f"{total.delta_t:,}"),
        ("PEs in use", f"{total.active_pes:,} of {total.fabric_pes:,}"),
        ("parameters", f"{plan.num_parameters:,}"),
        ("mode", f"{plan.execution_mode}, {kind}"),
        ("batch", f"{plan.num_samples:,}"),
    )
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f"<dl class='facts'>{items}</dl>"


def _picture(plan: Plan) -> str:
    """Squares in rows, their areas in proportion to PEs, beside the whole fabric's area.

    In weight streaming kernels use the fabric one after the other, so that areas do not add up.
    """
    shown = _largest(plan.kernels)
    if not shown:
        return "<p>No kernel occupies PEs.</p>"
    in_turn = plan.execution_mode == "weight_streaming"
    scale = PICTURE_WIDTH / 6 / sqrt(max(pes for _, pes, _ in shown))
    x = y = row_height = 0.0
    squares: list[str] = []
    for name, pes, where in shown:
        side = max(2.0, scale * sqrt(pes))
        if x + side > PICTURE_WIDTH:
            x, y, row_height = 0.0, y + row_height + 6, 0.0
        label = f"{name}: {pes:,} PEs" + (f", layer {where}" if where else "")
        squares.append(
            f"<g><rect x='{x:.1f}' y='{y:.1f}' width='{side:.1f}' height='{side:.1f}'>"
            f"<title>{escape(label)}</title></rect>{_square_label(name, x, y, side)}</g>"
        )
        x, row_height = x + side + 6, max(row_height, side)
    height = ceil(y + row_height)
    used = plan.estimate.total_utilization
    turn = "; in weight streaming kernels take their turns on the same PEs" if in_turn else ""
    return (
        f"<figure><svg viewBox='0 0 {PICTURE_WIDTH:.0f} {height}' role='img' "
        f"aria-label='PEs per kernel'>{''.join(squares)}</svg>"
        f"<div class='bar' title='PEs in use'><span style='width:{100 * used:.3f}%'></span></div>"
        f"<figcaption>Sized, not yet placed: the area of a square is in proportion to the PEs of "
        f"its kernel (squares below 2 pixels are drawn as 2){turn}. The bar is the share of the "
        f"fabric in use, {100 * used:.2f} %.</figcaption></figure>"
    )


def _largest(rows: Sequence[KernelRow]) -> list[tuple[str, int, str]]:
    """(name, PEs, layer) of all kernels; of very many, the largest and the sum of the others."""
    squares = [(row.name, row.pes, row.layer) for row in rows]
    if len(squares) <= MAX_SQUARES:
        return squares
    squares.sort(key=lambda square: -square[1])
    rest = squares[MAX_SQUARES:]
    return [*squares[:MAX_SQUARES], (f"{len(rest)} more", sum(s[1] for s in rest), "")]


def _square_label(name: str, x: float, y: float, side: float) -> str:
    if side < 8 * len(name):
        return ""
    return f"<text x='{x + 5:.1f}' y='{y + 17:.1f}'>{escape(name)}</text>"


def _kernel_table(rows: Sequence[KernelRow]) -> str:
    head = ("Kernel", "Kind", "Layer", "PEs", "Compute cycles", "Transmission cycles",
            "Samples/s", "Utilization")  # fmt: skip
    body = [
        (
            row.name, row.kernel, row.layer, row.pes, row.compute_cycles, row.transmission_cycles,
            row.samples_per_sec, f"{100 * row.utilization:.0f} %",
        )
        for row in rows
    ]  # fmt: skip
    return _table(head, body)


def _layer_table(layers: Sequence[LayerPlan]) -> str:
    head = ("Layer", "Parameters", "Forward MACs", "Backward MACs", "Waiting activations")
    body = [
        (
            group.label,
            sum(layer.num_parameters for layer in group.layers),
            sum(layer.forward_macs for layer in group.layers),
            sum(layer.backward_macs for layer in group.layers),
            format_bytes(sum(layer.saved_bytes for layer in group.layers)),
        )
        for group in fold_layers(layers)
    ]
    return _table(head, body)


def _memory_table(plan: Plan) -> str:
    body = [
        (tier, *(format_bytes(count) for count in uses.values()), format_bytes(sum(uses.values())))
        for tier, uses in plan.memory.items()
    ]
    uses = next(iter(plan.memory.values()), {})
    return _table(("Tier", *(use.capitalize() for use in uses), "In all"), body)


def _table(head: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """A table whose columns sort on a click; numbers keep their exact value in `data-v`."""
    heads = "".join(f"<th><button type='button'>{escape(name)}</button></th>" for name in head)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return (
        f"<div class='scroll'><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    whole = isinstance(value, int) or float(value).is_integer()
    shown = f"{value:,.0f}" if whole else f"{value:,.2f}"
    return f"<td class='number' data-v='{value!r}'>{shown}</td>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")

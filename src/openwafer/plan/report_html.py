"""report.html: the plan as one page that needs no network.

Decides what the page shows. Its style and script are in report.css and report.js beside this file,
its pictures in report_pictures.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from openwafer.plan.fabric.values import KernelRow
from openwafer.plan.plan import LayerPlan, Plan
from openwafer.plan.report_pictures import floorplan_picture, memory_picture, timeline_picture
from openwafer.plan.text import fold_layers, format_bytes

__all__ = ["html_table", "page_asset", "report_html"]


def report_html(plan: Plan) -> str:
    """The page as text, UTF-8."""
    title = escape(f"{plan.model_name} on {plan.machine}")
    total = plan.predicted
    help_text = f" <b>Would help:</b> {escape(_sentence(total.relief))}" if total.relief else ""
    parts = (
        f"<h1>{title}</h1>",
        _summary(plan),
        f"<p class='bottleneck'>{escape(_sentence(total.bottleneck))}{help_text}</p>",
        *(f"<p class='note'>{escape(_sentence(note))}</p>" for note in total.notes),
        *_pictures(plan),
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
        f"<title>{title}</title><style>{page_asset('report.css')}</style></head>\n<body><main>"
        + "\n".join(parts)
        + f"</main><script>{page_asset('report.js')}</script></body></html>\n"
    )


def page_asset(name: str) -> str:
    """The text of a file beside this one."""
    return (resources.files("openwafer.plan") / name).read_text("utf-8")


def _pictures(plan: Plan) -> list[str]:
    if plan.execution_mode == "weight_streaming":
        parts = ["<h2>One step</h2>", timeline_picture(plan)]
        if plan.predicted.systems:
            parts += ["<h2>Several systems</h2>", _systems_table(plan)]
        return parts
    return [
        "<h2>Floorplan</h2>",
        floorplan_picture(plan),
        "<h2>Memory per kernel</h2>",
        memory_picture(plan),
    ]


def _summary(plan: Plan) -> str:
    total, fabric = plan.predicted, plan.fabric
    kind = "training" if plan.training else "evaluation"
    facts = [
        ("samples/s", f"{total.samples_per_second:,.1f}"),
        ("samples/s over a batch", f"{total.batch_samples_per_second:,.1f}"),
        ("cycles per sample", f"{total.delta_t_cycles:,}"),
        ("PEs in use", f"{fabric.active_pes:,} of {fabric.fabric_pes:,}"),
        ("utilization", f"{100 * fabric.utilization:.0f} %"),
        ("parameters", f"{plan.num_parameters:,}"),
        ("mode", f"{plan.execution_mode}, {kind}"),
        ("batch", f"{plan.num_samples:,}"),
    ]
    if plan.execution_mode == "layer_pipelined":
        facts += [
            ("replicas", f"{fabric.num_replicas}"),
            ("busiest link", f"{100 * fabric.max_link_load:.0f} %"),
            ("colors at a router", f"{fabric.max_colors} of {fabric.free_colors}"),
        ]
    else:
        facts.append(("largest batch that fits", f"{total.largest_batch:,}"))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f"<dl class='facts'>{items}</dl>"


def _kernel_table(rows: Sequence[KernelRow]) -> str:
    head = ("Kernel", "Kind", "Layer", "PEs", "Transport", "Forward cycles", "Backward cycles",
            "Transmission cycles", "Samples/s", "Utilization", "Memory", "Waiting")  # fmt: skip
    body = [
        (
            row.name, row.kernel, row.layer, row.pes, row.transport_pes, row.forward_cycles,
            row.backward_cycles, row.transmission_cycles, row.samples_per_second,
            f"{100 * row.utilization:.0f} %", row.memory_bytes, row.waiting_samples,
        )
        for row in rows
    ]  # fmt: skip
    return html_table(head, body)


def _systems_table(plan: Plan) -> str:
    one = plan.predicted.systems[0].samples_per_second
    body = [
        (s.num_systems, s.step_seconds, s.samples_per_second, s.samples_per_second / one)
        for s in plan.predicted.systems
    ]
    return html_table(("Systems", "Step, seconds", "Samples/s", "Times one"), body)


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
    return html_table(head, body)


def _memory_table(plan: Plan) -> str:
    body = [
        (tier, *(format_bytes(count) for count in uses.values()), format_bytes(sum(uses.values())))
        for tier, uses in plan.memory.items()
    ]
    uses = next(iter(plan.memory.values()), {})
    return html_table(("Tier", *(use.capitalize() for use in uses), "In all"), body)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
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
    shown = f"{value:,.0f}" if whole else f"{value:,.4g}" if abs(value) < 1 else f"{value:,.2f}"
    return f"<td class='number' data-v='{value!r}'>{shown}</td>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")

"""What-if: one plan for each combination of settings, as a table and a page.

Decides the combinations, what is taken from each plan, and how the results read. Does not decide
how a plan is made from settings: the caller gives that as a function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from openwafer.errors import OpenWaferError
from openwafer.plan.plan import Plan
from openwafer.plan.report_html import html_table, page_asset
from openwafer.plan.text import format_bytes, table

__all__ = ["Sweep", "SweepPoint", "sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One combination. `why_not` says why there is no plan; the numbers are zero then.

    samples_per_second: steady state. batch_samples_per_second: over a whole batch.
    memory_bytes: of the device, all uses.
    """

    settings: Mapping[str, object]
    execution_mode: str = ""
    samples_per_second: float = 0.0
    batch_samples_per_second: float = 0.0
    active_pes: int = 0
    utilization: float = 0.0
    memory_bytes: int = 0
    num_parameters: int = 0
    bottleneck: str = ""
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points, in the order of the settings."""

    title: str
    points: tuple[SweepPoint, ...]

    def text(self) -> str:
        """The table for the terminal."""
        names = list(self.points[0].settings) if self.points else []
        rows = [(*(names or ["settings"]), *_HEADS)]
        rows += [
            (*(str(point.settings[name]) for name in names), *_cells(point))
            for point in self.points
        ]
        return table(rows)

    def html(self) -> str:
        """A page that needs no network: a bar for each point and the table."""
        names = list(self.points[0].settings) if self.points else []
        body = [(*(str(p.settings[name]) for name in names), *_values(p)) for p in self.points]
        title = escape(self.title)
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>{title}</title><style>{page_asset('report.css')}</style></head>\n<body><main>"
            f"<h1>{title}</h1>"
            f"<h2>Predicted samples per second</h2>{self._bars('samples_per_second')}"
            f"<h2>PEs in use</h2>{self._bars('active_pes')}"
            f"<h2>Memory, bytes</h2>{self._bars('memory_bytes')}"
            f"<h2>All points</h2>{html_table((*names, *_HEADS), body)}</main>"
            f"<script>{page_asset('report.js')}</script></body></html>\n"
        )

    def _bars(self, field: str) -> str:
        largest = max((getattr(p, field) for p in self.points), default=0) or 1
        bars: list[str] = []
        for index, point in enumerate(self.points):
            value = getattr(point, field)
            y = 22 * index
            name = ", ".join(f"{k}={v}" for k, v in point.settings.items())
            shown = point.why_not or f"{value:,.1f}".removesuffix(".0")
            bars.append(
                f"<text class='name' x='0' y='{y + 15}'>{escape(name[:44])}</text>"
                f"<rect x='300' y='{y + 3}' width='{max(1.0, 380 * value / largest):.1f}' "
                f"height='15'><title>{escape(f'{name}: {shown}')}</title></rect>"
                f"<text class='name' x='{306 + 380 * value / largest:.1f}' y='{y + 15}'>"
                f"{escape(shown[:60])}</text>"
            )
        height = 22 * len(self.points) + 4
        return f"<figure><svg viewBox='0 0 800 {height}' role='img'>{''.join(bars)}</svg></figure>"


_HEADS = ("Samples/s", "Over a batch", "PEs", "Utilization", "Memory", "Parameters", "Bottleneck")


def _cells(point: SweepPoint) -> tuple[str, ...]:
    if point.why_not:
        return ("-",) * (len(_HEADS) - 1) + (point.why_not,)
    return (
        f"{point.samples_per_second:,.1f}",
        f"{point.batch_samples_per_second:,.1f}",
        f"{point.active_pes:,}",
        f"{100 * point.utilization:.0f}%",
        format_bytes(point.memory_bytes),
        f"{point.num_parameters:,}",
        point.bottleneck,
    )


def _values(point: SweepPoint) -> tuple[str | int | float, ...]:
    return (
        point.samples_per_second, point.batch_samples_per_second, point.active_pes,
        point.utilization, point.memory_bytes, point.num_parameters,
        point.why_not or point.bottleneck,
    )  # fmt: skip


def sweep(
    title: str,
    settings: Mapping[str, Sequence[object]],
    plan_of: Callable[[Mapping[str, object]], Plan],
) -> Sweep:
    """Plan every combination of the settings' values. A combination that cannot be planned (does
    not fit, is not supported) is a point with the reason, not the end."""
    return Sweep(title, tuple(_points(settings, plan_of)))


def _points(
    settings: Mapping[str, Sequence[object]], plan_of: Callable[[Mapping[str, object]], Plan]
) -> Iterator[SweepPoint]:
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        try:
            plan = plan_of(chosen)
        except OpenWaferError as error:
            yield SweepPoint(settings=chosen, why_not=error.what)
            continue
        yield SweepPoint(
            settings=chosen,
            execution_mode=plan.execution_mode,
            samples_per_second=plan.predicted.samples_per_second,
            batch_samples_per_second=plan.predicted.batch_samples_per_second,
            active_pes=plan.fabric.active_pes,
            utilization=plan.fabric.utilization,
            memory_bytes=sum(plan.memory["device"].values()),
            num_parameters=plan.num_parameters,
            bottleneck=plan.predicted.bottleneck,
        )

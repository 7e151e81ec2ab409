"""An independent check of a placement file of a kernel graph.

Reads both files on its own and computes everything again from the contest's formulas, one kernel
and one pair at a time; it shares no code with the placement or the reader. What it finds wrong it
says in words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import ceil

__all__ = ["Totals", "check_text"]


@dataclass(frozen=True)
class Totals:
    """What a placement comes to. `errors` is empty if it is legal."""

    slowest_cycles: Fraction
    wire_length: float
    adapters: int
    fill: float
    errors: tuple[str, ...]


def check_text(graph: str, placement: str) -> Totals:
    """Checks the text of a placement against the text of its graph."""
    width, height = (int(_header(graph, key, "633")) for key in ("width", "height"))
    limit = int(_header(graph, "memlimit", "24576"))
    nodes = {index: (kind, text) for kind, index, text in _lines(graph)}
    placed = {index: (kind, _numbers(text)) for kind, index, text in _lines(placement)}
    errors: list[str] = []
    kernels = {i: kind for i, (kind, _) in nodes.items() if kind not in ("input", "output")}
    if set(kernels) != set(placed):
        errors.append(f"placed and asked for differ: {sorted(set(kernels) ^ set(placed))}")
    times: dict[int, Fraction] = {}
    boxes: dict[int, tuple[int, int, int, int]] = {}
    for index, (kind, values) in placed.items():
        if kernels.get(index) != kind:
            errors.append(f"{kind}[{index}] is not in the graph")
            continue
        loops = _convolutions(kind, _numbers(nodes[index][1]))
        size, times[index], memory = _implementation(loops, values)
        if memory > limit:
            errors.append(f"{kind}[{index}] needs {float(memory):.1f} of {limit} words")
        if values["rotated"]:
            size = (size[1], size[0])
        x, y = values["x"], values["y"]
        boxes[index] = (x, y, x + size[0], y + size[1])
        if x < 0 or y < 0 or x + size[0] > width or y + size[1] > height:
            errors.append(f"{kind}[{index}] is outside of the floor")
    for (one, a), (two, b) in combinations(boxes.items(), 2):
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
            errors.append(f"kernels {one} and {two} overlap")
    length, adapters = _wires(graph, boxes, {i: v for i, (_, v) in placed.items()}, kernels)
    area = sum((c - a) * (d - b) for a, b, c, d in boxes.values())
    slowest = max(times.values(), default=Fraction(0))
    return Totals(slowest, length, adapters, area / (width * height), tuple(errors))


def _header(text: str, key: str, otherwise: str) -> str:
    found = re.search(rf"^\s*{key}\s*=\s*(\d+)", text, re.MULTILINE)
    return found.group(1) if found else otherwise


def _lines(text: str) -> list[tuple[str, int, str]]:
    pattern = r"^\s*(input|output|conv|dblock|cblock)\s*\[\s*(\d+)\s*\]([^>\n]*)$"
    return [(kind, int(index), rest) for kind, index, rest in re.findall(pattern, text, re.M)]


def _numbers(text: str) -> dict[str, int]:
    return {key.lower(): int(value) for key, value in re.findall(r"(\w+)\s*=\s*(\d+)", text)}


def _convolutions(kind: str, v: dict[str, int]) -> list[tuple[int, ...]]:
    """(H, W, R, S, C, K, stride product) of each convolution of a kernel."""
    if kind == "conv":
        stride = v.get("t", 1) * v.get("u", v.get("t", 1))
        return [(v["h"], v["w"], v.get("r", 1), v.get("s", 1), v["c"], v["k"], stride)]
    h, w, f = v["h"], v["w"], v["f"]
    if kind == "dblock":
        return [
            (h, w, 1, 1, f, f // 4, 1),
            (h, w, 3, 3, f // 4, f // 4, 1),
            (h, w, 1, 1, f // 4, f, 1),
        ]
    return [
        (h, w, 1, 1, f // 2, f // 4, 1),
        (h, w, 3, 3, f // 4, f // 4, 4),
        ((h + 1) // 2, (w + 1) // 2, 1, 1, f // 4, f, 1),
        (h, w, 1, 1, f // 2, f, 4),
    ]


def _implementation(
    loops: list[tuple[int, ...]], values: dict[str, int]
) -> tuple[tuple[int, int], Fraction, Fraction]:
    """(width, height) before rotation, cycles and words per tile."""
    h, w = values["h"], values["w"]
    width = height = 0
    time = memory = Fraction(0)
    for number, (high, wide, rows, columns, inputs, outputs, stride) in enumerate(loops, 1):
        suffix = "" if len(loops) == 1 else str(number)
        c, k = values[f"c{suffix}"], values[f"k{suffix}"]
        width += 3 * k
        height = max(height, h * w * (c + 1))
        steps = ceil(high / h) * ceil(wide / w) * ceil(inputs / c) * ceil(outputs / k)
        time = max(time, Fraction(steps * rows * columns, stride))
        weights = Fraction(inputs * outputs * rows * columns, c * k)
        image = Fraction((wide + columns - 1) * (high + rows - 1) * outputs, w * h * k)
        memory = max(memory, weights + image)
    return (width, height), time, memory


def _wires(
    graph: str,
    boxes: dict[int, tuple[int, int, int, int]],
    values: dict[int, dict[str, int]],
    kernels: dict[int, str],
) -> tuple[float, int]:
    """Sum of the L1 distances of the centres, and of the splits that differ (adapters)."""
    length, adapters = 0.0, 0
    last = {"conv": "k", "dblock": "k3", "cblock": "k3"}
    for one, two in re.findall(r"\[\s*(\d+)\s*\][^\n>]*->[^\n\[]*\[\s*(\d+)\s*\]", graph):
        source, target = int(one), int(two)
        if source not in boxes or target not in boxes:
            continue
        a, b = boxes[source], boxes[target]
        length += abs(a[0] + a[2] - b[0] - b[2]) / 2 + abs(a[1] + a[3] - b[1] - b[3]) / 2
        first, second = values[source], values[target]
        into = "c" if kernels[target] == "conv" else "c1"
        adapters += (first["h"] != second["h"]) + (first["w"] != second["w"])
        adapters += first[last[kernels[source]]] != second[into]
    return length, adapters

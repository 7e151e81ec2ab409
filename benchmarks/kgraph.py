"""The kernel graphs of the ISPD 2020 contest: reading them, sizing their kernels.

Decides what a `.kgraph` file means (docs/placement.md has the format) and which implementations a
kernel has under the memory limit. Does not decide which one is taken, or where it goes: that is
openwafer.plan.placement, the same code that places our own models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np

from openwafer.errors import DataError
from openwafer.plan.placement import Block, Floor, Problem, Shape, Wire
from openwafer.plan.placement.problem import IntArray

__all__ = ["Convolution", "Edge", "KernelFamily", "KernelGraphFile", "Node", "parse", "read"]

_COMMENT = re.compile(r"\(\*(.*?)\*\)", re.DOTALL)
_SETTING = re.compile(r"^\s*(\w+)\s*=\s*(.*?)\s*$", re.MULTILINE)
_NODE = re.compile(
    r"^(input|output|conv|dblock|cblock)\s*\[\s*(\d+)\s*\]\s*(?!:)(.*)$", re.IGNORECASE
)
_EDGE = re.compile(
    r"^(\w+)\s*\[\s*(\d+)\s*\]\s*(?::\s*\w+)?\s*->\s*(\w+)\s*\[\s*(\d+)\s*\]\s*(?::\s*\w+)?(.*)$"
)
_NUMBER = re.compile(r"\b(\w+)\s*=\s*(\d+)\b")
_NAME = re.compile(r"\bname\s*=\s*(?:'([^']*)'|\"([^\"]*)\"|(\S+))", re.IGNORECASE)
_NO_ROOM = 1 << 40
"""A number of columns that no floor has: not this way."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """Loops over an image of `height` × `width`, `inputs` and `outputs` channels, a `rows` ×
    `columns` filter; `stride_area` is the product of both strides."""

    height: int
    width: int
    rows: int
    columns: int
    inputs: int
    outputs: int
    stride_area: int = 1

    def time(self, h: int, w: int, c: int, k: int) -> Fraction:
        """Cycles with the loops split h, w, c and k ways."""
        steps = -(-self.height // h) * -(-self.width // w) * -(-self.inputs // c)
        steps *= -(-self.outputs // k)
        return Fraction(steps * self.rows * self.columns, self.stride_area)

    def memory(self, h: int, w: int, c: int, k: int) -> Fraction:
        """Words in each tile."""
        weights = Fraction(self.inputs, c) * Fraction(self.outputs, k) * self.rows * self.columns
        across = Fraction(self.width + self.columns - 1, w)
        down = Fraction(self.height + self.rows - 1, h)
        return weights + across * down * Fraction(self.outputs, k)


@dataclass(frozen=True, slots=True)
class KernelFamily:
    """All implementations of a kernel: of its convolutions, which share h and w.

    Height is h·w·(c + 1) for the largest c, width 3·(k1 + k2 + …), and the slowest convolution and
    the fullest memory count. longest: of a side, in tiles.
    """

    convolutions: tuple[Convolution, ...]
    memory_words: int
    longest: int

    def sizes(self, time_cycles: int) -> tuple[IntArray, IntArray]:
        """See `ShapeFamily`."""
        _, _, _, heights = self._splits()
        widths = 3 * sum(self._columns(time_cycles))
        fits = widths <= self.longest
        return widths[fits], heights[fits]

    def shape(self, width: int, height: int, time_cycles: int) -> Shape:
        """See `ShapeFamily`; the arguments are h, w, c1, k1, c2, …"""
        h, w, c, heights = self._splits()
        columns = self._columns(time_cycles)
        widths = 3 * sum(columns)
        areas = np.where((widths <= width) & (heights <= height), widths * heights, _NO_ROOM)
        best = int(areas.argmin())
        assert areas[best] < _NO_ROOM, "asked for a shape that sizes() did not offer"
        rows, across = int(h[best]), int(w[best])
        arguments = [("h", rows), ("w", across)]
        slowest, fullest = Fraction(0), Fraction(0)
        single = len(self.convolutions) == 1
        for number, (convolution, wide) in enumerate(zip(self.convolutions, columns, strict=True)):
            split = min(int(c[best]), convolution.inputs)
            suffix = "" if single else str(number + 1)
            arguments += [(f"c{suffix}", split), (f"k{suffix}", int(wide[best]))]
            splits = (rows, across, split, int(wide[best]))
            slowest = max(slowest, convolution.time(*splits))
            fullest = max(fullest, convolution.memory(*splits))
        return Shape(
            int(widths[best]), int(heights[best]), ceil(slowest), ceil(fullest), tuple(arguments)
        )

    @property
    def slowest_cycles(self) -> int:
        """Nothing split."""
        return max(ceil(convolution.time(1, 1, 1, 1)) for convolution in self.convolutions)

    def _splits(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        extents = tuple(dict.fromkeys((c.height, c.width) for c in self.convolutions))
        return _splits(extents, max(c.inputs for c in self.convolutions), self.longest)

    def _columns(self, time_cycles: int) -> list[IntArray]:
        """Per convolution, the smallest k for each split [splits] that is fast enough and fits the
        memory."""
        h, w, c, _ = self._splits()
        return [self._columns_of(one, time_cycles, h, w, c) for one in self.convolutions]

    def _columns_of(
        self, one: Convolution, time_cycles: int, h: IntArray, w: IntArray, c: IntArray
    ) -> IntArray:
        c = np.minimum(c, one.inputs)
        steps = -(-one.height // h) * -(-one.width // w) * -(-one.inputs // c)
        rounds = time_cycles * one.stride_area // (steps * one.rows * one.columns)
        fast = -(-one.outputs // np.maximum(rounds, 1))
        image = (one.width + one.columns - 1) * (one.height + one.rows - 1)
        words = one.outputs * (one.inputs * one.rows * one.columns * h * w + image * c)
        small = -(-words // (self.memory_words * c * h * w))
        least = np.maximum(fast, small)
        return np.where((rounds >= 1) & (least <= one.outputs), least, _NO_ROOM)


@lru_cache(maxsize=4096)
def _splits(
    extents: tuple[tuple[int, int], ...], most_inputs: int, longest: int
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """h, w, c and the height h·w·(c + 1) [splits] of all that can be best: of the (h, w) with the
    same product, which alone counts for size and memory, those with the fewest rounds."""
    by_product: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {}
    height, width = max(e[0] for e in extents), max(e[1] for e in extents)
    for h in range(1, min(height, longest // 2) + 1):
        for w in range(1, min(width, longest // (2 * h)) + 1):
            rounds = tuple(-(-high // h) * -(-wide // w) for high, wide in extents)
            by_product.setdefault(h * w, {}).setdefault(rounds, (h, w))
    columns: list[IntArray] = []
    for product, found in by_product.items():
        c = np.arange(1, min(most_inputs, longest // product - 1) + 1)
        for rounds, (h, w) in found.items():
            if not any(_fewer(other, rounds) for other in found):
                columns.append(np.stack([np.full_like(c, h), np.full_like(c, w), c]))
    h, w, c = np.concatenate(columns, axis=1)
    return h, w, c, h * w * (c + 1)


def _fewer(one: Sequence[int], other: Sequence[int]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class Node:
    """`index` is the number in brackets. `family` is None for inputs and outputs."""

    kind: str
    index: int
    name: str
    family: KernelFamily | None


@dataclass(frozen=True, slots=True)
class Edge:
    """Between nodes, by index; the tensor's shape as it is written, maybe empty."""

    source: int
    target: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KernelGraphFile:
    """One file. Weights are those of the objective."""

    test: str
    width: int
    height: int
    cycle_weight: float
    wire_weight: float
    adapter_weight: float
    memory_words: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def problem(self) -> Problem:
        """As the placement takes it: inputs and outputs have no place, nor do wires to them."""
        names = {node.index: node.name for node in self.nodes if node.family is not None}
        blocks = [Block(node.name, node.family) for node in self.nodes if node.family is not None]
        wires = [
            Wire(names[edge.source], names[edge.target])
            for edge in self.edges
            if edge.source in names and edge.target in names
        ]
        return Problem(Floor(self.width, self.height), tuple(blocks), tuple(wires))


def read(path: Path) -> KernelGraphFile:
    """Reads a file.

    Raises:
        DataError: it cannot be read or is not a kernel graph.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the kernel graph cannot be read: {error}", where=str(path)) from error
    return parse(text, str(path))


def parse(text: str, where: str = "kernel graph") -> KernelGraphFile:
    """Reads the text of a file. White space, the order of lines, the case of keys and unknown
    settings do not matter; what is missing of the header has the contest's values."""
    settings = {
        key.lower(): value
        for comment in _COMMENT.findall(text)
        for key, value in _SETTING.findall(comment)
    }
    memory = int(_setting(settings, "memlimit", 24576, where))
    width = int(_setting(settings, "width", 633, where))
    height = int(_setting(settings, "height", 633, where))
    nodes: list[Node] = []
    edges: list[Edge] = []
    body = _COMMENT.sub(lambda match: "\n" * match.group(0).count("\n"), text)
    for number, line in enumerate(body.splitlines(), 1):
        line = line.strip().rstrip(";")
        if not line:
            continue
        place = f"{where}:{number}"
        if node := _NODE.match(line):
            nodes.append(_node(node, memory, max(width, height), place))
        elif edge := _EDGE.match(line):
            shape = tuple(int(value) for value in re.findall(r"\d+", edge.group(5)))
            edges.append(Edge(int(edge.group(2)), int(edge.group(4)), shape))
        else:
            raise DataError(
                f"neither a node nor an edge: {line!r}", where=place,
                allowed="input, output, conv, dblock or cblock [index] key=value …, or a -> b",
            )  # fmt: skip
    _check_indices(nodes, edges, where)
    return KernelGraphFile(
        test=settings.get("test", ""),
        width=width,
        height=height,
        cycle_weight=_setting(settings, "wdeltat", 1, where),
        wire_weight=_setting(settings, "wlength", 1, where),
        adapter_weight=_setting(settings, "wadapter", 0, where),
        memory_words=memory,
        nodes=tuple(nodes),
        edges=tuple(edges),
    )


def _setting(settings: dict[str, str], name: str, default: float, where: str) -> float:
    try:
        return float(settings.get(name, default))
    except ValueError as error:
        raise DataError(f"`{name}` is not a number: {settings[name]!r}", where=where) from error


def _check_indices(nodes: list[Node], edges: list[Edge], where: str) -> None:
    indices = [node.index for node in nodes]
    names = [node.name for node in nodes]
    if len(set(indices)) < len(indices) or len(set(names)) < len(names):
        raise DataError("two nodes have the same number or name", where=where)
    lost = {end for edge in edges for end in (edge.source, edge.target)} - set(indices)
    if lost:
        raise DataError(f"edges to nodes that are not there: {sorted(lost)}", where=where)


def _node(match: re.Match[str], memory: int, longest: int, where: str) -> Node:
    kind, index, rest = match.group(1).lower(), int(match.group(2)), match.group(3)
    named = _NAME.search(rest)
    name = next(filter(None, named.groups()), "") if named else ""
    values = {key.lower(): int(value) for key, value in _NUMBER.findall(rest)}
    family = None
    if kind not in ("input", "output"):
        missing = [key for key in _NEEDED[kind] if values.get(key, 0) < 1]
        if missing:
            raise DataError(f"{kind}[{index}] has no {', '.join(missing)}", where=where)
        family = KernelFamily(_CONVOLUTIONS[kind](values), memory, longest)
    return Node(kind, index, name or f"{kind}{index}", family)


def _of_convolution(v: dict[str, int]) -> tuple[Convolution, ...]:
    stride = v.get("t", 1)
    area = stride * v.get("u", stride)
    rows, columns = v.get("r", 1), v.get("s", 1)
    return (Convolution(v["h"], v["w"], rows, columns, v["c"], v["k"], area),)


def _of_dblock(v: dict[str, int]) -> tuple[Convolution, ...]:
    h, w, f = v["h"], v["w"], v["f"]
    return (
        Convolution(h, w, 1, 1, f, f // 4),
        Convolution(h, w, 3, 3, f // 4, f // 4),
        Convolution(h, w, 1, 1, f // 4, f),
    )


def _of_cblock(v: dict[str, int]) -> tuple[Convolution, ...]:
    h, w, f = v["h"], v["w"], v["f"]
    return (
        Convolution(h, w, 1, 1, f // 2, f // 4),
        Convolution(h, w, 3, 3, f // 4, f // 4, 4),
        Convolution(-(-h // 2), -(-w // 2), 1, 1, f // 4, f),
        Convolution(h, w, 1, 1, f // 2, f, 4),
    )


_NEEDED = {"conv": ("h", "w", "c", "k"), "dblock": ("h", "w", "f"), "cblock": ("h", "w", "f")}
_CONVOLUTIONS = {"conv": _of_convolution, "dblock": _of_dblock, "cblock": _of_cblock}

"""Random kernel graphs in the ISPD 2020 format, of the sorts that networks have.

`python -m benchmarks.kgraph_random --count 24 --time 20` places some of each sort and prints how
far they are from the bound. Decides the graphs alone; the same seed gives the same text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

__all__ = ["SORTS", "generate"]


@dataclass
class _Graph:
    """Lines of a graph that is being written. Node 0 is the input."""

    nodes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=lambda: ["input"])
    edges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, kind: str, text: str, *sources: int) -> int:
        index = len(self.kinds)
        self.kinds.append(kind)
        self.nodes.append(f"{kind}[{index}] {text} name='k{index}'")
        self.edges += [(source, index) for source in sources]
        return index

    def conv(
        self, side: int, filter_side: int, c: int, k: int, *sources: int, stride: int = 1
    ) -> int:
        text = (
            f"W={side} H={side} R={filter_side} S={filter_side} C={c} K={k} T={stride} U={stride}"
        )
        return self.add("conv", text, *sources)

    def block(self, kind: str, features: int, side: int, source: int) -> int:
        return self.add(kind, f"f={features} h={side} w={side}", source)

    def text(self, name: str, wire_weight: int, last: int) -> str:
        end = len(self.kinds)
        edges = [f"{self._at(a)} -> {self.kinds[b]}[{b}]:x, shape:[1][1][1]" for a, b in self.edges]
        return "\n".join(
            [
                f"(*\ntest={name}\nwidth=633\nheight=633\nwdeltat=1",
                f"wlength={wire_weight}\nwadapter=0\nmemlimit=24576\n*)\n",
                "(* Node Definitions *)",
                "input[0] n=[1 1 1] name='k0'",
                *self.nodes,
                f"output[{end}] n=[1 1 1] name='k{end}'",
                "\n(* Connectivity *)",
                *edges,
                f"{self._at(last)} -> output[{end}]:_, shape:[1][1][1]\n",
            ]
        )

    def _at(self, index: int) -> str:
        return f"{self.kinds[index]}[{index}]:{'y' if index else '_'}"


def _chain(graph: _Graph, random: Random) -> int:
    """Convolutions one after the other, of all sizes."""
    last, channels, side = 0, random.choice((3, 16, 64)), random.choice((28, 56, 112, 224))
    for _ in range(random.randint(5, 60)):
        wide = random.choice((16, 32, 48, 64, 96, 128, 200, 256, 384, 512))
        last = graph.conv(side, random.choice((1, 1, 3, 3, 5)), channels, wide, last)
        channels = wide
        if side > 7 and random.random() < 0.15:
            side //= 2
    return last


def _residual(graph: _Graph, random: Random) -> int:
    """Stages of cblocks and dblocks."""
    last, features, side = 0, 256, random.choice((56, 112))
    for _ in range(4):
        last = graph.block("cblock", features, side, last)
        side = -(-side // 2)
        for _ in range(random.randint(1, 8)):
            last = graph.block("dblock", features, side, last)
        features *= 2
    return last


def _bottleneck(graph: _Graph, random: Random) -> int:
    """The same of single convolutions, with a wire around two of every three."""
    last, features, side = 0, 256, random.choice((28, 56))
    for _ in range(random.randint(2, 4)):
        for _ in range(random.randint(1, 7)):
            first = graph.conv(side, 1, features, features // 4, last)
            middle = graph.conv(side, 3, features // 4, features // 4, first)
            last = graph.conv(side, 1, features // 4, features, middle, first)
        features, side = features * 2, -(-side // 2)
        last = graph.conv(side, 1, features // 2, features, last)
    return last


def _unet(graph: _Graph, random: Random) -> int:
    """Down and up again, with wires across."""
    depth, width = random.randint(2, 5), random.choice((16, 32, 64))
    side, last, channels = random.choice((128, 256, 512)), 0, 1
    across: list[tuple[int, int, int]] = []
    for _ in range(depth):
        first = graph.conv(side, 3, channels, width, last)
        last = graph.conv(side, 3, width, width, first)
        across.append((last, side, width))
        channels, width, side = width, width * 2, side // 2
    for skipped, high, wide in reversed(across):
        up = graph.conv(high, 2, channels, wide, last)
        last = graph.conv(high, 3, 2 * wide, wide, up, skipped)
        channels, side = wide, high
    return graph.conv(side, 1, channels, 2, last)


def _branches(graph: _Graph, random: Random) -> int:
    """Modules of parallel branches that meet in one convolution."""
    last, channels, side = 0, 64, random.choice((28, 35, 56))
    for _ in range(random.randint(2, 8)):
        ends: list[int] = []
        for branch in range(random.randint(2, 5)):
            wide = random.choice((32, 48, 64, 96, 128))
            end = graph.conv(side, 1, channels, wide, last)
            for _ in range(min(branch, 3)):
                end = graph.conv(side, 3, wide, wide, end)
            ends.append(end)
        last = graph.conv(side, 1, 64 * len(ends), 192, *ends)
        channels = 192
    return last


def _few_large(graph: _Graph, random: Random) -> int:
    """Two to six kernels."""
    last, channels = 0, random.choice((64, 128))
    for _ in range(random.randint(2, 6)):
        wide = random.choice((128, 256, 512, 1024))
        last = graph.conv(random.choice((14, 28, 56, 100)), 3, channels, wide, last)
        channels = wide
    return last


def _many_tiny(graph: _Graph, random: Random) -> int:
    """Layers of a fully connected network, from 2 units to thousands."""
    last, channels = 0, 2
    for _ in range(random.randint(20, 150)):
        wide = max(2, min(4096, int(channels * random.choice((0.5, 1, 1, 1.5, 2)))))
        last = graph.conv(1, 1, channels, wide, last)
        channels = wide
    return last


SORTS: dict[str, Callable[[_Graph, Random], int]] = {
    "chain": _chain,
    "residual": _residual,
    "bottleneck": _bottleneck,
    "unet": _unet,
    "branches": _branches,
    "few_large": _few_large,
    "many_tiny": _many_tiny,
}


def generate(sort: str, seed: int) -> str:
    """The text of a random graph of a sort."""
    random = Random(f"{sort} {seed}")
    graph = _Graph()
    last = SORTS[sort](graph, random)
    return graph.text(f"{sort}-{seed}", random.choice((1, 1, 4, 10)), last)


def main(arguments: Sequence[str] | None = None) -> int:
    """Places random graphs and prints a line each."""
    from benchmarks.placement import run

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kgraph_random")
    parser.add_argument("--count", type=int, default=14)
    parser.add_argument("--time", type=float, default=20.0, help="seconds a graph at most (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first graph")
    parser.add_argument("--goal", choices=("objective", "slowest"), default="objective")
    options = parser.parse_args(arguments)
    print("| graph | kernels | ratio | wires | objective | fill | seconds | legal |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    failed, worst = 0, 0.0
    for number in range(options.count):
        sort = list(SORTS)[number % len(SORTS)]
        seed = options.seed + number // len(SORTS)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{sort}-{seed}.kgraph"
            path.write_text(generate(sort, seed), "utf-8")
            result = run(path, seconds=options.time, seed=0, goal=options.goal)
        ratio = float(result.totals.slowest_cycles) / result.placement.area_bound_cycles
        worst, failed = max(worst, ratio), failed + bool(result.totals.errors)
        legal = "yes" if not result.totals.errors else "NO"
        print(
            f"| {sort}-{seed} | {len(result.placement.rectangles)} | {ratio:.4f} "
            f"| {result.totals.wire_length:,.0f} | {result.objective:,.0f} "
            f"| {result.totals.fill:.3f} | {result.seconds:.0f} | {legal} |",
            flush=True,
        )
    print(f"\nworst ratio {worst:.4f}, not legal: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

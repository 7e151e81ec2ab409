"""`python -m benchmarks.placement FILE.kgraph --time 60`: size and place a kernel graph.

Decides the command, the text of a placement (docs/placement.md) and the table of results. Sizing
and placement are openwafer.plan.placement; legality is checked by kgraph_check.py, independently.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.kgraph import KernelGraphFile, read
from benchmarks.kgraph_check import Totals, check_text
from openwafer.errors import OpenWaferError
from openwafer.plan.placement import Placement, Weights, place

_MOST_RATIO = 1.05
"""With the file's weights, the slowest kernel may be so much above the bound for shorter wires."""


@dataclass(frozen=True)
class Result:
    """One placed file."""

    graph: KernelGraphFile
    placement: Placement
    text: str
    totals: Totals
    seconds: float

    @property
    def objective(self) -> float:
        """The contest's, with the adapter formula of docs/placement.md."""
        graph, totals = self.graph, self.totals
        return (
            graph.cycle_weight * float(totals.slowest_cycles)
            + graph.wire_weight * totals.wire_length
            + graph.adapter_weight * totals.adapters
        )


def run(path: Path, *, seconds: float, seed: int, goal: str, processes: int = 1) -> Result:
    """Places a file, and checks the result. Of several processes with seeds of their own the best
    result counts."""
    start = time.perf_counter()
    graph = read(path)
    if processes == 1:
        found = [_search(graph, seconds, seed, goal)]
    else:
        # Starting the processes takes a part of the time.
        seconds = max(seconds / 2, seconds - 3)
        seeds = [seed * processes + index for index in range(processes)]
        context = get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            jobs = [pool.submit(_search, graph, seconds, one, goal) for one in seeds]
            found = [job.result() for job in jobs]
    placement = min(found, key=lambda one: _rank(graph, one, goal))
    text = placement_text(graph, placement)
    totals = check_text(path.read_text("utf-8"), text)
    return Result(graph, placement, text, totals, time.perf_counter() - start)


def _search(graph: KernelGraphFile, seconds: float, seed: int, goal: str) -> Placement:
    weights = Weights(graph.cycle_weight, graph.wire_weight, _MOST_RATIO)
    return place(
        graph.problem(),
        weights=weights if goal == "objective" else None,
        time_limit_seconds=seconds,
        seed=seed,
    )


def _rank(graph: KernelGraphFile, placement: Placement, goal: str) -> tuple[float, ...]:
    """The smaller the better."""
    cycles, length = placement.slowest_cycles, placement.wire_length
    if goal == "slowest":
        return cycles, length
    most = placement.area_bound_cycles * _MOST_RATIO
    objective = graph.cycle_weight * cycles + graph.wire_weight * length
    return max(0.0, cycles - most), objective


def placement_text(graph: KernelGraphFile, placement: Placement) -> str:
    """The placement as text: one line a kernel, in the graph's order."""
    lines = [
        "(* placement",
        f"test={graph.test}",
        f"width={graph.width}",
        f"height={graph.height}",
        f"slowest_cycles={placement.slowest_cycles}",
        f"area_bound_cycles={placement.area_bound_cycles}",
        f"wire_length={placement.wire_length:g}",
        "*)",
    ]
    for node in graph.nodes:
        if node.family is None:
            continue
        rect = placement.rectangles[node.name]
        arguments = " ".join(f"{key}={value}" for key, value in rect.shape.arguments)
        lines.append(
            f"{node.kind}[{node.index}] name='{node.name}' x={rect.x} y={rect.y} "
            f"width={rect.width} height={rect.height} rotated={int(rect.rotated)} "
            f"{arguments} time={rect.shape.time_cycles} memory={rect.shape.memory_words}"
        )
    return "\n".join(lines) + "\n"


def _report(result: Result) -> str:
    totals, placement = result.totals, result.placement
    slowest = totals.slowest_cycles
    rows = [
        ("slowest kernel", f"{float(slowest):,.12g} cycles"),
        ("area lower bound", f"{placement.area_bound_cycles:,} cycles"),
        ("ratio", f"{float(slowest) / placement.area_bound_cycles:.4f}"),
        ("wire length", f"{totals.wire_length:,.1f}"),
        ("adapters", f"{totals.adapters} splits differ"),
        ("objective", f"{result.objective:,.1f}"),
        ("fill", f"{totals.fill:.4f}"),
        ("seconds", f"{result.seconds:.1f}"),
        ("legal", "yes" if not totals.errors else "NO: " + "; ".join(totals.errors)),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def _table(paths: Sequence[Path], options: argparse.Namespace) -> int:
    """One line a file and goal, as docs and results have it."""
    print("| graph | goal | slowest | bound | ratio | wires | objective | fill | seconds | legal |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---|")
    failed = 0
    for path in paths:
        for goal in ("objective", "slowest"):
            result = run(
                path,
                seconds=options.time,
                seed=options.seed,
                goal=goal,
                processes=options.processes,
            )
            totals, bound = result.totals, result.placement.area_bound_cycles
            failed += bool(totals.errors)
            print(
                f"| {path.stem} | {goal} | {float(totals.slowest_cycles):,.12g} | {bound:,} "
                f"| {float(totals.slowest_cycles) / bound:.4f} | {totals.wire_length:,.0f} "
                f"| {result.objective:,.0f} | {totals.fill:.3f} | {result.seconds:.0f} "
                f"| {'yes' if not totals.errors else 'NO'} |",
                flush=True,
            )
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 if a placement is not legal, 2 for a file that is not a graph."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.kgraph")
    parser.add_argument("--time", type=float, default=60.0, help="seconds at most (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="that search side by side (2)")
    parser.add_argument("--out", type=Path, help="where the placement is written (FILE.placement)")
    parser.add_argument(
        "--goal", choices=("objective", "slowest"), default="objective",
        help="objective: the smallest objective with a ratio of at most 1.05; slowest: the fastest "
        "slowest kernel, then short wires",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if len(options.files) > 1:
            return _table(options.files, options)
        path: Path = options.files[0]
        result = run(
            path,
            seconds=options.time,
            seed=options.seed,
            goal=options.goal,
            processes=options.processes,
        )
    except OpenWaferError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    target = options.out or Path(f"{path.stem}.placement")
    target.write_text(result.text, "utf-8")
    print(f"{path.name} -> {target}")
    print(_report(result))
    return 1 if result.totals.errors else 0


if __name__ == "__main__":
    sys.exit(main())

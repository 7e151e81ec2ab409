"""The order of the blocks that the search starts from.

Decides a line in which connected blocks are near each other: that of the pipeline. Does not decide
how the line is folded onto the floor.
"""

from __future__ import annotations

import numpy as np

from openwafer.plan.placement.problem import IntArray, Problem

__all__ = ["pipeline_order"]


def pipeline_order(problem: Problem) -> IntArray:
    """Indices of the blocks, [blocks]: as given, or along the wires, whichever has the shorter
    sum of weight × distance in the line."""
    given = list(range(len(problem.blocks)))
    followed = _along_wires(problem)
    best = min((given, followed), key=lambda order: (_stretch(problem, order), order != given))
    return np.array(best, dtype=np.int64)


def _along_wires(problem: Problem) -> list[int]:
    """Topological order that finishes one branch before the next; where wires run in a circle, the
    earliest block that is left goes first."""
    index = {block.name: number for number, block in enumerate(problem.blocks)}
    after: list[list[int]] = [[] for _ in problem.blocks]
    waits = [0] * len(problem.blocks)
    for wire in problem.wires:
        source, target = index.get(wire.source), index.get(wire.target)
        if source is not None and target is not None and source != target:
            after[source].append(target)
            waits[target] += 1
    ready = [number for number in reversed(range(len(waits))) if waits[number] == 0]
    order: list[int] = []
    done = [False] * len(waits)
    oldest = 0
    while len(order) < len(waits):
        while oldest < len(done) and done[oldest]:
            oldest += 1
        block = ready.pop() if ready else oldest
        if done[block]:
            continue
        done[block] = True
        order.append(block)
        for target in reversed(after[block]):
            waits[target] -= 1
            if waits[target] == 0 and not done[target]:
                ready.append(target)
    return order


def _stretch(problem: Problem, order: list[int]) -> float:
    place = {problem.blocks[block].name: at for at, block in enumerate(order)}
    return sum(
        wire.weight * abs(place[wire.source] - place[wire.target])
        for wire in problem.wires
        if wire.source in place and wire.target in place
    )

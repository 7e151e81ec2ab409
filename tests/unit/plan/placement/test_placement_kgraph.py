"""Kernel graphs of the contest's format: reading, sizes against plain enumeration, the command."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from benchmarks.kgraph import Convolution, KernelFamily, parse, read
from benchmarks.kgraph_check import check_text
from benchmarks.kgraph_random import SORTS, generate
from benchmarks.placement import main, placement_text, run

from openwafer.errors import DataError
from openwafer.plan.placement import Effort, area_bound, check, place

SMALL = """
(*
test=a-test
width=40
height=30
wdeltat=2
wlength=3
wadapter=5
memlimit=900
other=unknown
*)
(* Node Definitions *)
input[ 0] n=[8 8 4] name='k0'
conv[1] W=8 H=6 R=3 S=3 C=4 K=8 T=2 U=2 name='first one'
\tdblock[ 2] f=8 h=4 w=3
cblock[3] F=8 H=5 W=4 name="k3" (* with a remark *)
output[4] n=[2 2 8] name='k4'

(* Connectivity *)
dblock[2]:y -> cblock[3]:x, shape:[4][3][8]
input[0]:_    ->\tconv[1]:x, shape:[8][8][4]
conv[1]:y -> dblock[2]:x
cblock[3]:y -> output[4]:_, shape:[3][2][8];
"""


def test_a_file_is_read() -> None:
    graph = parse(SMALL)
    assert (graph.test, graph.width, graph.height) == ("a-test", 40, 30)
    assert (graph.cycle_weight, graph.wire_weight, graph.adapter_weight) == (2, 3, 5)
    assert [node.name for node in graph.nodes] == ["k0", "first one", "dblock2", "k3", "k4"]
    families = [node.family for node in graph.nodes if node.family is not None]
    assert {family.memory_words for family in families} == {900}
    assert families[0].convolutions == (Convolution(6, 8, 3, 3, 4, 8, 4),)
    assert families[1].convolutions[1] == Convolution(4, 3, 3, 3, 2, 2)
    assert families[2].convolutions[2] == Convolution(3, 2, 1, 1, 2, 8)
    assert families[2].convolutions[3] == Convolution(5, 4, 1, 1, 4, 8, 4)
    assert graph.edges[0].shape == (4, 3, 8)
    problem = graph.problem()
    assert [(wire.source, wire.target) for wire in problem.wires] == [
        ("dblock2", "k3"), ("first one", "dblock2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv[1] H=3 W=3 C=2 name='a'", "has no k"),
        ("relu[1] H=3", "neither a node nor an edge"),
        ("conv[1] H=3 W=3 C=2 K=2\nconv[1] H=3 W=3 C=2 K=2", "same number or name"),
        ("conv[1] H=3 W=3 C=2 K=2\nconv[1]:y -> conv[7]:x", "edges to nodes that are not there"),
        ("(*\nwidth=many\n*)", "not a number"),
    ],
)
def test_what_is_not_a_graph_says_why(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text)


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.kgraph")
    assert main([str(tmp_path / "none.kgraph")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize("target", [9, 40, 200])
def test_smallest_sizes_are_those_of_plain_enumeration(index: int, target: int) -> None:
    """Against every h, w, c and k with the formulas as they are written."""
    family = parse(SMALL).nodes[index].family
    assert family is not None
    enumerated = _enumerate(family, target)
    widths, heights = family.sizes(target)
    offered = set(zip(widths.tolist(), heights.tolist(), strict=True))
    assert _pareto(offered) == _pareto(enumerated)
    for width, height in _pareto(offered):
        shape = family.shape(width, height, target)
        assert (shape.width, shape.height) == (width, height)
        assert shape.time_cycles <= target
        assert shape.memory_words <= 900


def _enumerate(family: KernelFamily, target: int) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    high = max(one.height for one in family.convolutions)
    wide = max(one.width for one in family.convolutions)
    for h, w in product(range(1, high + 1), range(1, wide + 1)):
        choices = [_choices(one, h, w, target, family.memory_words) for one in family.convolutions]
        for combination in product(*choices):
            height = h * w * (max(c for c, _ in combination) + 1)
            width = 3 * sum(k for _, k in combination)
            if width <= family.longest and height <= family.longest:
                found.add((width, height))
    return found


def _choices(one: Convolution, h: int, w: int, target: int, limit: int) -> list[tuple[int, int]]:
    h, w = min(h, one.height), min(w, one.width)
    found: list[tuple[int, int]] = []
    for c in range(1, one.inputs + 1):
        for k in range(1, one.outputs + 1):
            if one.time(h, w, c, k) <= target and one.memory(h, w, c, k) <= limit:
                found.append((c, k))
                break
    return found


def _pareto(sizes: set[tuple[int, int]]) -> set[tuple[int, int]]:
    return {
        (w, h)
        for w, h in sizes
        if not any((a, b) != (w, h) and a <= w and b <= h for a, b in sizes)
    }


def test_time_and_memory_of_a_convolution() -> None:
    """By hand: 14 × 14, 3 × 3 filters, stride 2; four rows in two parts and so on."""
    one = Convolution(14, 14, 3, 3, 512, 256, 4)
    assert one.time(7, 2, 100, 64) == Fraction(2 * 7 * 6 * 4 * 9, 4)
    assert one.memory(7, 2, 128, 64) == 4 * 4 * 9 + Fraction(16, 7) * 8 * 4


def test_the_area_bound_of_equal_kernels() -> None:
    """Fully connected layers of 64 × 64 on 1 × 1 images, one to sixteen of them: the bound is the
    first time at which 16 × the smallest area fits, found by plain search."""
    layers = "\n".join(f"conv[{i}] H=1 W=1 R=1 S=1 C=64 K=64 T=1" for i in range(16))
    graph = parse(f"(*\nwidth=100\nheight=90\n*)\n{layers}")
    areas: dict[int, int] = {}
    for c, k in product(range(1, 65), range(1, 34)):
        cycles = -(-64 // c) * -(-64 // k)
        areas[cycles] = min(areas.get(cycles, 1 << 30), (c + 1) * 3 * k)
    expected = min(time for time, area in areas.items() if 16 * area <= 9000)
    assert area_bound(graph.problem()) == expected


_FAST = ("residual", "unet", "few_large")


@pytest.mark.parametrize(
    "sort", [pytest.param(s, marks=() if s in _FAST else pytest.mark.slow) for s in SORTS]
)
def test_random_graphs_are_placed_legally(sort: str) -> None:
    """Written, read, sized, placed, written again and checked by the other program."""
    text = generate(sort, 0)
    assert text == generate(sort, 0) != generate(sort, 1)
    graph = parse(text)
    problem = graph.problem()
    placement = place(problem, effort=Effort(most_groups=24, starts=1, moves=20))
    check(problem, placement)
    totals = check_text(text, placement_text(graph, placement))
    assert not totals.errors
    assert totals.slowest_cycles <= placement.slowest_cycles < totals.slowest_cycles + 1
    assert totals.wire_length == pytest.approx(placement.wire_length)
    assert totals.fill == pytest.approx(placement.fill)
    assert placement.ratio <= 1.15


def test_the_checker_sees_what_is_wrong() -> None:
    graph = parse(SMALL)
    text = placement_text(graph, place(graph.problem(), effort=Effort(starts=1, moves=5)))
    assert not check_text(SMALL, text).errors
    lines = text.splitlines()
    last = lines[-1]
    assert last.startswith("cblock[3]")
    for wrong, message in (
        (last.replace("cblock[3]", "cblock[7]"), "differ"),
        (last.replace(" x=", " x=4"), "outside"),
        (last.replace(" h=", " h=9"), "outside"),
    ):
        found = check_text(SMALL, "\n".join([*lines[:-1], wrong])).errors
        assert any(message in error for error in found), (wrong, found)
    corner = " ".join("x=0" if p.startswith("x=") else p for p in last.split())
    stacked = [" ".join("y=0" if p.startswith("y=") else p for p in corner.split())]
    first = " ".join("x=0" if p.startswith("x=") else p for p in lines[-2].split())
    stacked.append(" ".join("y=0" if p.startswith("y=") else p for p in first.split()))
    found = check_text(SMALL, "\n".join([*lines[:-2], *stacked])).errors
    assert any("overlap" in error for error in found)
    tight = SMALL.replace("memlimit=900", "memlimit=3")
    assert any("words" in error for error in check_text(tight, text).errors)


def test_the_command_writes_a_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "small.kgraph", tmp_path / "small.placement"
    path.write_text(SMALL, "utf-8")
    assert main([str(path), "--time", "0.2", "--processes", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("slowest kernel", "ratio", "wire length", "objective", "fill", "seconds"):
        assert word in printed
    assert "legal             yes" in printed
    again = run(path, seconds=0.2, seed=0, goal="objective")
    assert not again.totals.errors
    assert check_text(SMALL, out.read_text("utf-8")).slowest_cycles == again.totals.slowest_cycles

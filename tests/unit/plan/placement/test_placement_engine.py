"""Sizing and placement: what holds for every problem, and the exact parts against slow ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.errors import PlanError
from openwafer.plan.placement import (
    Block,
    Effort,
    Floor,
    Pin,
    Placement,
    Problem,
    Shape,
    Weights,
    Wire,
    area_bound,
    check,
    place,
)
from openwafer.plan.placement.sizing import TOO_LARGE, Curves, Sizing, inverse
from openwafer.plan.placement.slicing import build_tables, group_bounds

QUICK = Effort(starts=4, moves=60)


@st.composite
def problems(draw: st.DrawFn, most_blocks: int = 9) -> Problem:
    """A few blocks of divisible work, each with some ways to split it, wired at random."""
    num = draw(st.integers(1, most_blocks))
    blocks = [draw(_blocks(f"k{index}")) for index in range(num)]
    end = st.integers(0, num - 1)
    pairs = draw(st.lists(st.tuples(end, end, st.integers(1, 9)), max_size=2 * num))
    wires = [Wire(f"k{a}", f"k{b}", float(weight)) for a, b, weight in pairs]
    pins = (Pin("in", 0.0, 7.5),) if draw(st.booleans()) else ()
    wires += [Wire("in", "k0", 2.0) for _ in pins]
    floor = Floor(draw(st.integers(12, 40)), draw(st.integers(12, 40)))
    return Problem(floor, tuple(blocks), tuple(wires), pins)


@st.composite
def _blocks(draw: st.DrawFn, name: str) -> Block:
    work = draw(st.sampled_from((1, 7, 40, 100, 333, 900)))
    overhead = draw(st.integers(0, 2))
    shapes = [Shape(1, 1, work)]
    for width in draw(st.lists(st.integers(1, 12), max_size=4)):
        for height in draw(st.lists(st.integers(1, 12), max_size=4)):
            shapes.append(Shape(width, height + overhead, -(-work // (width * height))))
    return Block.of(name, *shapes, may_rotate=draw(st.booleans()))


@settings(max_examples=15, deadline=None)
@given(problems(), st.integers(0, 3))
def test_any_placement_is_legal_and_not_below_the_bound(problem: Problem, seed: int) -> None:
    placement = place(problem, effort=QUICK, seed=seed)
    check(problem, placement)
    _check_slowly(problem, placement)
    assert placement.slowest_cycles >= placement.area_bound_cycles == area_bound(problem)
    area = sum(rect.area for rect in placement.rectangles.values())
    assert placement.fill == pytest.approx(area / problem.floor.area)


def _check_slowly(problem: Problem, placement: Placement) -> None:
    """Core by core."""
    taken: set[tuple[int, int]] = set()
    for block in problem.blocks:
        rect = placement.rectangles[block.name]
        assert rect.shape in block.shapes.shapes  # type: ignore[attr-defined]
        for x in range(rect.x, rect.x + rect.width):
            for y in range(rect.y, rect.y + rect.height):
                assert (x, y) not in taken
                assert 0 <= x < problem.floor.width
                assert 0 <= y < problem.floor.height
                taken.add((x, y))


@settings(max_examples=10, deadline=None)
@given(problems(), st.integers(0, 15), st.integers(0, 15))
def test_a_larger_floor_is_never_slower(problem: Problem, wider: int, higher: int) -> None:
    small = place(problem, effort=QUICK)
    floor = Floor(problem.floor.width + wider, problem.floor.height + higher)
    large = place(replace(problem, floor=floor), effort=QUICK)
    assert large.slowest_cycles <= small.slowest_cycles


@settings(max_examples=5, deadline=None)
@given(problems(), st.integers(0, 2), st.booleans())
def test_the_same_seed_gives_the_same_placement(
    problem: Problem, seed: int, weighted: bool
) -> None:
    effort = Effort(orders=32, starts=4, moves=60)
    weights = Weights(1.0, 0.5, 1.2) if weighted else None
    first = place(problem, effort=effort, seed=seed, weights=weights)
    check(problem, first)
    assert place(problem, effort=effort, seed=seed, weights=weights) == first


@settings(max_examples=5, deadline=None)
@given(problems())
def test_more_orders_are_never_slower_and_weights_keep_to_their_ratio(problem: Problem) -> None:
    usual = place(problem, effort=QUICK)
    tried = place(problem, effort=replace(QUICK, orders=40))
    assert tried.slowest_cycles <= usual.slowest_cycles
    traded = place(problem, effort=QUICK, weights=Weights(1.0, 10.0, 1.3))
    check(problem, traded)
    most = max(int(1.3 * usual.area_bound_cycles), usual.slowest_cycles)
    assert traded.slowest_cycles <= most


@settings(max_examples=10, deadline=None)
@given(problems(most_blocks=4))
def test_the_tables_are_the_best_of_all_slicing_floorplans_in_order(problem: Problem) -> None:
    sizing = Sizing(problem)
    target = int(area_bound(problem) * 1.5)
    curves = sizing.curves(target)
    assert curves is not None
    order = np.arange(len(problem.blocks))
    singles = [(index, index + 1) for index in order.tolist()]
    tables = build_tables(sizing.kind_of, singles, curves)
    rows = [curves.heights[kind].astype(int) for kind in sizing.kind_of]
    slow = _slow_outline(rows, problem.floor.height)
    fast = tables.top.heights[-1][0].astype(int)
    limit = problem.floor.height
    assert np.array_equal(np.minimum(fast, limit + 1), np.minimum(slow, limit + 1))


def _slow_outline(rows: list[np.ndarray], floor_height: int) -> np.ndarray:
    """Smallest height for each width, by trying every cut of every run at every size."""
    if len(rows) == 1:
        return rows[0]
    best = np.full(len(rows[0]), TOO_LARGE)
    for split in range(1, len(rows)):
        one = _slow_outline(rows[:split], floor_height)
        two = _slow_outline(rows[split:], floor_height)
        best = np.minimum(best, one + two)
        for width in range(len(best)):
            for part in range(1, width):
                best[width] = min(best[width], max(one[part], two[width - part]))
    return np.minimum(best, TOO_LARGE)


def test_a_perfect_fit_is_found() -> None:
    """Eight pieces of a 24 × 24 square, of which a slicing floorplan is left to be found."""
    sizes = [(24, 8), (8, 16), (16, 4), (10, 12), (6, 6), (6, 3), (3, 3), (3, 3)]
    blocks = [Block.of(f"k{i}", Shape(w, h, 5), Shape(1, 1, 90)) for i, (w, h) in enumerate(sizes)]
    placement = place(Problem(Floor(24, 24), tuple(blocks)), effort=QUICK)
    assert placement.slowest_cycles == placement.area_bound_cycles == 5
    assert placement.fill == 1.0


def test_wires_of_a_chain_become_short() -> None:
    """16 equal squares in a line through a 4 × 4 grid: each wire as long as a side."""
    numbers = list(range(16))
    Random(1).shuffle(numbers)
    blocks = tuple(Block.of(f"k{n}", Shape(5, 5, 10)) for n in numbers)
    wires = tuple(Wire(f"k{n}", f"k{n + 1}") for n in range(15))
    placement = place(Problem(Floor(20, 20), blocks, wires), effort=Effort(starts=4, moves=500))
    assert placement.wire_length == 15 * 5


def test_a_block_slides_towards_its_pin() -> None:
    problem = Problem(
        Floor(30, 10), (Block.of("k", Shape(4, 4, 1)),), (Wire("pin", "k"),), (Pin("pin", 29, 2),)
    )
    placement = place(problem, effort=QUICK)
    assert placement.wire_length <= 1.0 + 2.0


def test_long_orders_are_grouped_and_stay_near_the_bound() -> None:
    """150 blocks in groups, checked whole."""
    random = Random(0)
    blocks: list[Block] = []
    for index in range(150):
        work = random.choice((60, 200, 450))
        sizes = [(w, h) for w in (1, 2, 3, 5, 8) for h in (1, 2, 4, 7, 10)]
        shapes = [Shape(w, h, -(-work // (w * h))) for w, h in sizes]
        blocks.append(Block.of(f"k{index}", *shapes))
    wires = tuple(Wire(f"k{i}", f"k{i + 1}") for i in range(149))
    problem = Problem(Floor(60, 50), tuple(blocks), wires)
    placement = place(problem, effort=Effort(most_groups=20, starts=1, moves=300))
    check(problem, placement)
    assert placement.ratio <= 1.25
    larger = replace(problem, floor=Floor(66, 50))
    assert place(larger, effort=Effort(20, 0, 1, 1)).slowest_cycles <= placement.slowest_cycles


def test_what_does_not_fit_says_so() -> None:
    wide = Block.of("wide", Shape(30, 1, 1))
    with pytest.raises(PlanError, match="no implementation that fits a floor of 10 × 10"):
        place(Problem(Floor(10, 10), (wide,)))
    halves = tuple(Block.of(f"k{i}", Shape(10, 6, 1)) for i in range(2))
    with pytest.raises(PlanError, match="120 cores at the least and the floor has 100"):
        place(Problem(Floor(10, 10), halves))
    thirds = tuple(Block.of(f"k{i}", Shape(6, 6, 1)) for i in range(2))
    with pytest.raises(PlanError, match="no arrangement"):
        place(Problem(Floor(10, 10), thirds))


def test_nothing_to_place() -> None:
    empty = Problem(Floor(3, 3), ())
    check(empty, place(empty))


def test_check_sees_what_is_wrong() -> None:
    blocks = (Block.of("a", Shape(4, 2, 9)), Block.of("b", Shape(3, 3, 5), may_rotate=False))
    problem = Problem(Floor(9, 5), blocks, (Wire("a", "b"),))
    good = place(problem, effort=QUICK)
    check(problem, good)

    def broken(name: str, **change: object) -> Placement:
        rect = replace(good.rectangles[name], **change)  # type: ignore[arg-type]
        return replace(good, rectangles={**good.rectangles, name: rect})

    other = good.rectangles["b"]
    for wrong, message in (
        (broken("a", x=other.x, y=other.y), "overlap"),
        (broken("a", x=-1), "outside"),
        (broken("a", width=3), "not its shape's"),
        (broken("b", rotated=True), "not its shape's"),
        (broken("a", shape=Shape(4, 2, 3)), "no implementation"),
        (replace(good, slowest_cycles=5), "slowest"),
        (replace(good, wire_length=0.25), "wires"),
        (replace(good, rectangles={}), "does not have the blocks"),
    ):
        with pytest.raises(PlanError, match=message):
            check(problem, wrong)


def test_inverse_of_a_staircase() -> None:
    rows = np.array([[9, 4, 4, 0], [TOO_LARGE, TOO_LARGE, 7, 7]], dtype=np.int16)
    found = inverse(rows, 9)
    for row, result in zip(rows, found, strict=True):
        for value in range(10):
            first = [index for index, length in enumerate(row) if length <= value]
            assert result[value] == (first[0] if first else TOO_LARGE)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_groups_cover_the_order(areas: list[int], most: int) -> None:
    bounds = group_bounds(np.array(areas), most)
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == len(areas)
    assert all(end > first for first, end in bounds)
    assert len(bounds) <= 2 * most + 1 or len(areas) <= most


def test_repeated_runs_are_computed_once() -> None:
    """Same outlines whether the blocks share kinds or not."""
    kinds = np.array([0, 1, 0, 1, 0, 1])
    heights = np.array([[TOO_LARGE, 6, 3, 2, 2, 2, 1], [TOO_LARGE, TOO_LARGE, 4, 4, 2, 2, 2]])
    heights = heights.astype(np.int16)
    shared = Curves(heights, inverse(heights, 9))
    apart = Curves(heights[kinds], inverse(heights[kinds], 9))
    singles = [(index, index + 1) for index in range(6)]
    one = build_tables(kinds, singles, shared)
    two = build_tables(np.arange(6), singles, apart)
    assert np.array_equal(one.top.heights[-1], two.top.heights[-1])
    assert len(one.top.heights[2]) == 2 < len(two.top.heights[2]) == 5
    grouped = build_tables(kinds, [(0, 2), (2, 4), (4, 6)], shared)
    assert grouped.height >= one.height


def test_order_of_the_blocks_matters_only_to_tables() -> None:
    """With every order tried, three blocks fit exactly where one of the orders does."""
    sizes = [(4, 2), (2, 3), (2, 3)]
    results = set()
    for order in permutations(range(3)):
        blocks = tuple(
            Block.of(f"k{i}", Shape(*sizes[i], 1), Shape(1, 1, 50), may_rotate=False) for i in order
        )
        placement = place(Problem(Floor(4, 5), blocks), effort=replace(QUICK, orders=64))
        results.add(placement.slowest_cycles)
    assert results == {1}

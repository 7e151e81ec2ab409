"""The parts of a pipeline: cuts, tables, split backward passes, microbatches."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import CASES, Net, model_of
from runtime_reference import CPU, KEY, Setup, buffers_of
from torch import nn

from openwafer.errors import PlanError
from openwafer.frontends.torch.capture import flatten_batch
from openwafer.runtime.microbatches import split_batch
from openwafer.runtime.stages.cuts import balance, cut_into_stages, joined_layers
from openwafer.runtime.stages.layout import choose_split
from openwafer.runtime.stages.schedule import (
    ScheduleName,
    schedule_tables,
    stages_per_process,
)
from openwafer.runtime.stages.split_backward import split_backward

SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved", "zero_bubble")


# ---------------------------------------------------------------- cuts


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sets(st.integers(1, 7)),
)
def test_no_other_cut_has_a_cheaper_dearest_stage(
    costs: list[int], num_stages: int, joined: set[int]
) -> None:
    """Against all cuts there are."""
    places = [i for i in range(1, len(costs)) if i not in joined]
    if len(places) + 1 < num_stages:
        with pytest.raises(PlanError, match="layers that can be parted"):
            balance(costs, num_stages, frozenset(joined))
        return
    parts = balance(costs, num_stages, frozenset(joined))
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == num_stages
    assert all(len(part) for part in parts)
    assert not {part.start for part in parts} & joined

    def dearest(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(costs)]
        return max(sum(costs[a:b]) for a, b in pairwise(bounds))

    best = min(dearest(cuts) for cuts in combinations(places, num_stages - 1))
    assert max(sum(costs[i] for i in part) for part in parts) == best


def test_layers_that_share_changing_statistics_stay_together() -> None:
    setup = Setup(*model_of("batch norm used twice"))
    joined = joined_layers(setup.train)
    users = [
        {*one.layer.buffers, *(b for _, b in one.buffer_updates)} for one in setup.train.layers
    ]
    changed = {b for one in setup.train.layers for _, b in one.buffer_updates}
    for node in changed:
        places = [i for i, used in enumerate(users) if node in used]
        assert set(range(places[0] + 1, places[-1] + 1)) <= joined


def test_a_skip_goes_straight_to_its_reader() -> None:
    """The hole of torch's schedules: a value that crosses several stages."""
    setup = Setup(*model_of("unet"))
    layers = len(setup.layers)
    staged = cut_into_stages(setup.train, [range(i, i + 1) for i in range(layers)], layers)
    crossings = {(c.source, c.target): c for stage in staged.stages for c in stage.outgoing}
    assert any(target - source > 1 for source, target in crossings)
    for stage in staged.stages:
        produced = {name for one in stage.layers for name in one.layer.outputs}
        for crossing in stage.outgoing:
            assert set(crossing.names) <= produced


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 8])
def test_tables_can_be_run(name: ScheduleName, num_processes: int, num_microbatches: int) -> None:
    """By processes that do their actions in order and wait for what an action needs: none waits
    for ever, each stage does each microbatch once, and backward passes go in order."""
    tables = schedule_tables(name, num_processes, num_microbatches)
    num_stages = num_processes * stages_per_process(name)
    waiting = [list(table) for table in tables]
    done: set[tuple[str, int, int]] = set()
    backward: dict[int, list[int]] = {stage: [] for stage in range(num_stages)}
    progress = True
    while progress:
        progress = False
        for process, actions in enumerate(waiting):
            while actions:
                action = actions[0]
                stage, m = action.stage, action.microbatch
                assert stage % num_processes == process
                needs = {
                    "F": {("F", stage - 1, m)} if stage else set(),
                    "B": {("F", stage, m)}
                    | ({("I", stage + 1, m)} if stage + 1 < num_stages else set()),
                    "W": {("I", stage, m)},
                }
                needs["I"] = needs["B"]
                if not needs[action.kind] <= done:
                    break
                kinds = ("I", "W") if action.kind == "B" else (action.kind,)
                new = {(kind, stage, m) for kind in kinds}
                assert not new & done
                done |= new
                if action.kind in "BI":
                    backward[stage].append(m)
                actions.pop(0)
                progress = True
    assert not any(waiting), "they wait for each other"
    assert len(done) == 3 * num_stages * num_microbatches
    assert all(order == sorted(order) for order in backward.values())


def test_interleaving_keeps_the_bubble_of_its_formula() -> None:
    """Idle slots of one process with equal forward and backward slots: (p - 1)/v of both."""
    tables = schedule_tables("interleaved", 2, 4)
    assert [len(table) for table in tables] == [16, 16]


def test_a_number_without_a_schedule_is_refused() -> None:
    with pytest.raises(PlanError, match="no schedule for 9 microbatches"):
        schedule_tables("interleaved", 2, 9)
    with pytest.raises(PlanError, match="at least one microbatch"):
        schedule_tables("1f1b", 2, 0)


# ---------------------------------------------------------------- split backward passes


def _both_ways(name_or_model, batch=None) -> int:
    """Whole and split backward passes of every layer, bit for bit; counts gradients compared."""
    model, batch = model_of(name_or_model) if batch is None else (name_or_model, batch)
    setup = Setup(model, batch)
    buffers = buffers_of(model, setup.train.program)
    weights = dict(model.named_parameters())
    values = setup.train.feed(flatten_batch(batch), CPU)

    def of(layer):
        return [weights[name].detach() for name in layer.layer.parameters]

    saved = [layer.forward(KEY, of(layer), buffers, values) for layer in setup.train.layers]
    flowing = setup.train.seed_gradients(values, 1.0)
    compared = 0
    for layer in reversed(setup.train.layers):
        kept, before = saved.pop(), dict(flowing)
        whole = layer.backward(of(layer), kept, flowing)
        parts = split_backward(layer.functions)
        grad_inputs, carried = parts.inputs(of(layer), kept, layer.take_gradients(before))
        layer.give_gradients(before, grad_inputs)
        later = parts.weights(of(layer), carried)
        assert before.keys() == flowing.keys()
        pairs = [(before[n], flowing[n]) for n in flowing] + list(zip(later, whole, strict=True))
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
            compared += ours is not None
    return compared


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("mlp", "a weight in two layers") else pytest.mark.slow
        )
        for name in CASES
    ],
)
def test_a_split_backward_pass_has_the_same_bits(name: str) -> None:
    _both_ways(name)


def test_operations_with_several_results_are_split_right() -> None:
    """torch's split is wrong here (pytorch 170277): a layer norm's and an LSTM's backward give
    gradients of inputs and weights at once."""
    model = Net(lambda m, x: m.r(m.n(x))[0].square().mean(), n=nn.LayerNorm(4), r=nn.LSTM(4, 5))
    assert _both_ways(model, (torch.randn(2, 3, 4),)) >= 6


def test_a_weight_that_is_read_twice_is_counted_once() -> None:
    """torch's split counts it twice (pytorch 180952)."""
    model = Net(lambda m, x: m.a(torch.tanh(m.a(x))).square().mean(), a=nn.Linear(6, 6))
    assert _both_ways(model, (torch.randn(3, 6),)) == 2


def test_the_first_part_leaves_weights_gradients_out() -> None:
    """Else there would be nothing to put off."""
    setup = Setup(*model_of("mlp"))
    middle = setup.train.layers[1].functions
    parts = split_backward(middle)
    assert parts.inputs_graph is not None
    assert parts.weights_graph is not None
    products = [
        sum("mm" in str(node.target) for node in graph.graph.nodes)
        for graph in (parts.inputs_graph, parts.weights_graph)
    ]
    assert products == [1, 1]


# ---------------------------------------------------------------- microbatches


def test_a_batch_is_cut_along_its_samples() -> None:
    batch = {
        "x": torch.arange(12).reshape(6, 2),
        "pair": (torch.arange(6), "text"),
        "scale": torch.tensor(2.0),
        "classes": torch.arange(4),
    }
    parts = split_batch(batch, 3)
    assert [part["x"].tolist() for part in parts] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]],
    ]  # fmt: skip
    assert parts[2]["pair"][0].tolist() == [4, 5]
    assert all(part["pair"][1] == "text" and part["classes"].numel() == 4 for part in parts)
    assert split_batch(batch, 1)[0] is batch


@given(
    st.integers(1, 64), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from(SCHEDULES),
)  # fmt: skip
def test_the_choice_fits_or_is_refused(
    batch_size: int, batches: int, stages: int, replicas: int, schedule: ScheduleName
) -> None:
    given = {
        "batch_size": batch_size,
        "batches_per_step": batches,
        "num_stages": stages,
        "num_replicas": replicas,
        "schedule": schedule,
    }
    counts = [d * batches for d in range(1, batch_size + 1) if batch_size % d == 0]
    fitting = [
        c for c in counts if c % replicas == 0 and _has_tables(schedule, stages, c // replicas)
    ]
    if not fitting:
        with pytest.raises(PlanError, match="cannot be shared"):
            choose_split(asked=None, **given)
        return
    split = choose_split(asked=None, **given)
    assert split * batches in fitting
    assert choose_split(asked=split, **given) == split


def _has_tables(schedule: ScheduleName, stages: int, count: int) -> bool:
    rounds = max(1, count // stages)
    return schedule in ("gpipe", "1f1b") or count % rounds == 0


def test_a_split_that_is_asked_for_must_be_equal() -> None:
    given = {"batch_size": 12, "batches_per_step": 1, "num_stages": 2, "num_replicas": 1}
    with pytest.raises(PlanError, match="12 samples has no 5 equal parts"):
        choose_split(asked=5, schedule="1f1b", **given)
    with pytest.raises(PlanError, match="3 microbatches in a step do not divide among 2"):
        choose_split(asked=3, schedule="1f1b", **{**given, "num_replicas": 2})
    assert choose_split(asked=None, schedule="1f1b", **given) == 6

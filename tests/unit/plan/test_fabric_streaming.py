"""Steps of weight streaming: by hand, against the formulas written again, and what always holds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from handmade_program import program_of
from openwafer.errors import PlanError
from openwafer.graph.program import Program
from openwafer.kernels import ADAM, match
from openwafer.machine import Machine, Rates, load_machine
from openwafer.plan.fabric.streaming import plan_streaming
from openwafer.plan.fabric.values import FabricPlan, Prediction
from openwafer.plan.layers import cut_layers

TINY = load_machine("tiny")
ONE = Rates(float32=1, float16=1)
PLAIN = replace(
    TINY, fabric_rows=1, fabric_cols=4, clock_hz=1000, planning_macs_per_cycle=ONE,
    activation_macs_per_cycle=ONE, elementwise_ops_per_cycle=ONE, sram_bytes_per_pe=1 << 30,
    io_bytes_per_second=1 << 40, weight_bytes_per_second=1 << 40, layer_switch_seconds=0.0,
    step_seconds=0.0,
)  # fmt: skip
"""One operation per cycle on four PEs, nothing else takes time."""


class Mlp(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x.sum()


@cache
def mlp(width: int = 16, depth: int = 3, batch: int = 4, training: bool = True) -> Program:
    return program_of(Mlp(width, depth), torch.zeros(batch, width), training=training)


@cache
def one_product() -> Program:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    return program_of(One(), torch.zeros(2, 6), training=False)


def run(
    program: Program, machine: Machine, *, num_systems: int = 1, batch_size: int | None = None
) -> tuple[FabricPlan, Prediction]:
    return plan_streaming(
        cut_layers(program), match(program, execution_mode="weight_streaming"), program, machine,
        optimizer=ADAM, num_systems=num_systems, batch_size=batch_size,
    )  # fmt: skip


def test_one_product_by_hand() -> None:
    # 60 products of the batch on 4 PEs: 15 cycles for 2 samples.
    _, predicted = run(one_product(), PLAIN)
    assert predicted.samples_per_second == pytest.approx(1000 * 2 / 15)
    assert predicted.delta_t_cycles == 8
    # Weights of 120 bytes at 100 bytes a second take longer than that.
    _, predicted = run(one_product(), replace(PLAIN, weight_bytes_per_second=100))
    assert predicted.batch_seconds == pytest.approx(1.2)
    assert "weights" in predicted.bottleneck
    _, predicted = run(one_product(), replace(PLAIN, step_seconds=2.0, layer_switch_seconds=0.5))
    assert predicted.batch_seconds == pytest.approx(2.5 + 0.015)
    assert "larger batch" in predicted.relief


def test_passes_follow_the_formula() -> None:
    program = mlp()
    machine = replace(PLAIN, weight_bytes_per_second=2000, layer_switch_seconds=0.1)
    _, predicted = run(program, machine)
    passes = predicted.timeline
    names = [p.layer for p in passes]
    assert names == [*names[:3], *names[2::-1]]
    assert [p.phase for p in passes] == ["forward"] * 3 + ["backward"] * 3
    now = 0.0
    for one in passes:
        assert one.start_seconds == pytest.approx(now)
        longest = max(one.compute_seconds, one.weight_seconds, one.gradient_seconds)
        assert one.seconds == pytest.approx(longest + 0.1)
        now += one.seconds
    assert passes[0].weight_seconds == 16 * 16 * 4 / 2000
    assert passes[-1].gradient_seconds == 16 * 16 * 4 / 2000
    assert predicted.batch_seconds == pytest.approx(now)


def test_streams_that_do_not_overlap_add_up() -> None:
    program = mlp()
    machine = replace(PLAIN, weight_bytes_per_second=2000, streams_overlap=0.0)
    _, predicted = run(program, machine)
    for one in predicted.timeline:
        assert one.seconds == pytest.approx(
            one.compute_seconds + one.weight_seconds + one.gradient_seconds
        )


def test_recomputation_and_microbatches_come_when_memory_ends() -> None:
    program = mlp(depth=6)
    # Kept for the backward pass: input and output of relu and the product's input of each layer.
    full = replace(PLAIN, fabric_cols=1, sram_bytes_per_pe=1 << 20)
    assert not run(program, full)[1].recomputes
    little = replace(full, sram_bytes_per_pe=TINY.sram_reserved_bytes_per_pe + 2000)
    _, predicted = run(program, little)
    assert predicted.recomputes
    assert predicted.batch_seconds > run(program, full)[1].batch_seconds
    assert any("done again" in note for note in predicted.notes)
    _, large = run(program, little, batch_size=64)
    assert large.num_microbatches > 1
    assert large.largest_batch < 64
    with pytest.raises(PlanError, match="activations of one sample do not fit"):
        run(program, replace(full, sram_bytes_per_pe=TINY.sram_reserved_bytes_per_pe + 64))


@settings(max_examples=20, deadline=None)
@given(
    cols=st.integers(1, 400), more=st.integers(1, 400), batch=st.integers(1, 512),
    link=st.sampled_from([10**3, 10**6, 10**9]),
)  # fmt: skip
def test_what_always_holds(cols: int, more: int, batch: int, link: int) -> None:
    program = mlp()
    small = replace(TINY, fabric_cols=cols, weight_bytes_per_second=link)
    fabric, slow = run(program, small, batch_size=batch)
    _, fast = run(program, replace(small, fabric_cols=cols + more), batch_size=batch)
    assert fast.samples_per_second >= slow.samples_per_second * (1 - 1e-9)
    least = min(slow.compute_samples_per_second, slow.transmission_samples_per_second)
    # Weights in and gradients out overlap, so that only the work is a bound for sure.
    assert slow.samples_per_second <= slow.compute_samples_per_second * (1 + 1e-9)
    assert least > 0
    assert 0 < fabric.active_pes <= small.num_pes == fabric.fabric_pes
    for row in fabric.kernels:
        assert 0 < row.utilization <= 1


def test_more_systems_are_faster_but_not_more_than_so_many_times() -> None:
    program = mlp(batch=64)
    machine = replace(PLAIN, weight_bytes_per_second=100_000, step_seconds=0.01)
    _, predicted = run(program, machine, num_systems=3)
    rates = {s.num_systems: s.samples_per_second for s in predicted.systems}
    assert list(rates) == [1, 2, 3, 4, 8, 16, 32, 64]
    assert predicted.samples_per_second == rates[3]
    for count, rate in rates.items():
        assert rates[1] * (1 - 1e-3) <= rate <= rates[1] * count * (1 + 1e-9)


def test_evaluation_has_no_backward_pass() -> None:
    _, predicted = run(mlp(training=False), PLAIN)
    assert {p.phase for p in predicted.timeline} == {"forward"}
    assert not predicted.recomputes

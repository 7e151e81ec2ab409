"""Sizes, places and rates of layer pipelined plans: by hand, and what must always hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
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
from openwafer.kernels.kernel import OptimizerCost
from openwafer.machine import Machine, Rates, load_machine
from openwafer.plan.fabric.demand import demands_of, nets_of
from openwafer.plan.fabric.pipelined import plan_pipelined
from openwafer.plan.fabric.sizing import size_kernels
from openwafer.plan.fabric.values import FabricPlan, Prediction
from openwafer.plan.layers import cut_layers

TINY = load_machine("tiny")


class Mlp(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return F.cross_entropy(self.layers[-1](x), y)


class Tower(nn.Module):
    """Layers of attention on a sequence: each needs the whole sample before it gives anything."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for query in self.query:
            q = query(x)[:, None]
            x = x + F.scaled_dot_product_attention(q, q, q)[:, 0]
        return x.square().mean()


@cache
def mlp(*widths: int, batch: int = 4, training: bool = True, half: bool = False) -> Program:
    dtype = torch.float16 if half else torch.float32
    return program_of(
        Mlp(list(widths)).to(dtype),
        torch.zeros(batch, widths[0], dtype=dtype),
        torch.zeros(batch, dtype=torch.long),
        training=training,
    )


@cache
def tower(layers: int, length: int = 8, width: int = 16) -> Program:
    return program_of(Tower(layers, width), torch.zeros(2, length, width))


Planned = tuple[FabricPlan, Prediction]


def run(
    program: Program, machine: Machine, *, num_replicas: int = 1, optimizer: OptimizerCost = ADAM
) -> Planned:
    graph, layers = match(program), cut_layers(program)
    return plan_pipelined(
        layers, graph, program, machine, optimizer=optimizer, num_replicas=num_replicas
    )


def simple_machine(num_pes: int, **changes: object) -> Machine:
    """One operation per cycle, wide links, ample memory: cycles are counts of operations."""
    one = Rates(float32=1, float16=1)
    fields: dict[str, object] = {
        "name": "simple", "fabric_rows": 1, "fabric_cols": num_pes, "clock_hz": 1000,
        "peak_macs_per_cycle": one, "planning_macs_per_cycle": one,
        "activation_macs_per_cycle": one, "elementwise_ops_per_cycle": one,
        "link_bytes_per_cycle": 1 << 20, "sram_bytes_per_pe": 1 << 30,
        "io_bytes_per_second": 1 << 40,
    }  # fmt: skip
    return replace(TINY, **(fields | changes))  # type: ignore[arg-type]


def assert_legal(fabric: FabricPlan, machine: Machine) -> None:
    """No overlap, inside the floor, memory within the PEs, colors and links within limits."""
    owner = np.zeros((fabric.fabric_rows, fabric.fabric_cols), dtype=int)
    for rect in fabric.rectangles:
        assert rect.x >= 0
        assert rect.y >= 0
        assert rect.x + rect.width <= fabric.fabric_cols
        assert rect.y + rect.height <= fabric.fabric_rows
        owner[rect.y : rect.y + rect.height, rect.x : rect.x + rect.width] += 1
    assert owner.max() <= 1
    assert owner.sum() == fabric.active_pes
    first = [rect for rect in fabric.rectangles if rect.replica == 0]
    for row in fabric.kernels:
        area = sum(r.pes for r in first if r.kernel == row.name and r.role == "kernel")
        assert area == row.pes
        assert row.memory_bytes <= row.memory_room + 1
        assert row.memory_room == row.pes * machine.data_bytes_per_pe
    assert fabric.max_colors <= fabric.free_colors
    assert 0 < fabric.active_pes <= fabric.fabric_pes == machine.num_pes


def test_one_linear_layer_by_hand() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    program = program_of(One(), torch.zeros(2, 6), training=False)
    # 30 products per sample. On 4 PEs in a row: tiles of 6 x 2 (or 2 x 5): 10 cycles are the least.
    fabric, predicted = run(program, simple_machine(4))
    assert predicted.delta_t_cycles == 10
    assert fabric.kernels[0].pes <= 4
    assert predicted.samples_per_second == 1000 / 10
    # With room for all, no more PEs than there are products: one cycle per sample.
    fabric, predicted = run(program, replace(simple_machine(10), fabric_rows=10))
    assert (predicted.delta_t_cycles, fabric.active_pes) == (1, 30)


def test_the_batch_on_one_link_is_a_bound() -> None:
    program = mlp(16, 32, 8, batch=1, training=False)
    machine = replace(simple_machine(100, link_bytes_per_cycle=4), fabric_rows=20)
    fabric, predicted = run(program, machine)
    assert predicted.delta_t_cycles == 16  # 16 floats of 4 bytes, 4 bytes per cycle
    assert "entering the wafer" in predicted.bottleneck
    assert predicted.input_samples_per_second == predicted.samples_per_second
    assert fabric.active_pes < 2000


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 60),
    cols=st.integers(2, 60),
    link=st.sampled_from([4, 64]),
    sram=st.sampled_from([4096, 49152]),
    which=st.sampled_from(["mlp", "tower"]),
)
def test_what_always_holds(rows: int, cols: int, link: int, sram: int, which: str) -> None:
    machine = replace(
        TINY, fabric_rows=rows, fabric_cols=cols, link_bytes_per_cycle=link, sram_bytes_per_pe=sram
    )
    program = mlp(16, 32, 32, 8) if which == "mlp" else tower(2)
    try:
        fabric, predicted = run(program, machine)
    except PlanError:
        return
    assert_legal(fabric, machine)
    parts = (
        predicted.compute_samples_per_second,
        predicted.transmission_samples_per_second,
        predicted.input_samples_per_second,
    )
    assert predicted.samples_per_second <= min(parts) * (1 + 1e-9)
    assert predicted.samples_per_second >= min(parts) * (1 - 2 / predicted.delta_t_cycles)
    assert predicted.samples_per_second == machine.clock_hz / predicted.delta_t_cycles
    assert predicted.batch_samples_per_second <= predicted.samples_per_second * (1 + 1e-9) or (
        program.num_samples == 1
    )
    for row in fabric.kernels:
        assert 0 < row.utilization <= 1
        assert row.compute_cycles >= row.forward_cycles >= 0
    assert fabric.area_bound_cycles <= predicted.delta_t_cycles + 1


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(cols=st.integers(8, 80), more=st.integers(1, 80), high=st.integers(0, 20))
def test_a_larger_floor_is_never_slower(cols: int, more: int, high: int) -> None:
    program = mlp(16, 32, 32, 8)
    small = replace(TINY, fabric_cols=cols)
    large = replace(TINY, fabric_cols=cols + more, fabric_rows=TINY.fabric_rows + high)
    slow, fast = (run(program, machine)[1] for machine in (small, large))
    # Rates are offered in steps of 2 %, which is what a floor may miss by.
    assert fast.samples_per_second >= slow.samples_per_second * 0.97


@pytest.mark.parametrize("which", ["mlp", "tower"])
def test_the_rectangles_are_legal(which: str) -> None:
    machine = replace(TINY, fabric_rows=24, fabric_cols=30)
    program = mlp(16, 32, 32, 8) if which == "mlp" else tower(2)
    fabric, predicted = run(program, machine)
    assert_legal(fabric, machine)
    assert predicted.samples_per_second == machine.clock_hz / predicted.delta_t_cycles
    _, larger = run(program, replace(machine, fabric_rows=60))
    assert larger.samples_per_second >= predicted.samples_per_second * 0.97


def test_the_clock_scales_the_rate() -> None:
    program = mlp(16, 32, 32, 8)
    base, double = (run(program, replace(TINY, clock_hz=c))[1] for c in (10**9, 2 * 10**9))
    assert double.delta_t_cycles == base.delta_t_cycles
    assert double.samples_per_second == 2 * base.samples_per_second


def test_a_model_that_does_not_fit_says_what_is_short() -> None:
    small = replace(TINY, fabric_rows=1, fabric_cols=8)
    with pytest.raises(PlanError, match="does not fit machine `tiny`") as caught:
        run(mlp(16, 256, 256, 8), small)
    assert "memory is short" in caught.value.what
    assert "weight_streaming" in caught.value.hint
    with pytest.raises(PlanError, match="PEs are short"):
        run(mlp(16, 32, 32, 8), replace(TINY, fabric_rows=1, fabric_cols=2))


def test_what_leaves_a_kernel_arrives_at_its_readers() -> None:
    """Conservation: the bytes of every net are those of the tensor, and each kernel's operands of
    the batch arrive by some net."""
    program = tower(2)
    graph = match(program)
    nets = nets_of(graph, program)
    samples = program.num_samples
    by_name = {m.name: m for m in graph.working}
    for net in nets:
        if not net.from_host:
            assert net.num_bytes == by_name[net.source].output.num_bytes / samples
        for target in net.targets:
            assert target in by_name
    arriving = {name: sum(net.num_bytes for net in nets if name in net.targets) for name in by_name}
    for demand in demands_of(graph, cut_layers(program), program, TINY, ADAM):
        reads = demand.cost.forward.bytes_in / samples
        # Views of one tensor (q, k and v here) arrive once.
        assert 0 < arriving[demand.name] <= reads


def test_deep_pipelines_run_out_of_memory_before_they_run_out_of_pes() -> None:
    """Samples in flight grow with the depth, each with activations in every layer: beyond some
    depth the rate falls faster than the work grows, and PEs idle."""
    machine = replace(
        TINY, fabric_rows=40, fabric_cols=40, sram_bytes_per_pe=1152 + 512, waiting_per_step=8.0,
        elementwise_ops_per_cycle=Rates(float32=1, float16=1),
    )  # fmt: skip

    def at(layers: int) -> tuple[float, float]:
        program = tower(layers)
        demands = demands_of(match(program), cut_layers(program), program, machine, ADAM)
        sizing = size_kernels(demands, machine, lowest=1, lowest_name="")
        return sizing.cycles, sizing.pace

    cycles = {layers: at(layers) for layers in (1, 8)}
    assert cycles[1][1] == pytest.approx(1.0, abs=0.2)
    assert cycles[8][1] < 0.75
    assert cycles[8][0] > 1.3 * 8 * cycles[1][0]


@pytest.mark.parametrize("count", [2, 4, 6])
def test_replicas_share_the_floor(count: int) -> None:
    program = mlp(16, 32, 8, batch=12)
    machine = replace(TINY, fabric_rows=48, fabric_cols=48)
    one, _ = run(program, machine)
    fabric, predicted = run(program, machine, num_replicas=count)
    assert_legal(fabric, machine)
    assert fabric.num_replicas == count
    assert {rect.replica for rect in fabric.rectangles} == set(range(count))
    first = [rect for rect in fabric.rectangles if rect.replica == 0]
    assert len(fabric.rectangles) == count * len(first)
    assert fabric.active_pes % count == 0
    assert one.num_replicas == 1
    assert predicted.samples_per_second > 0


def test_the_compiler_chooses_replicas_where_the_input_is_the_bound() -> None:
    """One lane carries a sample in 16 cycles whatever the PEs; copies have lanes of their own."""
    program = mlp(16, 8, 4, batch=8, training=False)
    machine = replace(TINY, fabric_rows=64, fabric_cols=64, io_bytes_per_second=10**12)
    _, one = run(program, machine)
    fabric, chosen = run(program, machine, num_replicas=-1)
    assert fabric.num_replicas > 1
    assert chosen.samples_per_second > 1.5 * one.samples_per_second
    with pytest.raises(PlanError, match="num_replicas"):
        run(program, machine, num_replicas=0)


def test_fc_mnist_beside_the_published_estimate() -> None:
    """Published: 464 cycles per sample (Neocortex compilation key metrics; the widths of that run
    are not stated, these are the release's TensorFlow configuration). 392 cycles are 784 16-bit
    pixels on one link."""
    program = mlp(784, 500, 300, 10, batch=256, half=True)
    fabric, predicted = run(program, load_machine("wse2"))
    assert predicted.delta_t_cycles == 784 * 2 / 4
    assert abs(predicted.delta_t_cycles / 464 - 1) < 0.2
    assert_legal(fabric, load_machine("wse2"))

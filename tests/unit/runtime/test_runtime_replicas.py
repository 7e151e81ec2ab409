"""Replicas of weight streaming: the numbers of one process, whatever their number."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from group_processes import Processes
from hypothesis import given
from hypothesis import strategies as st
from replica_runs import drive, replicated
from runtime_cases import CASES, model_of
from runtime_reference import (
    Setup,
    assert_states_equal,
    batches_like,
    optimizer_config,
    run_steps,
)
from torch import nn

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import PlanError
from openwafer.frontends.torch.metrics import AccuracyMetric
from openwafer.runtime.executor import Executor, ModelState, StepResult
from openwafer.runtime.replicas import ReplicatedStreaming, refuse_changing_buffers
from openwafer.runtime.stores.shared_store import assign_owners
from openwafer.runtime.stores.store import Shard

STEPS, MICROBATCHES = 3, 4

IN_DOUBLE = {"multihead attention"}
"""Cases with a gradient that is zero but for rounding (a key's bias), which Adam divides by its own
size: in float64 the rounding is nothing beside `eps`."""


def steps_and_state(
    executor: Executor, setup: Setup
) -> tuple[list[StepResult], StepResult | None, ModelState]:
    data = batches_like(setup.batch, STEPS * MICROBATCHES)
    results = run_steps(executor, data, microbatches=MICROBATCHES)
    evaluated = executor.eval_step(data[0], step=STEPS) if setup.evaluates else None
    return results, evaluated, executor.state()


def assert_like_one_process(
    setup: Setup, config: OptimizerConfig, where: Path, **options: Any
) -> None:
    alone = setup.streaming(config)
    expected, evaluated, state = steps_and_state(alone, setup)
    alone.close()
    (found, found_evaluation, found_state), *_ = replicated(
        setup, config, steps_and_state, where, **options
    )
    for ours, theirs in zip(found, expected, strict=True):
        # Losses travel in fp32.
        torch.testing.assert_close(ours.loss, theirs.loss.float(), rtol=2e-6, atol=1e-7)
        assert (ours.applied, ours.loss_scale) == (theirs.applied, theirs.loss_scale)
        assert ours.grad_norm == (theirs.grad_norm and pytest.approx(theirs.grad_norm, rel=2e-6))
    if evaluated is not None:
        torch.testing.assert_close(found_evaluation.loss, evaluated.loss, rtol=2e-6, atol=1e-7)
    assert_states_equal(found_state, state, 2e-6)


@pytest.fixture(scope="module")
def gpt() -> Setup:
    """Tied weights, dropout, four kinds of layers."""
    return Setup(*model_of("gpt, fused attention dropout"), evaluates=True)


# A key's bias has no influence on attention: its gradient is rounding noise alone, which Adam
# would blow up to full steps. `eps` above the noise keeps the comparison about what is meant.
CONFIGS = {
    "adamw": optimizer_config("adamw", eps=1e-4),
    "clipped by norm": optimizer_config("adamw", max_gradient_norm=0.5),
    "clipped by value": optimizer_config("sgd", momentum=0.9, max_gradient_value=0.01),
    "dynamic loss scale": optimizer_config(
        "adam",
        eps=1e-4,
        loss_scaling_factor="dynamic",
        initial_loss_scale=2.0**130,  # overflows at first
        max_gradient_norm=1.0,
        steps_per_increase=2,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_two_replicas(name: str, gpt: Setup, tmp_path: Path) -> None:
    assert_like_one_process(gpt, CONFIGS[name], tmp_path)


def test_four_replicas_with_stores_on_disk(gpt: Setup, tmp_path: Path) -> None:
    config = CONFIGS["clipped by norm"]
    assert_like_one_process(gpt, config, tmp_path, count=4, disk=True)


@pytest.mark.parametrize("name", ["unet", "channels last", "gpt, tied head"])
def test_kinds_of_models(name: str, tmp_path: Path) -> None:
    assert_like_one_process(Setup(*model_of(name)), CONFIGS["adamw"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    model, batch = model_of(name)
    if name in IN_DOUBLE:
        model, batch = model.double(), tuple(tensor.double() for tensor in batch)
    setup = Setup(model, batch)
    try:
        refuse_changing_buffers(setup.workload(CONFIGS["adamw"]))
    except PlanError:
        pytest.skip("batch statistics are refused")
    assert_like_one_process(setup, CONFIGS["clipped by norm"], tmp_path)


def test_sixteen_bits(tmp_path: Path) -> None:
    """The 16-bit copies travel; sums and master weights are fp32."""
    setup = Setup(*model_of("gpt, tied head"), dtype=torch.bfloat16)
    assert_like_one_process(setup, CONFIGS["adamw"], tmp_path)


class Counting(nn.Module):
    """A classifier that measures its accuracy while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 4)
        self.accuracy = AccuracyMetric(name="accuracy")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.net(x)
        self.accuracy(labels=y, predictions=logits.argmax(-1))
        return F.cross_entropy(logits, y)


def test_metrics_of_all_microbatches_in_their_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    setup = Setup(Counting(), (torch.randn(3, 6), torch.arange(3)))
    config = CONFIGS["adamw"]
    alone = setup.streaming(config)
    expected, _, _ = steps_and_state(alone, setup)
    alone.close()
    found, _, _ = replicated(setup, config, steps_and_state, tmp_path)[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert list(theirs.metrics) == ["accuracy"]
        assert len(theirs.metrics["accuracy"]) == MICROBATCHES
        assert ours.metrics == theirs.metrics


def test_batch_statistics_are_refused() -> None:
    setup = Setup(*model_of("conv with batch norm"))
    with pytest.raises(PlanError, match="replicas cannot share net"):
        refuse_changing_buffers(setup.workload(CONFIGS["adamw"]))


# ---------------------------------------------------------------- who keeps what


def test_each_keeps_its_own_part(gpt: Setup, tmp_path: Path) -> None:
    def kept(executor: Executor, setup: Setup) -> list[str]:
        assert isinstance(executor, ReplicatedStreaming)
        return sorted(executor._executor.own_state()["weights"])

    parts = replicated(gpt, CONFIGS["adamw"], kept, tmp_path, count=3)
    assert all(parts)
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(gpt.workload(CONFIGS["adamw"]).weights)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_parts_are_about_equal(sizes: list[int], count: int) -> None:
    shards = [Shard(index=i, names=(f"w{i}",), trained=()) for i in range(len(sizes))]
    owners = assign_owners(shards, {f"w{i}": size for i, size in enumerate(sizes)}, count)
    held = [0] * count
    for owner, size in zip(owners, sizes, strict=True):
        held[owner] += size
    assert max(held) - min(held) <= max(sizes)


def test_a_state_of_one_process_goes_on_in_two_and_back(gpt: Setup, tmp_path: Path) -> None:
    config = CONFIGS["clipped by norm"]
    data = batches_like(gpt.batch, 12)
    whole = gpt.streaming(config)
    run_steps(whole, data, microbatches=2)
    first = gpt.streaming(config)
    run_steps(first, data[:4], microbatches=2)
    begun = first.state()
    first.close()

    def go_on(executor: Executor, setup: Setup) -> ModelState:
        executor.load_state(begun)
        run_steps(executor, data[4:8], microbatches=2, first=2)
        state = executor.state()
        run_steps(executor, data[8:], microbatches=2, first=4)  # must not change the copy
        return state

    between = replicated(gpt, config, go_on, tmp_path)[0]
    last = gpt.streaming(config)
    last.load_state(between)
    run_steps(last, data[8:], microbatches=2, first=4)
    assert_states_equal(last.state(), whole.state(), 2e-6)
    whole.close()
    last.close()


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_in_one_replica_stops_all(gpt: Setup, tmp_path: Path) -> None:
    setup = Setup(*model_of("mlp"))
    x, y = setup.batch

    def train(executor: Executor, setup: Setup) -> tuple[StepResult, str, ModelState, ModelState]:
        before = executor.state()
        batches = [(x, y), (x.clone().fill_(float("nan")), y)]
        result = executor.train_step(batches, step=0)
        return result, executor.explain_nonfinite(batches, step=0), before, executor.state()

    result, why, before, after = replicated(setup, CONFIGS["adamw"], train, tmp_path)[0]
    assert not result.applied
    assert not torch.isfinite(result.loss)
    assert "of microbatch 1 has" in why
    assert_states_equal(after, before)


def test_microbatches_that_cannot_be_shared(gpt: Setup, tmp_path: Path) -> None:
    def train(executor: Executor, setup: Setup) -> str:
        with pytest.raises(PlanError) as raised:
            executor.train_step(batches_like(setup.batch, 3), step=0)
        return str(raised.value)

    said = replicated(gpt, CONFIGS["adamw"], train, tmp_path)[0]
    assert "3 microbatches do not divide among 2 replicas" in said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_replica_ends_the_other(victim: int, gpt: Setup, tmp_path: Path) -> None:
    def train(executor: Executor, setup: Setup) -> None:
        data = batches_like(setup.batch, 2)
        for step in range(100_000):
            executor.train_step(data, step=step)
            if step == 2:
                (tmp_path / "running").touch()

    processes = Processes(tmp_path, 2, drive, gpt, CONFIGS["adamw"], train, None)
    other = 1 - victim
    while not (tmp_path / "running").exists():
        assert processes.processes[0].is_alive()
    os.kill(processes.processes[victim].pid or 0, signal.SIGKILL)
    kind, said = processes.outcome(other)
    processes.close()
    assert kind == "raised"
    assert "of the 2 that compute together was lost" in said

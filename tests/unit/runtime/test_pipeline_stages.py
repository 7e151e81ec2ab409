"""Stages in several processes: the numbers of one process, for every schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from group_processes import Processes
from pipeline_reference import CLIPPED, SCHEDULES, assert_like_one_process, drive
from runtime_cases import CASES, model_of
from runtime_reference import Setup, batches_like, optimizer_config, run_steps

from openwafer.errors import PlanError
from openwafer.runtime.executor import Executor
from openwafer.runtime.stages.cuts import joined_layers
from openwafer.runtime.stages.executor import PipelineStages
from openwafer.runtime.stages.layout import lay_out
from openwafer.runtime.stages.schedule import ScheduleName, stages_per_process
from openwafer.zoo.catalog import family_of, load, model_config


@pytest.fixture(scope="module")
def gpt() -> Setup:
    """Tied weights in the first and last stage, dropout, four layers."""
    return Setup(*model_of("gpt, fused attention dropout"), evaluates=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: ScheduleName, gpt: Setup, tmp_path: Path) -> None:
    assert_like_one_process(tmp_path, gpt, CLIPPED, schedule, stages=2)


@pytest.mark.parametrize(("stages", "replicas"), [(1, 2), (2, 2), (4, 1)])
def test_stages_and_replicas(stages: int, replicas: int, gpt: Setup, tmp_path: Path) -> None:
    assert_like_one_process(tmp_path, gpt, CLIPPED, "zero_bubble", stages=stages, replicas=replicas)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model(name: str, schedule: ScheduleName, tmp_path: Path) -> None:
    setup = Setup(*model_of(name))
    places = len(setup.layers) - len(joined_layers(setup.train))
    if places < 2 * stages_per_process(schedule):
        pytest.skip(f"it can be cut into {places} stages")
    assert_like_one_process(tmp_path, setup, optimizer_config(), schedule, stages=2)


# ---------------------------------------------------------------- what is special in a model


def test_batch_statistics_go_through_the_microbatches_in_order(tmp_path: Path) -> None:
    setup = Setup(*model_of("conv with batch norm"), evaluates=True)
    assert_like_one_process(tmp_path, setup, optimizer_config(), "1f1b", stages=2)


def test_replicas_of_batch_statistics_are_refused() -> None:
    setup = Setup(*model_of("conv with batch norm"))
    with pytest.raises(PlanError, match=r"replicas cannot share net\.1\.running_mean"):
        lay_out(
            setup.train,
            None,
            [1] * len(setup.layers),
            num_stages=1,
            num_replicas=2,
            schedule="1f1b",
        )


@pytest.mark.parametrize("name", ["unet", "a weight in two layers"])
def test_skips_and_tied_weights(name: str, tmp_path: Path) -> None:
    """The holes of torch's schedules: pytorch 127964, and a weight in two stages."""
    setup = Setup(*model_of(name))
    assert_like_one_process(tmp_path, setup, CLIPPED, "zero_bubble", stages=2)


def test_dynamic_loss_scale(gpt: Setup, tmp_path: Path) -> None:
    """An overflow found in one stage is skipped by all: a scale that overflows at first."""
    config = optimizer_config(
        "adam", loss_scaling_factor="dynamic", initial_loss_scale=2.0**127, max_gradient_norm=1.0
    )
    assert_like_one_process(tmp_path, gpt, config, "1f1b", stages=2)


def poisoned(executor: Executor, setup: Setup) -> tuple[bool, str, bool]:
    """A step whose loss is not finite: no update, and the reason."""
    before = executor.state().model
    batch = tuple(
        torch.full_like(t, torch.nan) if t.is_floating_point() else t for t in setup.batch
    )
    result = executor.train_step([batch, setup.batch], step=0)
    after = executor.state().model
    same = all(torch.equal(after[name], before[name]) for name in before)
    return result.applied, executor.explain_nonfinite([batch], step=0), same


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    setup = Setup(*model_of("conv with batch norm"))
    processes = Processes(tmp_path, 2, drive, setup, CLIPPED, "1f1b", 1, poisoned)
    applied, reason, same = processes.results()[0]
    assert not applied
    assert same
    assert "the batch itself" in reason


def parts(executor: Executor, setup: Setup) -> list[tuple[list[str], list[str]]]:
    """After a step: names of what each of two processes is sent of a state to load."""
    assert isinstance(executor, PipelineStages)
    executor.train_step([setup.batch, setup.batch], step=0)
    state = executor.state()
    found = [executor._part(state, process) for process in range(2)]
    return [(sorted(part.model), sorted(part.optimizer)) for part in found]


def test_a_process_is_sent_its_part_of_a_state(gpt: Setup, tmp_path: Path) -> None:
    """Every weight and its optimizer state is for one of them (none is tied across the cut)."""
    processes = Processes(tmp_path, 2, drive, gpt, CLIPPED, "1f1b", 1, parts)
    first, second = processes.results()[0]
    weights = {parameter.name for parameter in gpt.train.program.parameters}
    for one, other in zip(first, second, strict=True):
        held, theirs = weights & set(one), weights & set(other)
        assert held | theirs == weights
        assert not held & theirs
        assert held
        assert theirs


# ---------------------------------------------------------------- reference models


class Trained(torch.nn.Module):
    """A reference model as a module that gives its loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model.loss(self.model.logits(**batch), **batch)


@pytest.fixture(scope="module", params=["gpt2", "t5", "unet"])
def reference_model(request: pytest.FixtureRequest) -> Setup:
    name = f"{request.param}/tiny"
    family, loaded = family_of(name), load(name, [])
    torch.manual_seed(1)
    model = family.model(model_config(family, loaded.raw, loaded.locate))
    return Setup(Trained(model), model.example_batch(2))


def losses(executor: Executor, setup: Setup) -> list[float]:
    data = batches_like(setup.batch, 16)
    return [float(result.loss) for result in run_steps(executor, data, microbatches=8)]


@pytest.fixture(scope="module")
def expected(reference_model: Setup) -> list[float]:
    return losses(reference_model.pipelined(SMALL_STEPS), reference_model)


SMALL_STEPS = optimizer_config("sgd", momentum=0.9, max_gradient_norm=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_reference_models_in_stages_and_replicas(
    stages: int,
    replicas: int,
    schedule: ScheduleName,
    reference_model: Setup,
    expected: list[float],
    tmp_path: Path,
) -> None:
    places = len(reference_model.layers) - len(joined_layers(reference_model.train))
    if places < stages * stages_per_process(schedule):
        pytest.skip(f"it can be cut into {places} stages")
    arguments = (reference_model, SMALL_STEPS, schedule, replicas, losses)
    found = Processes(tmp_path, stages * replicas, drive, *arguments).results()[0]
    assert found == pytest.approx(expected, rel=2e-6)
    assert found[1] != found[0], "a step that changes nothing proves nothing"

"""The compiler's stages together: the rule for `auto`, and what the cache key covers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import openwafer.pipeline as pipeline
from handmade_program import program_of
from openwafer.config.hyperparameters import AdamOptions, SGDOptions
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.errors import PlanError, UnsupportedOpError
from openwafer.graph.program import Program
from openwafer.machine.spec import load_machine
from openwafer.pipeline import choose_mode, compile_program, validate_program

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu()).mean()


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(Model(), torch.ones(4, 6))


def optimizer(**hyperparameters: Any) -> OptimizerConfig:
    kind: Any = "sgd" if "momentum" in hyperparameters else "adam"
    options = SGDOptions if kind == "sgd" else AdamOptions
    return OptimizerConfig(
        optimizer_type=kind,
        hyperparameters=options(**hyperparameters),
        learning_rate=Constant(learning_rate=0.1),
    )


def compiled(program: Program, folder: Path | None = None, **changes: Any):
    options: dict[str, Any] = {
        "machine": load_machine("tiny"),
        "execution_mode": "weight_streaming",
        "compile_dir": folder,
        "optimizer": optimizer(),
    }
    return compile_program(program, **{**options, **changes})


def with_parameters(program: Program, count: int) -> Program:
    (first, *_) = program.parameters
    spec = dataclasses.replace(first.spec, shape=(count,))
    return dataclasses.replace(program, parameters=(dataclasses.replace(first, spec=spec),))


# ---------------------------------------------------------------- the rule for auto


@pytest.mark.parametrize(
    ("num_parameters", "free_bytes", "mode"),
    [
        (1_000, 16_001, "layer_pipelined"),
        (1_000, 16_000, "weight_streaming"),
        (999_999_999, 10**12, "layer_pipelined"),
        (1_000_000_000, 10**12, "weight_streaming"),
    ],
)
def test_the_documented_rule(program, num_parameters, free_bytes, mode, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "_free_bytes", lambda device: free_bytes)
    assert choose_mode("auto", with_parameters(program, num_parameters), CPU) == mode


@pytest.mark.parametrize("mode", ["layer_pipelined", "weight_streaming"])
def test_a_mode_that_is_asked_for_is_taken(program: Program, mode, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "_free_bytes", lambda device: 0)
    assert choose_mode(mode, with_parameters(program, 10**12), CPU) == mode


def test_free_memory_is_read_from_the_system(program: Program) -> None:
    assert choose_mode("auto", program, CPU) == "layer_pipelined"


# ---------------------------------------------------------------- the cache


def test_the_same_question_is_answered_from_the_cache(program: Program, tmp_path: Path) -> None:
    first, second = compiled(program, tmp_path), compiled(program, tmp_path)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.plan == second.plan
    assert first.directory == second.directory
    assert compiled(program).directory is None


@pytest.mark.parametrize(
    "change",
    [
        {"execution_mode": "layer_pipelined"},
        {"compute_dtype": "bfloat16"},
        {"num_microbatches": 2},
        {"prefetch_depth": 2},
        {"optimizer": None},
        {"optimizer": optimizer(momentum=0.0)},
        {"optimizer": optimizer(amsgrad=True)},
        {"machine": load_machine("wse2")},
    ],
)
def test_every_option_is_in_the_key(program: Program, change: dict[str, Any]) -> None:
    assert compiled(program, **change).plan.hash != compiled(program).plan.hash


def test_an_optimizer_with_more_state_is_another_plan(program: Program) -> None:
    """Of one type: momentum doubles what is kept."""
    without, with_momentum = (
        compiled(program, optimizer=optimizer(momentum=m)).plan for m in (0.0, 0.9)
    )
    assert without.hash != with_momentum.hash
    assert without.memory["store"]["optimizer"] == 0
    assert with_momentum.memory["store"]["optimizer"] == 4 * program.num_parameters


def test_rates_are_not_in_the_key(program: Program) -> None:
    """A plan does not depend on them, so that a search over rates compiles once."""
    other = dataclasses.replace(optimizer(), learning_rate=Constant(learning_rate=0.2))
    assert compiled(program, optimizer=other).plan.hash == compiled(program).plan.hash


def test_a_changed_model_is_another_plan(program: Program) -> None:
    model = Model()
    model.fc1.weight.requires_grad_(False)
    assert compiled(program_of(model, torch.ones(4, 6))).plan.hash != compiled(program).plan.hash
    evaluation = program_of(Model(), torch.ones(4, 6), training=False)
    assert compiled(evaluation).plan.hash != compiled(program).plan.hash


# ---------------------------------------------------------------- refusals


def test_a_refusal_is_reported_by_one_stage_and_raised_by_the_other() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x).mean()

    program = program_of(Sorted(), torch.ones(4, 4))
    report = validate_program(program, "layer_pipelined")
    assert not report.ok
    with pytest.raises(UnsupportedOpError):
        compiled(program)


def test_what_does_not_fit_resident_is_a_plan_error_that_streaming_does_not_have() -> None:
    """Why `auto` may go on with weight streaming."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))

    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.n(x).mean()

    program = program_of(Big(), torch.ones(2, 256))
    with pytest.raises(PlanError):
        compiled(program, execution_mode="layer_pipelined")
    assert compiled(program).plan.execution_mode == "weight_streaming"

"""The loss scale over a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwafer.config.hyperparameters import (
    SGDOptions,
)
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.errors import CheckpointError
from openwafer.optim.loss_scale import LossScaler, build_loss_scaler


def scaler(**more: float) -> LossScaler:
    settings: dict[str, float] = {"initial_scale": 1024.0, "steps_per_increase": 4, **more}
    return LossScaler(dynamic=True, **settings)  # type: ignore[arg-type]


def test_an_overflow_halves_and_quiet_steps_double() -> None:
    loss_scale = scaler()
    scales: list[float] = []
    for overflowed in [True, False, False, False, False, False, False, False, False, True]:
        loss_scale.update(overflowed=overflowed)
        scales.append(loss_scale.scale)
    assert scales == [512.0, *[512.0] * 3, 1024.0, *[1024.0] * 3, 2048.0, 1024.0]


def test_few_overflows_among_many_steps_are_tolerated() -> None:
    loss_scale = scaler(steps_per_increase=1000, overflow_tolerance=0.05)
    for _ in range(100):
        loss_scale.update(overflowed=False)
    for _ in range(5):
        loss_scale.update(overflowed=True)
        assert loss_scale.scale == 1024.0
    loss_scale.update(overflowed=True)  # 6 of 106
    assert loss_scale.scale == 512.0


@given(outcomes=st.lists(st.booleans(), max_size=200))
def test_the_scale_stays_within_its_limits(outcomes: list[bool]) -> None:
    loss_scale = scaler(min_scale=256.0, max_scale=4096.0)
    for overflowed in outcomes:
        loss_scale.update(overflowed=overflowed)
        assert 256.0 <= loss_scale.scale <= 4096.0


@given(before=st.lists(st.booleans(), max_size=30), after=st.lists(st.booleans(), max_size=30))
def test_a_resumed_scaler_goes_on_the_same(before: list[bool], after: list[bool]) -> None:
    first, second = scaler(), scaler()
    for overflowed in before:
        first.update(overflowed=overflowed)
    state = first.state_dict()
    assert all(type(value) is float for value in state.values())
    second.load_state_dict(state)
    for overflowed in after:
        first.update(overflowed=overflowed)
        second.update(overflowed=overflowed)
    assert first.state_dict() == second.state_dict()


def test_a_constant_scale_never_changes() -> None:
    loss_scale = LossScaler(initial_scale=1e6, dynamic=False)
    loss_scale.update(overflowed=True)
    loss_scale.load_state_dict({})
    assert loss_scale.scale == 1e6


def test_a_state_that_lacks_a_key() -> None:
    with pytest.raises(CheckpointError, match="num_overflows, num_steps"):
        scaler().load_state_dict({"scale": 1.0})


@pytest.mark.parametrize(("factor", "expected"), [(None, None), (8.0, 8.0), ("dynamic", 2.0**15)])
def test_from_a_config(factor: float | str | None, expected: float | None) -> None:
    config = OptimizerConfig(
        optimizer_type="sgd",
        hyperparameters=SGDOptions(),
        learning_rate=Constant(learning_rate=1.0),
        loss_scaling_factor=factor,  # type: ignore[arg-type]
    )
    built = build_loss_scaler(config)
    assert (built.scale if built else None) == expected

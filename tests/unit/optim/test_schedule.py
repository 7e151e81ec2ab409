"""Every schedule against torch's own scheduler, or against a slow plain version."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from openwafer.config import schedule as forms
from openwafer.config.schedule import ScheduleConfig, SequentialLR
from openwafer.optim.schedule import learning_rate_at

STEPS = st.integers(min_value=0, max_value=100_000)
RATE = st.floats(min_value=0, max_value=10)
LENGTH = st.integers(min_value=1, max_value=500)
NUM_STEPS = 60


def torch_rates(rate: float, make: Callable[..., lr_scheduler.LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = make(optimizer)
    rates: list[float] = []
    for _ in range(NUM_STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


AGAINST_TORCH: list[tuple[ScheduleConfig, float, Callable[..., lr_scheduler.LRScheduler]]] = [
    (
        forms.Exponential(initial_learning_rate=0.3, decay_steps=1, decay_rate=0.9),
        0.3,
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    ),
    (
        forms.Exponential(initial_learning_rate=0.3, decay_steps=7, decay_rate=0.5, staircase=True),
        0.3,
        lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    ),
    (
        forms.Linear(initial_learning_rate=0.3, end_learning_rate=0.0, steps=20),
        0.3,
        lambda o: lr_scheduler.PolynomialLR(o, 20, 1.0),
    ),
    (
        forms.Polynomial(initial_learning_rate=0.3, end_learning_rate=0.0, steps=20, power=2.5),
        0.3,
        lambda o: lr_scheduler.PolynomialLR(o, 20, 2.5),
    ),
    (
        forms.Linear(initial_learning_rate=0.03, end_learning_rate=0.3, steps=20),
        0.3,
        lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 20),
    ),
    (
        forms.CosineAnnealing(learning_rate=0.3, t_max=13, eta_min=0.01),
        0.3,
        lambda o: lr_scheduler.CosineAnnealingLR(o, 13, 0.01),
    ),
    (
        forms.Step(learning_rate=0.3, step_size=11, gamma=0.3),
        0.3,
        lambda o: lr_scheduler.StepLR(o, 11, 0.3),
    ),
    (
        forms.MultiStep(learning_rate=0.3, gamma=0.3, milestones=(5, 6, 30)),
        0.3,
        lambda o: lr_scheduler.MultiStepLR(o, [5, 6, 30], 0.3),
    ),
    (
        forms.Lambda(learning_rate=0.3),
        0.3,
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.95**t),
    ),
    (
        forms.PiecewiseConstant(values=(0.3, 0.03, 0.3), boundaries=(10, 25)),
        0.3,
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.1 if 10 <= t < 25 else 1.0),
    ),
    (
        SequentialLR(
            schedules=(
                forms.Linear(initial_learning_rate=0.03, end_learning_rate=0.3, steps=10),
                forms.Exponential(initial_learning_rate=0.3, decay_steps=1, decay_rate=0.9),
            ),
            milestones=(10,),
        ),
        0.3,
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.1, 1.0, 10), lr_scheduler.ExponentialLR(o, 0.9)],
            [10],
        ),
    ),
]


@pytest.mark.parametrize(("config", "rate", "make"), AGAINST_TORCH, ids=lambda x: type(x).__name__)
def test_against_torch(
    config: ScheduleConfig, rate: float, make: Callable[..., lr_scheduler.LRScheduler]
) -> None:
    ours = [learning_rate_at(config, step) for step in range(NUM_STEPS)]
    assert ours == pytest.approx(torch_rates(rate, make), rel=1e-9, abs=1e-12)


@given(step=STEPS, rate=RATE)
def test_constant(step: int, rate: float) -> None:
    assert learning_rate_at(forms.Constant(learning_rate=rate), step) == rate


@given(step=STEPS, first=RATE, last=RATE, steps=LENGTH)
def test_cosine_decay_is_half_a_cosine_and_then_flat(
    step: int, first: float, last: float, steps: int
) -> None:
    config = forms.CosineDecay(
        initial_learning_rate=first, end_learning_rate=last, decay_steps=steps
    )
    angle = math.pi if step >= steps else math.pi * step / steps
    weight = math.cos(angle / 2) ** 2
    expected = first * weight + last * (1 - weight)
    assert learning_rate_at(config, step) == pytest.approx(expected, abs=1e-12)


@given(
    step=STEPS,
    exponent=st.floats(min_value=0.1, max_value=2),
    steps=LENGTH,
    rate=st.floats(min_value=0, max_value=5),
    staircase=st.booleans(),
)
def test_inverse_exponential_time_decay(
    step: int, exponent: float, steps: int, rate: float, staircase: bool
) -> None:
    config = forms.InverseExponentialTimeDecay(
        initial_learning_rate=2.0,
        step_exponent=exponent,
        decay_steps=steps,
        decay_rate=rate,
        staircase=staircase,
    )
    quotient = 0.0 if step == 0 else math.pow(step, exponent) / steps
    if staircase:
        quotient = float(int(quotient))
    assert learning_rate_at(config, step) * (1 + rate * quotient) == pytest.approx(2.0)


@given(step=STEPS, first=RATE, last=RATE, steps=LENGTH, cycle=st.booleans())
def test_linear_ends_where_it_should(
    step: int, first: float, last: float, steps: int, cycle: bool
) -> None:
    config = forms.Linear(
        initial_learning_rate=first, end_learning_rate=last, steps=steps, cycle=cycle
    )
    part = min(step / steps, 1.0)
    assert learning_rate_at(config, step) == pytest.approx(
        first * (1 - part) + last * part, abs=1e-12
    )


@settings(max_examples=50)
@given(
    durations=st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=4),
    disable=st.booleans(),
)
def test_a_sequence_against_a_slow_version(durations: list[int], disable: bool) -> None:
    parts = tuple(
        forms.Exponential(initial_learning_rate=float(i + 1), decay_steps=1, decay_rate=0.5)
        for i in range(len(durations) + 1)
    )
    expected: list[float] = []
    for index, part in enumerate(parts):
        for t in range(durations[index] if index < len(durations) else 5):
            seen = len(expected) if disable else t
            expected.append(part.initial_learning_rate * 0.5**seen)
            assert len(expected) < 100
    milestones = tuple(sum(durations[: i + 1]) for i in range(len(durations)))
    config = SequentialLR(schedules=parts, milestones=milestones, disable_lr_steps_reset=disable)
    assert [learning_rate_at(config, t) for t in range(len(expected))] == expected

"""The learning rate at a step.

Decides the formula of each schedule, as a pure function of the global step, so that every executor
and every restart has the same rate. Does not decide how a schedule is written (config/schedule.py).

Formulas: CS-2 software 1.6 documentation. `t` counts from the schedule's own start.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from openwafer.config.schedule import (
    Constant,
    CosineAnnealing,
    CosineDecay,
    Exponential,
    InverseExponentialTimeDecay,
    Lambda,
    Linear,
    MultiStep,
    PiecewiseConstant,
    Polynomial,
    ScheduleConfig,
    ScheduleForm,
    SequentialLR,
    Step,
)

__all__ = ["learning_rate_at"]


def learning_rate_at(config: ScheduleConfig, step: int) -> float:
    """The learning rate of the update at global step `step` (the first update is step 0)."""
    assert step >= 0
    if isinstance(config, SequentialLR):
        return _sequential(config, step)
    return _FORMULAS[type(config)](config, step)


def _sequential(config: SequentialLR, step: int) -> float:
    """Schedule i runs from milestone i-1 to milestone i, where i takes over itself.

    It sees the steps since it took over, or the global step with `disable_lr_steps_reset`.
    """
    index = bisect_right(config.milestones, step)
    form = config.schedules[index]
    start = config.milestones[index - 1] if index else 0
    t = step if config.disable_lr_steps_reset else step - start
    return _FORMULAS[type(form)](form, t)


def _constant(form: Constant, t: int) -> float:
    """lr"""
    return form.learning_rate


def _exponential(form: Exponential, t: int) -> float:
    """lr · rate^(t / decay_steps); the exponent is rounded down with `staircase`."""
    exponent = t // form.decay_steps if form.staircase else t / form.decay_steps
    return form.initial_learning_rate * form.decay_rate**exponent


def _piecewise_constant(form: PiecewiseConstant, t: int) -> float:
    """values[i], where i boundaries are <= t."""
    return form.values[bisect_right(form.boundaries, t)]


def _polynomial(form: Linear, t: int) -> float:
    """(lr - end) · (1 - t / (steps · α))^power + end; end once t >= steps.

    α would be ceil((t+1) / steps) with `cycle`, which is 1 wherever the first branch is in force:
    as documented, `cycle` changes nothing.
    """
    if t >= form.steps:
        return form.end_learning_rate
    power = form.power if isinstance(form, Polynomial) else 1.0
    span = form.initial_learning_rate - form.end_learning_rate
    return span * (1.0 - t / form.steps) ** power + form.end_learning_rate


def _inverse_exponential_time_decay(form: InverseExponentialTimeDecay, t: int) -> float:
    """lr / (1 + rate · t^exponent / decay_steps); the quotient is rounded down with `staircase`."""
    quotient = float(t) ** form.step_exponent / form.decay_steps
    if form.staircase:
        quotient = math.floor(quotient)
    return form.initial_learning_rate / (1.0 + form.decay_rate * quotient)


def _cosine_decay(form: CosineDecay, t: int) -> float:
    """(lr - end) · (1 + cos(π · min(t, decay_steps) / decay_steps)) / 2 + end"""
    span = form.initial_learning_rate - form.end_learning_rate
    done = min(t, form.decay_steps) / form.decay_steps
    return span * 0.5 * (1.0 + math.cos(math.pi * done)) + form.end_learning_rate


def _cosine_annealing(form: CosineAnnealing, t: int) -> float:
    """(lr - eta_min) · (1 + cos(π · t / t_max)) / 2 + eta_min"""
    span = form.learning_rate - form.eta_min
    return span * 0.5 * (1.0 + math.cos(math.pi * t / form.t_max)) + form.eta_min


def _step(form: Step, t: int) -> float:
    """lr · gamma^floor(t / step_size)"""
    return form.learning_rate * form.gamma ** (t // form.step_size)


def _multi_step(form: MultiStep, t: int) -> float:
    """lr · gamma^(number of milestones <= t)"""
    return form.learning_rate * form.gamma ** bisect_right(form.milestones, t)


def _lambda(form: Lambda, t: int) -> float:
    """lr · 0.95^t, the documented example."""
    return form.learning_rate * 0.95**t


_FORMULAS: Mapping[type[ScheduleForm], Callable[[Any, int], float]] = {
    Constant: _constant,
    Exponential: _exponential,
    PiecewiseConstant: _piecewise_constant,
    Polynomial: _polynomial,
    Linear: _polynomial,
    InverseExponentialTimeDecay: _inverse_exponential_time_decay,
    CosineDecay: _cosine_decay,
    CosineAnnealing: _cosine_annealing,
    Step: _step,
    MultiStep: _multi_step,
    Lambda: _lambda,
}

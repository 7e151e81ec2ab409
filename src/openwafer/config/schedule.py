"""The forms a learning rate can be written in, as frozen values.

Decides the keys of each scheduler, which are required, and how a number, a dict or a list of dicts
becomes one ScheduleConfig. Does not decide the learning rate at a step (optim/schedule.py).

Names and keys are those of the CS-2 software 1.6 documentation; scheduler names may be written in
any case. Every scheduler takes `steps`, its length inside a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from openwafer.config.schema import KeyPath, Locate, Report, build, limits, text_of
from openwafer.errors import nearest

__all__ = [
    "SCHEDULERS",
    "Constant",
    "CosineAnnealing",
    "CosineDecay",
    "Exponential",
    "InverseExponentialTimeDecay",
    "Lambda",
    "Linear",
    "MultiStep",
    "PiecewiseConstant",
    "Polynomial",
    "ScheduleConfig",
    "ScheduleForm",
    "SequentialLR",
    "Step",
    "build_schedule",
]

_RATE = limits(minimum=0)
_LENGTH = limits(minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleForm:
    """What all schedulers have."""

    steps: int | None = field(default=None, metadata=_LENGTH)
    """Length inside a list of schedules."""

    @property
    def duration_steps(self) -> int | None:
        """Steps until the next schedule of a list takes over: `steps`, else `decay_steps`."""
        return self.steps if self.steps is not None else getattr(self, "decay_steps", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(ScheduleForm):
    """The same rate at every step."""

    learning_rate: float = field(metadata=_RATE)
    """The rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential(ScheduleForm):
    """Exponential decay."""

    initial_learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""
    decay_steps: int = field(metadata=_LENGTH)
    """Steps after which the rate has fallen by `decay_rate` once."""
    decay_rate: float = field(metadata=_RATE)
    """Factor per `decay_steps`."""
    staircase: bool = False
    """Decay once per `decay_steps` rather than at every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecewiseConstant(ScheduleForm):
    """One rate between two boundaries."""

    values: tuple[float, ...] = field(metadata=_RATE)
    """The rates, one more than boundaries."""
    boundaries: tuple[int, ...] = field(metadata=limits(minimum=1))
    """First step of each rate but the first, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(ScheduleForm):
    """A straight line from one rate to another, then flat."""

    initial_learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""
    end_learning_rate: float = field(metadata=_RATE)
    """Rate from `steps` on."""
    steps: int = field(metadata=_LENGTH)
    """Steps until `end_learning_rate`."""
    cycle: bool = False
    """Accepted; changes nothing, as in 1.6 (see optim/schedule.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial(Linear):
    """A power of the remaining part, from one rate to another, then flat."""

    power: float = field(default=1.0, metadata=limits(minimum=0))
    """The power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseExponentialTimeDecay(ScheduleForm):
    """Decay with one over a power of the step."""

    initial_learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""
    step_exponent: float = field(metadata=limits(above=0))
    """Power of the step."""
    decay_steps: int = field(metadata=_LENGTH)
    """Divides the power of the step."""
    decay_rate: float = field(metadata=_RATE)
    """Factor of the quotient."""
    staircase: bool = False
    """Round the quotient down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineDecay(ScheduleForm):
    """Half a cosine from one rate to another, then flat."""

    initial_learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""
    end_learning_rate: float = field(metadata=_RATE)
    """Rate from `decay_steps` on."""
    decay_steps: int = field(metadata=_LENGTH)
    """Length of the half cosine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineAnnealing(ScheduleForm):
    """A cosine that comes back every 2·t_max steps."""

    learning_rate: float = field(metadata=_RATE)
    """The highest rate."""
    t_max: int = field(metadata=_LENGTH)
    """Half a period."""
    eta_min: float = field(default=0.0, metadata=_RATE)
    """The lowest rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(ScheduleForm):
    """A factor every `step_size` steps."""

    learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""
    step_size: int = field(metadata=_LENGTH)
    """Steps between two decays."""
    gamma: float = field(metadata=_RATE)
    """The factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiStep(ScheduleForm):
    """A factor at every milestone."""

    learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""
    gamma: float = field(metadata=_RATE)
    """The factor."""
    milestones: tuple[int, ...] = field(metadata=limits(minimum=1))
    """Steps at which the rate is multiplied, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lambda(ScheduleForm):
    """The documented example of a function of the step: 0.95 to its power."""

    learning_rate: float = field(metadata=_RATE)
    """Rate at step 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialLR:
    """Several schedules one after the other (a YAML list)."""

    schedules: tuple[ScheduleForm, ...]
    """In order."""
    milestones: tuple[int, ...]
    """Global step at which each schedule but the first takes over."""
    disable_lr_steps_reset: bool = False
    """Show the global step to every schedule, rather than the steps since it took over."""


ScheduleConfig = (
    Constant
    | Exponential
    | PiecewiseConstant
    | Polynomial
    | Linear
    | InverseExponentialTimeDecay
    | CosineDecay
    | CosineAnnealing
    | Step
    | MultiStep
    | Lambda
    | SequentialLR
)

SCHEDULERS: Mapping[str, type[ScheduleForm]] = {
    cls.__name__: cls
    for cls in (
        Constant,
        Exponential,
        PiecewiseConstant,
        Polynomial,
        Linear,
        InverseExponentialTimeDecay,
        CosineDecay,
        CosineAnnealing,
        Step,
        MultiStep,
        Lambda,
    )
}
"""What `scheduler` may name."""


def build_schedule(
    value: object,
    *,
    path: KeyPath,
    locate: Locate,
    report: Report,
    disable_lr_steps_reset: bool = False,
) -> ScheduleConfig | None:
    """The schedule that a YAML value spells, or None with the mistakes in `report`.

    A number, also one written as text, is constant; a mapping names a `scheduler`; a list of
    mappings is a sequence, in which all but the last need a length.
    """
    if isinstance(value, Mapping):
        return _build_one(value, path=path, locate=locate, report=report)
    if isinstance(value, list) and value:
        return _build_sequence(
            value, path, locate, report, disable_lr_steps_reset=disable_lr_steps_reset
        )
    constant = {"learning_rate": value}
    short = path[:-1] if path and path[-1] == "learning_rate" else path
    return build(Constant, constant, path=short, locate=locate, report=report)


def _build_one(
    values: Mapping[str, object], *, path: KeyPath, locate: Locate, report: Report
) -> ScheduleConfig | None:
    name = values.get("scheduler")
    by_name = {known.casefold(): cls for known, cls in SCHEDULERS.items()}
    cls = by_name.get(str(name).casefold())
    if cls is None:
        key = text_of((*path, "scheduler"))
        missing = name is None
        report.add(
            f"`{key}` is missing" if missing else f"`{key}` is {name!r}",
            where=locate(path if missing else (*path, "scheduler")),
            allowed=", ".join(SCHEDULERS),
            hint="" if missing else nearest(str(name), SCHEDULERS),
        )
        return None
    form = build(cls, values, path=path, locate=locate, report=report, passed_over=("scheduler",))
    if form is not None:
        _check_form(form, path, locate, report)
    return form  # type: ignore[return-value]  # SCHEDULERS holds the members of the union


def _check_form(form: ScheduleForm, path: KeyPath, locate: Locate, report: Report) -> None:
    ascending = {}
    if isinstance(form, PiecewiseConstant):
        ascending = {"boundaries": form.boundaries}
        if len(form.values) != len(form.boundaries) + 1:
            report.add(
                f"`{text_of((*path, 'values'))}` has {len(form.values)} rates for "
                f"{len(form.boundaries)} boundaries",
                where=locate((*path, "values")),
                allowed="one rate more than boundaries",
            )
    elif isinstance(form, MultiStep):
        ascending = {"milestones": form.milestones}
    for key, steps in ascending.items():
        if any(earlier >= later for earlier, later in pairwise(steps)):
            report.add(
                f"`{text_of((*path, key))}` is not ascending: {list(steps)}",
                where=locate((*path, key)),
                allowed="steps in ascending order",
            )


def _build_sequence(
    values: list[object],
    path: KeyPath,
    locate: Locate,
    report: Report,
    *,
    disable_lr_steps_reset: bool,
) -> SequentialLR | None:
    before = len(report.mistakes)
    forms: list[ScheduleForm] = []
    durations: list[int] = []
    for index, value in enumerate(values):
        at = (*path, index)
        if not isinstance(value, Mapping):
            report.add(
                f"`{text_of(at)}` is {value!r}",
                where=locate(at),
                allowed="a mapping with `scheduler`",
            )
            continue
        form = _build_one(value, path=at, locate=locate, report=report)
        if not isinstance(form, ScheduleForm):
            continue
        forms.append(form)
        if form.duration_steps is not None:
            durations.append(form.duration_steps)
        elif index < len(values) - 1:
            report.add(
                f"`{text_of((*at, 'steps'))}` is missing: only the last schedule of a list may "
                "go on for ever",
                where=locate(at),
                allowed="a whole number (>= 1)",
            )
    if len(report.mistakes) > before:
        return None
    return SequentialLR(
        schedules=tuple(forms),
        milestones=tuple(accumulate(durations[: len(forms) - 1])),
        disable_lr_steps_reset=disable_lr_steps_reset,
    )

"""How weights are updated: the `optimizer` section of params.yaml.

Decides the keys that all optimizer types share (weight decay, loss scaling, clipping, gradient
accumulation), and how the section as a whole is checked. Does not decide what one type reads
(hyperparameters.py) nor what an update computes (optim/).

Keys and defaults are those of the CS-2 software 1.6 documentation, except that `epsilon` is taken
as `eps` (1.6 ignored it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from openwafer.config.hyperparameters import (
    HYPERPARAMETERS,
    Hyperparameters,
    OptimizerType,
    SGDOptions,
)
from openwafer.config.schedule import ScheduleConfig, build_schedule
from openwafer.config.schema import Locate, Report, build, limits
from openwafer.errors import nearest

__all__ = ["CommonOptions", "OptimizerConfig", "build_optimizer_config"]

_AT_LEAST_0 = limits(minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """The keys that every optimizer type takes."""

    weight_decay_rate: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Weight decay of the parameters that are not excluded."""
    exclude_from_weight_decay: tuple[str, ...] = (
        "bias",
        "LayerNorm.bias",
        "LayerNorm.weight",
        "BatchNorm.bias",
        "BatchNorm.weight",
    )
    """A parameter whose name contains one of these has no weight decay."""
    loss_scaling_factor: float | Literal["dynamic"] | None = field(
        default=None, metadata=limits(above=0)
    )
    """Factor of the loss before the backward pass: a number, `dynamic`, or null for none."""
    initial_loss_scale: float = field(default=2.0**15, metadata=limits(above=0))
    """First dynamic loss scale."""
    steps_per_increase: int = field(default=2000, metadata=limits(minimum=1))
    """Steps after which a dynamic loss scale doubles."""
    min_loss_scale: float = field(default=2.0**-14, metadata=limits(above=0))
    """Smallest dynamic loss scale."""
    max_loss_scale: float = field(default=2.0**15, metadata=limits(above=0))
    """Largest dynamic loss scale."""
    overflow_tolerance: float = field(default=0.05, metadata=limits(minimum=0, below=1))
    """Share of steps since the last change that may overflow before a dynamic scale is halved."""
    max_gradient_norm: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Clip gradients to this global norm; 0 is off; excludes max_gradient_value."""
    max_gradient_value: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Clip every entry of a gradient to this magnitude; 0 is off."""
    grad_accum_steps: int = field(default=1, metadata=limits(minimum=1))
    """Microbatches per update."""
    disable_lr_steps_reset: bool = False
    """Show the global step to every schedule of a list."""
    log_summaries: bool = False
    """Accepted; read by no PyTorch code of 1.6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig(CommonOptions):
    """The resolved `optimizer` section."""

    optimizer_type: OptimizerType
    """One of the 13 types, lower case."""
    hyperparameters: Hyperparameters
    """What this type reads, see HYPERPARAMETERS."""
    learning_rate: ScheduleConfig
    """The rate at each step."""


_OTHER_SPELLINGS: Mapping[OptimizerType | Literal["any"], Mapping[str, str]] = {
    "any": {"epsilon": "eps"},
    "asgd": {"weight_decay": "weight_decay_rate"},
}


def build_optimizer_config(
    section: Mapping[str, object],
    *,
    locate: Locate,
    report: Report,
    notices: list[str],
) -> OptimizerConfig | None:
    """The OptimizerConfig of an `optimizer` section, or None with the mistakes in `report`."""
    path = ("optimizer",)
    before = len(report.mistakes)
    optimizer_type = _type_of(section, locate, report)
    if optimizer_type is None:
        return None
    cls = HYPERPARAMETERS[optimizer_type]
    own_keys = [entry.name for entry in fields(cls)]
    values = _respelled(section, optimizer_type, own_keys, locate, report, notices)
    common = build(
        CommonOptions,
        values,
        path=path,
        locate=locate,
        report=report,
        passed_over=("optimizer_type", "learning_rate", *own_keys),
    )
    own = {key: values[key] for key in own_keys if key in values}
    hyperparameters = build(cls, own, path=path, locate=locate, report=report)
    if "learning_rate" not in values:
        report.add(
            "`optimizer.learning_rate` is missing",
            where=locate(path),
            allowed="a number, a mapping with `scheduler`, or a list of them",
        )
        return None
    schedule = build_schedule(
        values["learning_rate"],
        path=(*path, "learning_rate"),
        locate=locate,
        report=report,
        disable_lr_steps_reset=values.get("disable_lr_steps_reset") is True,
    )
    if common is None or hyperparameters is None or schedule is None:
        return None
    _check_together(optimizer_type, common, hyperparameters, locate, report)
    if len(report.mistakes) > before:
        return None
    shared = {entry.name: getattr(common, entry.name) for entry in fields(CommonOptions)}
    return OptimizerConfig(
        optimizer_type=optimizer_type,
        hyperparameters=hyperparameters,
        learning_rate=schedule,
        **shared,
    )


def _type_of(section: Mapping[str, object], locate: Locate, report: Report) -> OptimizerType | None:
    given = section.get("optimizer_type")
    for known in HYPERPARAMETERS:
        if isinstance(given, str) and given.lower() == known:
            return known
    missing = given is None
    report.add(
        "`optimizer.optimizer_type` is missing"
        if missing
        else f"`optimizer.optimizer_type` is {given!r}",
        where=locate(("optimizer",) if missing else ("optimizer", "optimizer_type")),
        allowed=", ".join(HYPERPARAMETERS),
        hint="" if missing else nearest(str(given).lower(), HYPERPARAMETERS),
    )
    return None


def _respelled(
    section: Mapping[str, object],
    optimizer_type: OptimizerType,
    own_keys: list[str],
    locate: Locate,
    report: Report,
    notices: list[str],
) -> dict[str, object]:
    values = dict(section)
    spellings = {**_OTHER_SPELLINGS["any"], **_OTHER_SPELLINGS.get(optimizer_type, {})}
    for other, name in spellings.items():
        if other not in values or (name == "eps" and name not in own_keys):
            continue
        place = locate(("optimizer", other))
        if name in values:
            report.add(
                f"`optimizer.{other}` and `optimizer.{name}` are the same setting",
                where=place,
                allowed=f"`{name}` alone",
            )
        values[name] = values.pop(other)
        if other == "epsilon":
            notices.append(
                f"`optimizer.epsilon` ({place}) is used as `eps`; release 1.6 ignored it"
            )
    return values


def _check_together(
    optimizer_type: OptimizerType,
    common: CommonOptions,
    hyperparameters: Hyperparameters,
    locate: Locate,
    report: Report,
) -> None:
    nesterov = isinstance(hyperparameters, SGDOptions) and hyperparameters.use_nesterov
    momentum = getattr(hyperparameters, "momentum", 0.0)
    rules = (
        (
            common.max_gradient_norm > 0 and common.max_gradient_value > 0,
            "max_gradient_norm",
            "`max_gradient_norm` and `max_gradient_value` exclude each other",
            "one of them",
        ),
        (
            common.min_loss_scale > common.max_loss_scale,
            "min_loss_scale",
            "`min_loss_scale` is above `max_loss_scale`",
            "min_loss_scale <= max_loss_scale",
        ),
        (
            nesterov and momentum == 0,
            "use_nesterov",
            "`use_nesterov` needs momentum",
            "`momentum` > 0 with it",
        ),
        (
            optimizer_type == "rprop" and common.weight_decay_rate > 0,
            "weight_decay_rate",
            "Rprop has no weight decay",
            "weight_decay_rate: 0.0",
        ),
    )
    for broken, key, what, allowed in rules:
        if broken:
            report.add(what, where=locate(("optimizer", key)), allowed=allowed)

"""The keys that `Trainer` reads of the `optimizer` section.

Decides names, defaults and bounds, and the spelling of TensorFlow's cosine. Does not decide what
they make of a train_op (trainer.py).

Source of names and defaults: sections 2.4 and 2.5 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from openwafer.config.schedule import ScheduleConfig, build_schedule
from openwafer.config.schema import KeyPath, Report, build, limits
from openwafer.errors import ConfigError

__all__ = ["TrainerOptions", "read_options"]

_AT_LEAST_0 = limits(minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerOptions:
    """The `optimizer` section, but for `learning_rate`."""

    optimizer_type: Literal["sgd", "momentum", "adam", "adamw", "rmsprop"] = field(
        metadata=limits(ignore_case=True)
    )
    """Which optimizer."""
    momentum: float = field(default=0.9, metadata=_AT_LEAST_0)
    """Of momentum."""
    beta1: float = field(default=0.9, metadata=limits(minimum=0, below=1))
    """Of adam and adamw."""
    beta2: float = field(default=0.999, metadata=limits(minimum=0, below=1))
    """Of adam and adamw."""
    epsilon: float | None = field(default=None, metadata=_AT_LEAST_0)
    """Of adam, adamw and rmsprop; null: 1e-5 with mixed precision, else 1e-8."""
    use_bias_correction: bool = False
    """Of adamw."""
    weight_decay_rate: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Of adamw."""
    exclude_from_weight_decay: tuple[str, ...] = ("LayerNorm", "layer_norm", "bias", "Bias")
    """Parts of names that do not decay."""
    rmsprop_decay: float = field(default=0.9, metadata=_AT_LEAST_0)
    """Of rmsprop."""
    rmsprop_momentum: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Of rmsprop."""
    loss_scaling_factor: float | Literal["dynamic", "tf_dynamic"] = field(
        default=1.0, metadata=limits(above=0)
    )
    """Factor of the loss before the backward pass, divided out again: a number, `dynamic`, or
    `tf_dynamic` (TensorFlow's own rule; in compiled runs the same as `dynamic`)."""
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
    """Clip gradients to this global norm; 0 is off."""
    max_gradient_value: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Clip every element to this magnitude; 0 is off."""
    grad_accum_steps: int = field(default=1, metadata=limits(minimum=1))
    """Batches for an update; the global step counts updates."""
    disable_lr_steps_reset: bool = False
    """Show the global step to every schedule of a list."""
    log_summaries: bool = False
    """Write the learning rate, the norm of the gradients and the loss scale (TensorFlow itself; a
    compiled run always does)."""
    ws_summary: bool = False
    """Write the number of zeros in the gradients and the norm of the weights (TensorFlow itself).
    """


def read_options(params: Mapping[str, Any]) -> tuple[TrainerOptions, ScheduleConfig]:
    """The checked section and its learning rate.

    Raises:
        ConfigError: a key or value is wrong; all of them are said.
    """
    report = Report()
    options = build(
        TrainerOptions,
        params,
        path=("optimizer",),
        locate=_place,
        report=report,
        passed_over=("learning_rate", "log_grads", "log_hists"),
    )
    schedule = build_schedule(
        _without_cosine(params.get("learning_rate")),
        path=("optimizer", "learning_rate"),
        locate=_place,
        report=report,
        disable_lr_steps_reset=bool(params.get("disable_lr_steps_reset")),
    )
    report.raise_if_any()
    assert options is not None, "a section failed without a report"
    assert schedule is not None, "a schedule failed without a report"
    if options.max_gradient_norm and options.max_gradient_value:
        raise ConfigError(
            "`max_gradient_norm` and `max_gradient_value` exclude each other", where="optimizer"
        )
    if options.min_loss_scale > options.max_loss_scale:
        raise ConfigError("`min_loss_scale` is above `max_loss_scale`", where="optimizer")
    return options, schedule


def _without_cosine(rate: Any) -> Any:
    """TensorFlow's `Cosine` ends at the share `alpha` of its first rate; the schedule that has a
    formula here, CosineDecay, names the last rate itself."""
    if isinstance(rate, list):
        return [_without_cosine(entry) for entry in cast("list[Any]", rate)]
    if not isinstance(rate, Mapping):
        return rate
    form = dict(cast("Mapping[str, Any]", rate))
    if str(form.get("scheduler")).casefold() != "cosine":
        return form
    alpha, first = form.pop("alpha", 0.0), form.get("initial_learning_rate")
    end: Any = alpha
    # Where one of them is no number, CosineDecay's own check says so.
    if isinstance(alpha, (int, float)) and isinstance(first, (int, float)):
        end = alpha * first
    return {**form, "scheduler": "CosineDecay", "end_learning_rate": end}


def _place(path: KeyPath) -> str:
    return ".".join(map(str, path))

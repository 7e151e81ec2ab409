"""The optimizer types and what each of them reads.

Decides the keys, defaults and bounds of the 13 types. Does not decide the keys that all share
(optimizer.py) nor what an update computes (optim/).

Keys and defaults are those of the CS-2 software 1.6 documentation, except that SGD without
`momentum` means 0 (1.6 stopped with a KeyError).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openwafer.config.schema import limits

__all__ = [
    "HYPERPARAMETERS",
    "ASGDOptions",
    "AdadeltaOptions",
    "AdafactorOptions",
    "AdagradOptions",
    "AdamOptions",
    "AdamWOptions",
    "AdamaxOptions",
    "Hyperparameters",
    "LambOptions",
    "NAdamOptions",
    "OptimizerType",
    "RAdamOptions",
    "RMSpropOptions",
    "RpropOptions",
    "SGDOptions",
]

OptimizerType = Literal[
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "lamb",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
]

_AT_LEAST_0 = limits(minimum=0)
_BETA = limits(minimum=0, below=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDOptions:
    """Stochastic gradient descent; dampening is 0."""

    momentum: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Factor of the running gradient."""
    use_nesterov: bool = False
    """Nesterov momentum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Betas:
    beta1: float = field(default=0.9, metadata=_BETA)
    """Decay of the running gradient."""
    beta2: float = field(default=0.999, metadata=_BETA)
    """Decay of the running squared gradient."""
    eps: float = field(default=1e-6, metadata=_AT_LEAST_0)
    """Added to the denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamOptions(_Betas):
    """Adam with L2 weight decay and bias correction."""

    amsgrad: bool = False
    """Divide by the largest running squared gradient so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWOptions(AdamOptions):
    """Adam with decoupled weight decay."""

    correct_bias: bool = False
    """Correct the bias of the running averages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamaxOptions(_Betas):
    """Adam with the infinity norm."""

    maximize: bool = False
    """Go up the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdadeltaOptions:
    """Adadelta."""

    rho: float = field(default=0.9, metadata=limits(minimum=0, maximum=1))
    """Decay of the running squared gradient."""
    eps: float = field(default=1e-6, metadata=_AT_LEAST_0)
    """Added under the roots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdafactorOptions:
    """Adafactor with a given learning rate and no first moment."""

    eps1: float = field(default=1e-30, metadata=_AT_LEAST_0)
    """Added to the squared gradient."""
    eps2: float = field(default=1e-3, metadata=_AT_LEAST_0)
    """Smallest scale of a parameter."""
    clip_threshold: float = field(default=1.0, metadata=limits(minimum=1, maximum=1))
    """Largest root mean square of an update; only 1.0."""
    decay_rate: float = field(default=-0.8, metadata=limits(maximum=0))
    """Power of the step in the decay of the running squared gradient."""
    beta1: None = None
    """Only null: no first moment."""
    scale_parameter: bool = True
    """Scale the rate by the root mean square of the parameter."""
    relative_step: Literal[False] = False
    """Only false: the learning rate is given."""
    warmup_init: Literal[False] = False
    """Only false: it belongs to relative_step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdagradOptions:
    """Adagrad."""

    lr_decay: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Decay of the rate."""
    initial_accumulator_value: float = field(default=0.0, metadata=_AT_LEAST_0)
    """First value of the sum of squares."""
    eps: float = field(default=1e-6, metadata=_AT_LEAST_0)
    """Added to the denominator."""
    maximize: bool = False
    """Go up the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ASGDOptions:
    """Averaged stochastic gradient descent."""

    lambd: float = field(default=1e-4, metadata=_AT_LEAST_0)
    """Decay term."""
    alpha: float = field(default=0.75, metadata=_AT_LEAST_0)
    """Power of the decay of the rate."""
    t0: float = field(default=1e-6, metadata=_AT_LEAST_0)
    """Step at which averaging starts."""
    maximize: bool = False
    """Go up the gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LambOptions(_Betas):
    """Lamb without debiasing."""

    adam: bool = False
    """Trust ratio 1 everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RAdamOptions(_Betas):
    """Rectified Adam."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NAdamOptions(_Betas):
    """Adam with Nesterov momentum."""

    momentum_decay: float = field(default=4e-3, metadata=_AT_LEAST_0)
    """Decay of the momentum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSpropOptions:
    """RMSprop."""

    alpha: float = field(default=0.99, metadata=_AT_LEAST_0)
    """Decay of the running squared gradient."""
    momentum: float = field(default=0.0, metadata=_AT_LEAST_0)
    """Factor of the running update."""
    centered: bool = False
    """Divide by the variance rather than the second moment."""
    eps: float = field(default=1e-6, metadata=_AT_LEAST_0)
    """Added to the denominator."""
    as_tensorflow: bool = False
    """TensorFlow's form: eps under the root, the rate in the momentum, first square 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RpropOptions:
    """Resilient backpropagation; it has no weight decay."""

    eta1: float = field(default=0.5, metadata=limits(above=0, below=1))
    """Factor of a step size after a change of sign."""
    eta2: float = field(default=1.2, metadata=limits(above=1))
    """Factor of a step size otherwise."""
    step_size_min: float = field(default=1e-6, metadata=_AT_LEAST_0)
    """Smallest step size."""
    step_size_max: float = field(default=50.0, metadata=_AT_LEAST_0)
    """Largest step size."""


Hyperparameters = (
    SGDOptions
    | AdamOptions
    | AdamWOptions
    | AdamaxOptions
    | AdadeltaOptions
    | AdafactorOptions
    | AdagradOptions
    | ASGDOptions
    | LambOptions
    | RAdamOptions
    | NAdamOptions
    | RMSpropOptions
    | RpropOptions
)

HYPERPARAMETERS: Mapping[OptimizerType, type[Hyperparameters]] = {
    "adadelta": AdadeltaOptions,
    "adafactor": AdafactorOptions,
    "adagrad": AdagradOptions,
    "adam": AdamOptions,
    "adamax": AdamaxOptions,
    "adamw": AdamWOptions,
    "asgd": ASGDOptions,
    "lamb": LambOptions,
    "nadam": NAdamOptions,
    "radam": RAdamOptions,
    "rmsprop": RMSpropOptions,
    "rprop": RpropOptions,
    "sgd": SGDOptions,
}
"""The keys of each type, as a dataclass."""

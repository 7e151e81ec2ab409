"""The optimizers of TensorFlow that the runtime has, and where they keep their state.

Decides how each class's settings become an OptimizerConfig, what its slot variables are in torch's
optimizers, and what the learning rate is multiplied with. Does not decide what a train_op consists
of (train_op.py).

Adam: TensorFlow's has its epsilon beside √v, not beside √(v / (1 - β2^t)) as torch's, and so is the
form without bias correction whose rate is multiplied by √(1 - β2^t) / (1 - β1^t) (Kingma and Ba,
arXiv 1412.6980, end of section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openwafer.config.hyperparameters import (
    AdagradOptions,
    AdamWOptions,
    Hyperparameters,
    OptimizerType,
    RMSpropOptions,
    SGDOptions,
)
from openwafer.errors import CaptureError
from openwafer.frontends.tf.adamw import AdamWOptimizer
from openwafer.frontends.tf.library import tf

__all__ = ["KnownOptimizer", "bias_correction", "known_optimizer"]

_train: Any = tf.compat.v1.train


def _no_factor(step: int) -> float:
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownOptimizer:
    """An optimizer as the runtime has it.

    rate: number, tensor or function, as it was given. rate_factor: what it is multiplied with in
    the step after `t` steps. slots: torch's name of a state → TensorFlow's. powers: the numbers β
    of which a variable holds β^(t + 1) after t steps. counter: name of the variable that holds t,
    where the optimizer has one. sparse: gradients of embeddings are the same
    as dense ones to it.
    """

    optimizer_type: OptimizerType
    hyperparameters: Hyperparameters
    rate: Any
    slots: Mapping[str, str] = field(default_factory=dict[str, str])
    powers: tuple[float, ...] = ()
    counter: str = ""
    rate_factor: Callable[[int], float] = _no_factor
    weight_decay_rate: float = 0.0
    exclude_from_weight_decay: tuple[str, ...] = ()
    sparse: bool = True


def known_optimizer(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    """The runtime's form of a `tf.compat.v1.train` optimizer for the variables of these names.

    Raises:
        CaptureError: it is of no known class; a subclass may compute anything, and is not taken.
    """
    make = _KNOWN.get(type(optimizer))
    if make is None:
        raise CaptureError(
            f"the optimizer {type(optimizer).__name__} is not known",
            allowed=", ".join(sorted(cls.__name__ for cls in _KNOWN)),
            hint="without cs_ip, TensorFlow itself trains with any optimizer",
        )
    return make(optimizer, names)


def _number(optimizer: Any, value: Any, what: str) -> float:
    value = value() if callable(value) else value
    static = tf.get_static_value(value) if tf.is_tensor(value) else value
    if static is None:
        raise CaptureError(
            f"{what} of {type(optimizer).__name__} is computed in the graph",
            allowed="a number",
        )
    # TensorFlow computes with the float32 of it: for 0.999 that makes 1 - β2 differ by 1e-5.
    return float(np.float32(static))


def _sgd(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    return KnownOptimizer(
        optimizer_type="sgd",
        hyperparameters=SGDOptions(),
        rate=optimizer._learning_rate,
    )


def _momentum(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    return KnownOptimizer(
        optimizer_type="sgd",
        hyperparameters=SGDOptions(
            momentum=_number(optimizer, optimizer._momentum, "momentum"),
            use_nesterov=bool(optimizer._use_nesterov),
        ),
        rate=optimizer._learning_rate,
        slots={"momentum_buffer": "momentum"},
        # Rows that a batch does not name keep their momentum, and do not move.
        sparse=False,
    )


def _adagrad(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    first = _number(optimizer, optimizer._initial_accumulator_value, "initial_accumulator_value")
    return KnownOptimizer(
        optimizer_type="adagrad",
        hyperparameters=AdagradOptions(initial_accumulator_value=first, eps=0.0),
        rate=optimizer._learning_rate,
        slots={"sum": "accumulator"},
    )


def _rmsprop(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    centered = bool(optimizer._centered)
    slots = {"square_avg": "rms", "momentum_buffer": "momentum"}
    return KnownOptimizer(
        optimizer_type="rmsprop",
        hyperparameters=RMSpropOptions(
            alpha=_number(optimizer, optimizer._decay, "decay"),
            momentum=_number(optimizer, optimizer._momentum, "momentum"),
            eps=_number(optimizer, optimizer._epsilon, "epsilon"),
            centered=centered,
            as_tensorflow=True,
        ),
        rate=optimizer._learning_rate,
        slots=slots | {"grad_avg": "mg"} if centered else slots,
        # Rows that a batch does not name keep their averages.
        sparse=False,
    )


def _adam(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    beta1 = _number(optimizer, optimizer._beta1, "beta1")
    beta2 = _number(optimizer, optimizer._beta2, "beta2")
    return KnownOptimizer(
        optimizer_type="adamw",
        hyperparameters=AdamWOptions(
            beta1=beta1,
            beta2=beta2,
            eps=_number(optimizer, optimizer._epsilon, "epsilon"),
            correct_bias=False,
        ),
        rate=optimizer._lr,
        slots={"exp_avg": "m", "exp_avg_sq": "v"},
        powers=(beta1, beta2),
        rate_factor=bias_correction(beta1, beta2),
    )


def _adamw(optimizer: Any, names: Sequence[str]) -> KnownOptimizer:
    decay = float(optimizer.weight_decay_rate)
    spared = tuple(name for name in names if not optimizer.decays(name))
    decaying = set(names) - set(spared)
    # The runtime spares every name that contains one of these.
    unclear = [name for name in decaying if any(part in name for part in spared)]
    if decay and unclear:
        raise CaptureError(
            f"{unclear[0]} decays, and its name begins like that of a variable that does not",
            hint="give the variables names of which none is part of another",
        )
    return KnownOptimizer(
        optimizer_type="adamw",
        # Plain numbers: this optimizer computes 1 - beta before it rounds to float32.
        hyperparameters=AdamWOptions(
            beta1=float(optimizer.beta1),
            beta2=float(optimizer.beta2),
            eps=float(optimizer.epsilon),
            correct_bias=bool(optimizer.use_bias_correction),
        ),
        rate=optimizer.learning_rate,
        slots={"exp_avg": "m", "exp_avg_sq": "v"},
        counter=optimizer.counter.op.name if optimizer.use_bias_correction else "",
        weight_decay_rate=decay,
        exclude_from_weight_decay=spared,
    )


def bias_correction(beta1: float, beta2: float) -> Callable[[int], float]:
    """Adam's factor of the rate in the step after `t` steps."""
    return lambda t: math.sqrt(1 - beta2 ** (t + 1)) / (1 - beta1 ** (t + 1))


_KNOWN: dict[type, Callable[[Any, Sequence[str]], KnownOptimizer]] = {
    AdamWOptimizer: _adamw,
    _train.AdagradOptimizer: _adagrad,
    _train.AdamOptimizer: _adam,
    _train.GradientDescentOptimizer: _sgd,
    _train.MomentumOptimizer: _momentum,
    _train.RMSPropOptimizer: _rmsprop,
}

"""Initial values of TensorFlow variables by the names that `openwafer.layers` has for them.

Decides which Keras initializer draws from the same distribution. Does not decide which names there
are (layers/initializers.py) nor which weight gets which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from openwafer.errors import ConfigError, nearest
from openwafer.frontends.tf.library import tf

__all__ = ["Initializer", "glorot_uniform", "initializer", "linear_default", "normal"]

Initializer = Callable[[], Any]
"""Makes a Keras initializer. One that is used twice would give the same weights twice."""

_keras: Any = tf.keras.initializers

_BY_NAME: Mapping[str, Callable[[], Any]] = {
    "constant": _keras.Zeros,
    "ones": _keras.Ones,
    "zeros": _keras.Zeros,
    "eye": _keras.Identity,
    "uniform": lambda: _keras.RandomUniform(-0.05, 0.05),
    "normal": lambda: _keras.RandomNormal(stddev=0.05),
    "xavier_normal": lambda: _keras.VarianceScaling(1.0, "fan_avg", "untruncated_normal"),
    "xavier_uniform": _keras.GlorotUniform,
    "glorot_normal": lambda: _keras.VarianceScaling(1.0, "fan_avg", "untruncated_normal"),
    "glorot_uniform": _keras.GlorotUniform,
    "truncated_normal": lambda: _keras.TruncatedNormal(stddev=0.05),
    "variance_scaling": _keras.VarianceScaling,
    "lecun_normal": _keras.LecunNormal,
    "lecun_uniform": _keras.LecunUniform,
    "kaiming_normal": lambda: _keras.VarianceScaling(2.0, "fan_in", "untruncated_normal"),
    "kaiming_uniform": lambda: _keras.VarianceScaling(2.0, "fan_in", "uniform"),
}


def initializer(name: str) -> Any:
    """A new Keras initializer with that name's distribution and default parameters.

    Raises:
        ConfigError: there is no such name.
    """
    make = _BY_NAME.get(name.lower())
    if make is None:
        raise ConfigError(
            f"there is no initializer {name!r}",
            allowed=", ".join(sorted(_BY_NAME)),
            hint=nearest(name.lower(), _BY_NAME),
        )
    return make()


def linear_default(num_inputs: int) -> Any:
    """What PyTorch draws the weight and the bias of a Linear layer from where nothing is said:
    uniform within ±1/√num_inputs."""
    bound = num_inputs**-0.5
    return _keras.RandomUniform(-bound, bound)


def normal(std: float) -> Initializer:
    """Normally distributed around 0."""
    return lambda: _keras.RandomNormal(stddev=std)


def glorot_uniform() -> Any:
    """What `xavier_uniform` is in PyTorch."""
    return _keras.GlorotUniform()

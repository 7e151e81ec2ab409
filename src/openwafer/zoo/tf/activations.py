"""Functions of single elements for the zoo's TensorFlow models: activations by the names of
`openwafer.layers.activations`, and dropout.

Decides what each name computes in TensorFlow. Which names there are is that module's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openwafer.errors import ConfigError, nearest
from openwafer.frontends.tf.library import tf
from openwafer.layers.activations import ACTIVATIONS

__all__ = ["activation", "dropout"]


def dropout(x: Any, rate: float | None, training: bool) -> Any:
    """`x`, in training with a share of `rate` set to zero and the rest scaled up."""
    return tf.nn.dropout(x, rate) if training and rate else x


def _quick_gelu(x: Any) -> Any:
    return x * tf.sigmoid(1.702 * x)


def _gelu_tanh(x: Any) -> Any:
    return tf.nn.gelu(x, approximate=True)


def _mish(x: Any) -> Any:
    return x * tf.tanh(tf.nn.softplus(x))


def _leaky_relu(x: Any) -> Any:
    return tf.nn.leaky_relu(x, 0.01)  # PyTorch's slope


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": tf.nn.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "leaky_relu": _leaky_relu,
    "linear": tf.identity,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "sigmoid": tf.sigmoid,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}
assert _ACTIVATIONS.keys() == ACTIVATIONS.keys(), "a name that only one framework knows"


def activation(name: str) -> Callable[[Any], Any]:
    """The function of a name of `openwafer.layers.activations`.

    Raises:
        ConfigError: there is no such name.
    """
    found = _ACTIVATIONS.get(name.lower())
    if found is None:
        raise ConfigError(
            f"there is no activation {name!r}",
            allowed=", ".join(sorted(_ACTIVATIONS)),
            hint=nearest(name.lower(), _ACTIVATIONS),
        )
    return found

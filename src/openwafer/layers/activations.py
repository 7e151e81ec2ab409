"""Activation functions by name.

Decides which names there are and what each computes. A callable passes through, so that any
function of one tensor can be used where a name can.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from openwafer.errors import nearest
from openwafer.layers.arguments import argument_error

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]

Activation = Callable[[torch.Tensor], torch.Tensor]

_log = logging.getLogger("openwafer")


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), the approximation of arXiv:1606.08415."""
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 x), the other approximation of arXiv:1606.08415."""
    return x * torch.sigmoid(1.702 * x)


def _linear(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""`gelu_new` and `gelu_fast` are two spellings of one formula. `swish` is SiLU (arXiv:1710.05941);
release 1.6 listed the name twice and ran ReLU6 under it, which is `relu6` here."""


def get_activation(activation: str | Activation | None) -> Activation:
    """The function for a name (upper or lower case), a callable as it is, the identity for None.

    Raises:
        ConfigError: there is no activation of that name.
    """
    if activation is None:
        return _linear
    if not isinstance(activation, str):
        if callable(activation):
            return activation
        raise argument_error(
            f"the activation is a {type(activation).__name__}",
            allowed="a name or a function of one tensor",
        )
    name = activation.lower()
    if name not in ACTIVATIONS:
        raise argument_error(
            f"there is no activation {activation!r}",
            allowed=", ".join(sorted(ACTIVATIONS)),
            hint=nearest(name, ACTIVATIONS),
        )
    if name == "swish":
        _say_what_swish_is()
    return ACTIVATIONS[name]


@functools.cache
def _say_what_swish_is() -> None:
    _log.warning("activation `swish` is SiLU; release 1.6 computed ReLU6 for it: use `relu6`")

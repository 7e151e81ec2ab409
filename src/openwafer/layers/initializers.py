"""Initial values of weights, by name.

Decides which initializers there are, their parameters and defaults. Does not decide which weight
gets which: that is each layer's argument. torch.nn.init has most of them; variance scaling and its
two LeCun forms are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from openwafer.errors import nearest
from openwafer.layers.arguments import argument_error

__all__ = ["Initializer", "InitializerSpec", "create_initializer"]

Initializer = Callable[[torch.Tensor], Any]
InitializerSpec = str | Mapping[str, Any] | Initializer

_TRUNCATED_AT_TWO_STD = 0.87962566103423978
"""Standard deviation of a standard normal distribution cut off at ±2 (scipy.stats.truncnorm)."""


def create_initializer(spec: InitializerSpec) -> Initializer:
    """A function that fills a tensor in place.

    Args:
        spec: a name (`"xavier_uniform"`), a mapping with `name` and that initializer's parameters
            (`{"name": "normal", "std": 0.02}`), or a function of a tensor, which is returned.
            Where a parameter is `gain`, the name of a nonlinearity stands for its gain.

    Raises:
        ConfigError: unknown name, or a parameter that this initializer has not.
    """
    if callable(spec):
        return spec
    name, given = _name_and_parameters(spec)
    function, defaults = _INITIALIZERS[name]
    for key in given:
        if key not in defaults:
            raise argument_error(
                f"initializer {name!r} has no parameter {key!r}",
                allowed=", ".join(defaults) or "no parameters",
                hint=nearest(key, defaults),
            )
    parameters = {**defaults, **{k: v for k, v in given.items() if v is not None}}
    if isinstance(parameters.get("gain"), str):
        parameters["gain"] = _gain_of(parameters["gain"])
    return partial(_fill, function, parameters)


def _name_and_parameters(spec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(cast(Any, spec).get("name"), str):
        raise argument_error(
            f"an initializer cannot be made from {spec!r}",
            allowed='a name, a mapping such as {"name": "normal", "std": 0.02}, or a function',
        )
    given = dict(cast("Mapping[str, Any]", spec))
    name: str = given.pop("name").lower()
    if name not in _INITIALIZERS:
        raise argument_error(
            f"there is no initializer {name!r}",
            allowed=", ".join(sorted(_INITIALIZERS)),
            hint=nearest(name, _INITIALIZERS),
        )
    return name, given


def _gain_of(nonlinearity: str) -> float:
    try:
        return nn.init.calculate_gain(cast(Any, nonlinearity))
    except ValueError as error:
        raise argument_error(
            f"there is no gain for {nonlinearity!r}",
            allowed="a number, or linear, sigmoid, tanh, relu, leaky_relu, selu, conv1d, ...",
        ) from error


def _fill(function: Callable[..., Any], parameters: Mapping[str, Any], tensor: torch.Tensor) -> Any:
    with torch.no_grad():
        return function(tensor, **parameters)


def _variance_scaling(
    tensor: torch.Tensor, *, scale: float, mode: str, distribution: str
) -> torch.Tensor:
    """Random values with variance `scale` / fan, as Keras' VarianceScaling defines it.

    The truncated normal distribution is cut off at two of its standard deviations and widened, so
    that the variance holds after the cut.
    """
    num_out, num_in = tensor.shape[0], tensor[0].numel()
    if tensor.dim() > 2:  # a convolution: [out, in, *window]
        num_out *= tensor[0, 0].numel()
    fans = {"fan_in": num_in, "fan_out": num_out, "fan_avg": (num_in + num_out) / 2}
    std = math.sqrt(scale / max(1.0, _chosen("mode", mode, fans)))
    wide = std / _TRUNCATED_AT_TWO_STD
    draws: dict[str, Callable[[], Any]] = {
        "truncated_normal": lambda: nn.init.trunc_normal_(tensor, 0.0, wide, -2 * wide, 2 * wide),
        "normal": lambda: nn.init.normal_(tensor, 0.0, std),
        "uniform": lambda: nn.init.uniform_(tensor, -math.sqrt(3) * std, math.sqrt(3) * std),
    }
    return _chosen("distribution", distribution, draws)()


def _chosen(parameter: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise argument_error(
            f"variance_scaling has no {parameter} {value!r}",
            allowed=", ".join(choices),
            hint=nearest(value, choices),
        )
    return choices[value]


_KAIMING = {"a": 0.0, "mode": "fan_in", "nonlinearity": "leaky_relu"}
_INITIALIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "constant": (nn.init.constant_, {"val": 0.0}),
    "ones": (nn.init.ones_, {}),
    "zeros": (nn.init.zeros_, {}),
    "eye": (nn.init.eye_, {}),
    "uniform": (nn.init.uniform_, {"a": -0.05, "b": 0.05}),
    "normal": (nn.init.normal_, {"mean": 0.0, "std": 0.05}),
    "xavier_normal": (nn.init.xavier_normal_, {"gain": 1.0}),
    "xavier_uniform": (nn.init.xavier_uniform_, {"gain": 1.0}),
    "glorot_normal": (nn.init.xavier_normal_, {"gain": 1.0}),
    "glorot_uniform": (nn.init.xavier_uniform_, {"gain": 1.0}),
    "truncated_normal": (nn.init.trunc_normal_, {"mean": 0.0, "std": 0.05, "a": -0.1, "b": 0.1}),
    "variance_scaling": (
        _variance_scaling,
        {"scale": 1.0, "mode": "fan_in", "distribution": "truncated_normal"},
    ),
    "lecun_normal": (
        partial(_variance_scaling, scale=1.0, mode="fan_in", distribution="truncated_normal"),
        {},
    ),
    "lecun_uniform": (
        partial(_variance_scaling, scale=1.0, mode="fan_in", distribution="uniform"),
        {},
    ),
    "kaiming_normal": (nn.init.kaiming_normal_, _KAIMING),
    "kaiming_uniform": (nn.init.kaiming_uniform_, _KAIMING),
}
"""Name → function and its parameters with their defaults (those of release 1.6)."""

"""OpenWafer: validate, compile, train and evaluate models for a wafer, on the hardware you have.

The public surface. Names are loaded when they are first used, so that `import openwafer` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openwafer.errors import OpenWaferError
    from openwafer.frontends.torch.api import compile, validate
    from openwafer.frontends.torch.base_model import PyTorchBaseModel
    from openwafer.frontends.torch.metrics import AccuracyMetric, CBMetric, PerplexityMetric
    from openwafer.frontends.torch.run import run

__version__ = "0.1.0"

__all__ = [
    "AccuracyMetric",
    "CBMetric",
    "OpenWaferError",
    "PerplexityMetric",
    "PyTorchBaseModel",
    "__version__",
    "compile",
    "run",
    "validate",
]

_HOMES = {
    "AccuracyMetric": "openwafer.frontends.torch.metrics",
    "CBMetric": "openwafer.frontends.torch.metrics",
    "OpenWaferError": "openwafer.errors",
    "PerplexityMetric": "openwafer.frontends.torch.metrics",
    "PyTorchBaseModel": "openwafer.frontends.torch.base_model",
    "compile": "openwafer.frontends.torch.api",
    "run": "openwafer.frontends.torch.run",
    "validate": "openwafer.frontends.torch.api",
}


_ROOMS = ("data", "layers", "zoo")
"""Modules that can be used without importing them by name: `openwafer.zoo.build(…)`."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"openwafer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'openwafer' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

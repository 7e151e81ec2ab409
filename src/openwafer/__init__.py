"""OpenWafer: validate, compile, train and evaluate models for a wafer, on the hardware you have.

The public surface. Names are loaded when they are first used, so that `import openwafer` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openwafer.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES, _ROOMS)

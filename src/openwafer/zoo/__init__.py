"""The zoo: the supported networks, ready to run.

`build("gpt2/small")` gives a model, `load("gpt2/small")` its parameters; `names()` lists them, and
`from_pretrained(folder)` takes over a Hugging Face checkpoint. Names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openwafer.zoo.catalog import build, load, names
    from openwafer.zoo.convert import from_pretrained
    from openwafer.zoo.model import ModelConfig, ZooModel

__all__ = ["ModelConfig", "ZooModel", "build", "from_pretrained", "load", "names"]

_HOMES = {
    "ModelConfig": "model",
    "ZooModel": "model",
    "build": "catalog",
    "from_pretrained": "convert",
    "load": "catalog",
    "names": "catalog",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openwafer.zoo' has no attribute {name!r}")
    value = getattr(import_module(f"openwafer.zoo.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""The zoo: the supported networks, ready to run.

`build("gpt2/small")` gives a model, `load("gpt2/small")` its parameters; `names()` lists them, and
`from_pretrained(folder)` takes over a Hugging Face checkpoint. Names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openwafer.lazy import lazy_names

if TYPE_CHECKING:
    from openwafer.zoo.catalog import build, load, names
    from openwafer.zoo.convert import from_pretrained
    from openwafer.zoo.model import ModelConfig, ZooModel

__all__ = ["ModelConfig", "ZooModel", "build", "from_pretrained", "load", "names"]

_HOMES = {
    "ModelConfig": ".model",
    "ZooModel": ".model",
    "build": ".catalog",
    "from_pretrained": ".convert",
    "load": ".catalog",
    "names": ".catalog",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

"""How the weights of a Hugging Face checkpoint and of a zoo model correspond.

Decides the form in which a family says it. Does not decide files (convert.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from openwafer.errors import CheckpointError
from openwafer.zoo.model import ModelConfig

__all__ = ["Rule", "WeightMap", "require_counterpart"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One of our parameters (or a buffer) and the tensors of theirs that it is made of; or several
    of ours that theirs hold together.

    ours, theirs: `state_dict` names; `{layer}` stands for a layer number, the same in all.
    join: our tensor from theirs, in order; where `ours` are several, a tuple of them. None: the one
        tensor as it is.
    split: theirs from ours, the inverse of `join`: takes as many tensors as `ours` names.
    layers: name of the config field with the number of layers that `{layer}` runs over.
    """

    ours: str | tuple[str, ...]
    theirs: tuple[str, ...]
    join: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    split: Callable[..., tuple[Tensor, ...]] | None = None
    layers: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Both directions between a Hugging Face model and ours.

    architectures: class names of theirs (`config.json` "architectures") that convert, the first one
        is written by default.
    rules: gives the rules for one configuration.
    config_from: our `model` section from their config.json.
    config_to: their config.json (model_type, architectures, …) from our configuration.
    optional: our names that may be absent in a checkpoint (a new head for fine-tuning).
    ignored: prefixes of their names that hold nothing of ours.
    config_from_names: keys of our `model` section that only the names of their tensors tell, from
        their config.json and those names; None if there are none.
    """

    architectures: tuple[str, ...]
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    config_from: Callable[[Mapping[str, Any]], dict[str, Any]]
    config_to: Callable[[ModelConfig], dict[str, Any]]
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    config_from_names: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] | None = None


def require_counterpart(
    config: ModelConfig, plain: ModelConfig, keys: Sequence[str], architecture: str
) -> None:
    """Refuse a configuration that differs from `plain` in keys that `architecture` does not have.

    Raises:
        CheckpointError: names the first such key.
    """
    for key in keys:
        value, allowed = getattr(config, key), getattr(plain, key)
        if value != allowed:
            raise CheckpointError(
                f"{architecture} has no counterpart of `model.{key}: {value}`",
                allowed=f"{key}: {allowed}",
            )

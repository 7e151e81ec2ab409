"""A family: one folder of the zoo as one value.

Decides what a folder must bring. Does not decide which families there are (catalog.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openwafer.zoo.model import AnyModel, Batch, Logits, ModelConfig
from openwafer.zoo.weights import WeightMap

__all__ = ["EvalMetrics", "Family"]


class EvalMetrics(ABC):
    """The metrics of an evaluation; the constructor makes the `CBMetric`s."""

    @abstractmethod
    def __init__(self, config: ModelConfig, info: Any) -> None:
        """Args: the model's configuration, and the `DataInfo` of the evaluation's dataset."""

    @abstractmethod
    def update(self, logits: Logits, batch: Batch) -> None:
        """Called inside the captured evaluation step, once per batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One network.

    name: the folder's name and the first part of model names (`gpt2` of `gpt2/small`).
    title: one line for `openwafer zoo`.
    task: of `openwafer.data`; what `train_input` and the other inputs mean.
    config, model, metrics: the classes. `model(config)` builds with `nn.init` defaults of the
        family; `metrics(config, info)`.
    from_data: `model` keys that are taken from the data where the YAML gives none, each with the
        name in `DataInfo` (`vocab_size: vocab_size`).
    weights: how names and layouts of Hugging Face checkpoints map to ours; None if there is no
        counterpart.
    """

    name: str
    title: str
    task: str
    config: type[ModelConfig]
    model: type[AnyModel]
    metrics: type[EvalMetrics]
    from_data: Mapping[str, str]
    weights: WeightMap | None = None

"""What every model of the zoo is: a module with a frozen configuration, logits and a loss.

Decides the surface that all of them share. Does not decide any architecture (the folders do) nor
where data come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from openwafer.config.schema import KeyPath, Locate, Report, build, limits, text_of

__all__ = ["RATE", "RUN_KEYS", "SIZE", "AnyModel", "Batch", "Logits", "ModelConfig", "ZooModel"]

Batch = dict[str, Tensor]
Logits = Tensor | dict[str, Tensor]
"""One tensor, or one per head."""

RUN_KEYS = (
    "mixed_precision",
    "fp16_type",
    "allow_multireplica",
    "compute_eval_metrics",
    "enable_vts",
)
"""Keys of a `model` section that the run reads, not the architecture."""

SIZE = limits(minimum=1)
RATE = limits(minimum=0.0, below=1.0)
"""Metadata of sizes, and of dropout rates."""

C = TypeVar("C", bound="ModelConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The `model` section of one family, checked. Field names are the documented keys.

    SHORT: short names for `--set model.NAME=` and `build(NAME=…)`, each with the keys it sets, as
        `layers` for `num_hidden_layers`.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def from_section(cls: type[C], section: Mapping[str, Any], locate: Locate | None = None) -> C:
        """Check a `model` section.

        Args:
            locate: gives the place of a key for messages; its path where None.

        Raises:
            ConfigError: unknown keys (the nearest is offered), wrong types, values out of bounds.
        """
        report = Report()
        config = build(
            cls,
            section,
            path=("model",),
            locate=locate or _as_path,
            report=report,
            passed_over=RUN_KEYS,
            none_means_default=False,
        )
        report.raise_if_any()
        assert config is not None, "a section failed without a report"
        return config


def _as_path(path: KeyPath) -> str:
    return text_of(path)


class ZooModel(nn.Module, ABC, Generic[C]):
    """A network with its loss. `model(**batch)` is the loss, a scalar.

    Batches are dicts of tensors with the names that the family's data gives; a model names in
    `logits` and `loss` the tensors that it reads and leaves the others.

    compute_dtype: what its configuration trains it in under autocast; None where there is no mixed
        precision. `openwafer.compile` plans for it.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: C) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def logits(self, **batch: Tensor) -> Logits:
        """What the network predicts, before any softmax; reads no labels."""

    @abstractmethod
    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """The scalar loss of those logits, float32."""

    @abstractmethod
    def example_batch(self, batch_size: int) -> Batch:
        """A batch of the right names, shapes and dtypes with valid random content.

        It is on the model's device; on "meta" nothing is allocated.
        """

    def predictions(self, logits: Logits, **batch: Tensor) -> Batch:
        """What mode predict writes, one row per sample: by default the most likely class."""
        if isinstance(logits, Tensor):
            return {"prediction": logits.argmax(-1)}
        return {name: head.argmax(-1) for name, head in logits.items()}

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        return self.loss(self.logits(**batch), **batch)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Trained numbers; a tied weight counts once."""
        return sum(weight.numel() for weight in self.parameters())


AnyModel = ZooModel[Any]
"""A model of some family."""

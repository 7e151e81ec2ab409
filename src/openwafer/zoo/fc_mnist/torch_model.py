"""A fully connected classifier of small images: the network of examples/fc_mnist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.layers import get_activation
from openwafer.zoo.losses import weighted_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ModelConfig, ZooModel

__all__ = ["FcMnistConfig", "FcMnistModel", "row_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FcMnistConfig(ModelConfig):
    """The `model` section.

    hidden_size, depth: that many hidden layers of that size.
    hidden_sizes: the size of each hidden layer, in place of both.
    dropout: after each hidden layer's activation, activation_fn.
    image_shape: (channels, height, width) of the images, which come flat.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("depth",),
        "width": ("hidden_size",),
    }

    hidden_size: int = field(default=50, metadata=SIZE)
    depth: int = field(default=10, metadata=limits(minimum=0))
    hidden_sizes: tuple[int, ...] | None = field(default=None, metadata=SIZE)
    dropout: float = field(default=0.0, metadata=RATE)
    activation_fn: str = "relu"
    image_shape: tuple[int, ...] = field(default=(1, 28, 28), metadata=SIZE)
    num_classes: int = field(default=10, metadata=limits(minimum=2))


class FcMnistModel(ZooModel[FcMnistConfig]):
    """images [batch, pixels] float32, 0 to 1; labels [batch] int64."""

    def __init__(self, config: FcMnistConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_sizes
        if hidden is None:
            hidden = (config.hidden_size,) * config.depth
        sizes = (math.prod(config.image_shape), *hidden)
        self.fc_layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in pairwise(sizes)
        )
        self.last_layer = nn.Linear(sizes[-1], config.num_classes)
        self.nonlin = get_activation(config.activation_fn)
        self.dropout = nn.Dropout(config.dropout)

    def logits(self, **batch: Tensor) -> Tensor:
        hidden = batch["images"]
        for fc_layer in self.fc_layers:
            hidden = self.dropout(self.nonlin(fc_layer(hidden)))
        return self.last_layer(hidden)

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        assert isinstance(logits, Tensor)
        weights = row_weights(batch)
        if weights is None:
            return F.cross_entropy(logits, batch["labels"]).float()
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        return weighted_loss(losses, weights, "num_tokens")

    def example_batch(self, batch_size: int) -> Batch:
        pixels, device = math.prod(self.config.image_shape), self.device
        return {
            "images": torch.rand(batch_size, pixels, device=device),
            "labels": torch.randint(0, self.config.num_classes, (batch_size,), device=device),
        }


def row_weights(batch: Batch) -> Tensor | None:
    """1 for samples, 0 for rows that only fill the last batch, [batch]; None where none can."""
    return (batch["unique_ids"] >= 0).float() if "unique_ids" in batch else None

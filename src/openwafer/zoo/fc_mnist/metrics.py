"""Metrics of an evaluation of fc_mnist."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from openwafer.frontends.torch.metrics import AccuracyMetric
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.fc_mnist.torch_model import row_weights
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["FcMnistMetrics"]


class FcMnistMetrics(EvalMetrics):
    """`accuracy`."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        self._accuracy = AccuracyMetric(name="accuracy")

    def update(self, logits: Logits, batch: Batch) -> None:
        assert isinstance(logits, Tensor)
        self._accuracy(
            labels=batch["labels"], predictions=logits.argmax(-1), weights=row_weights(batch)
        )

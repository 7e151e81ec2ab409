"""Metrics of an evaluation of U-Net."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from openwafer.frontends.torch.metrics import (
    AccuracyMetric,
    DiceMetric,
    MeanIOUMetric,
    MeanPerClassAccuracyMetric,
)
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.model import Batch, Logits, ModelConfig
from openwafer.zoo.unet.torch_model import UNetConfig, pixel_weights

__all__ = ["UNetMetrics"]


class UNetMetrics(EvalMetrics):
    """Those of `eval_metrics`: `eval/mIOU`, `eval/DSC`, `eval/MPCA`, `eval/Acc`."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        assert isinstance(config, UNetConfig)
        classes, ignored = config.num_classes, config.eval_ignore_classes
        makers = {
            "mIOU": lambda: MeanIOUMetric(classes, ignored, name="eval/mIOU"),
            "DSC": lambda: DiceMetric(classes, ignored, name="eval/DSC"),
            "MPCA": lambda: MeanPerClassAccuracyMetric(classes, ignored, name="eval/MPCA"),
            "Acc": lambda: AccuracyMetric(name="eval/Acc"),
        }
        self._metrics = [makers[name]() for name in dict.fromkeys(config.eval_metrics)]

    def update(self, logits: Logits, batch: Batch) -> None:
        assert isinstance(logits, Tensor)
        predictions, weights = logits.argmax(1), pixel_weights(batch)
        for metric in self._metrics:
            metric(labels=batch["labels"], predictions=predictions, weights=weights)

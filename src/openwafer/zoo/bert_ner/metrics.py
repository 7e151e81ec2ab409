"""What an evaluation of named entities reports."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.torch.metrics import AccuracyMetric, EntityF1Metric, F1Metric
from openwafer.zoo.bert_ner.torch_model import BertNerConfig
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["NerMetrics"]


class NerMetrics(EvalMetrics):
    """Accuracy of labels, their F1 without the label `O`, and the F1 of whole entities."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        assert isinstance(config, BertNerConfig)
        names = tuple(info.label_names)
        outside = [number for number, name in enumerate(names) if name == "O"]
        self.accuracy = AccuracyMetric(name="eval/accuracy")
        self.label_f1 = F1Metric(
            config.num_classes, "micro", ignore_labels=outside, name="eval/f1_labels"
        )
        self.entity_f1 = EntityF1Metric(names, name="eval/f1_entities")

    def update(self, logits: Logits, batch: Batch) -> None:
        """logits [batch, seq, num_classes]; labels and loss_mask [batch, seq]."""
        assert not isinstance(logits, dict)
        labels, predictions, weights = batch["labels"], logits.argmax(-1), batch["loss_mask"]
        for metric in (self.accuracy, self.label_f1, self.entity_f1):
            metric(labels, predictions, weights)

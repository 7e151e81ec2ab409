"""What an evaluation of a classifier reports."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.torch.metrics import AccuracyMetric, MatthewsCorrelationMetric
from openwafer.zoo.bert.torch_model import rows_that_count
from openwafer.zoo.bert_classifier.torch_model import BertClassifierConfig
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["ClassifierMetrics"]

_PARTS = ("matched", "mismatched")


class ClassifierMetrics(EvalMetrics):
    """Accuracy and Matthews correlation; on MNLI also the accuracy on each of its two parts."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        assert isinstance(config, BertClassifierConfig)
        self.accuracy = AccuracyMetric(name="eval/accuracy")
        self.matthews = MatthewsCorrelationMetric(
            num_classes=config.num_labels, name="eval/matthews_correlation"
        )
        self.of_part = {part: AccuracyMetric(name=f"eval/accuracy_{part}") for part in _PARTS}

    def update(self, logits: Logits, batch: Batch) -> None:
        """logits [batch, num_labels]; labels and, on MNLI, is_matched, is_mismatched [batch]."""
        assert not isinstance(logits, dict)
        labels, predictions = batch["labels"], logits.argmax(-1)
        weights = rows_that_count(batch["attention_mask"])
        self.accuracy(labels=labels, predictions=predictions, weights=weights)
        self.matthews(labels=labels, predictions=predictions, weights=weights)
        for part, metric in self.of_part.items():
            chosen = batch.get(f"is_{part}")
            if chosen is not None:
                metric(labels=labels, predictions=predictions, weights=weights * chosen)

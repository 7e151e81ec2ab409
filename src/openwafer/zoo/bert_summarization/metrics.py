"""What an evaluation of extractive summaries reports."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.torch.metrics import AccuracyMetric, RougeScoreMetric
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["SummarizationMetrics"]

_KINDS = ("rouge1", "rouge2", "rougeL")


class SummarizationMetrics(EvalMetrics):
    """ROUGE of the sentences with the highest scores against those of the summary, and how often a
    sentence is rightly taken or left."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        self.rouge = [
            RougeScoreMetric(kind, tokenizer=info.tokenizer, name=f"eval/{kind}") for kind in _KINDS
        ]
        self.accuracy = AccuracyMetric(name="eval/accuracy")

    def update(self, logits: Logits, batch: Batch) -> None:
        """logits, labels, cls_indices, cls_weights [batch, sentences]; input_ids, attention_mask
        [batch, seq]."""
        assert not isinstance(logits, dict)
        labels, weights = batch["labels"], batch["cls_weights"]
        for metric in self.rouge:
            metric(
                labels=labels,
                cls_indices=batch["cls_indices"],
                cls_weights=weights,
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits=logits,
            )
        self.accuracy(labels=labels, predictions=(logits > 0).to(labels.dtype), weights=weights)

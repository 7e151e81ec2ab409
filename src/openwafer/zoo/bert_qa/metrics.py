"""What an evaluation of question answering reports."""

from __future__ import annotations

from typing import Any

import torch

from openwafer.frontends.torch.metrics import AccuracyMetric, SquadMetric
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["QAMetrics"]


class QAMetrics(EvalMetrics):
    """How often both ends of a window's answer are right; where the data know the answers' words,
    also their exact match and F1, each question once."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        self.accuracy = AccuracyMetric(name="eval/accuracy")
        self.of_words: list[SquadMetric] = []
        if info.answers is not None:
            self.of_words = [
                SquadMetric(info.answers, "exact_match", name="eval/exact_match"),
                SquadMetric(info.answers, "f1", name="eval/f1"),
            ]

    def update(self, logits: Logits, batch: Batch) -> None:
        """start, end [batch, seq]; labels, label_weights [batch, 2]; unique_ids [batch]."""
        assert isinstance(logits, dict)
        start, end, labels = logits["start"], logits["end"], batch["labels"]
        for metric in self.of_words:
            metric(batch["unique_ids"], start, end)
        wrong = (start.argmax(-1) - labels[:, 0]).abs() + (end.argmax(-1) - labels[:, 1]).abs()
        weights = batch["label_weights"].amin(-1)
        self.accuracy(labels=torch.zeros_like(wrong), predictions=wrong, weights=weights)

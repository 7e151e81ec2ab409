"""What an evaluation of pre-training reports."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.torch.metrics import AccuracyMetric, PerplexityMetric
from openwafer.zoo.bert.torch_model import rows_that_count
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.losses import token_losses
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["PretrainingMetrics"]


class PretrainingMetrics(EvalMetrics):
    """Accuracy and perplexity of masked tokens, accuracy of next sentences."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        self.masked_lm = AccuracyMetric(name="eval/accuracy_masked_lm")
        self.perplexity = PerplexityMetric(name="eval/mlm_perplexity")
        self.next_sentence = AccuracyMetric(name="eval/accuracy_cls")

    def update(self, logits: Logits, batch: Batch) -> None:
        """Logits, masks and labels are those of `Bert`."""
        assert isinstance(logits, dict)
        tokens, labels, weights = logits["masked_lm"], batch["labels"], batch["masked_lm_mask"]
        total = (token_losses(tokens, labels) * weights).sum()
        self.masked_lm(labels=labels, predictions=tokens.argmax(-1), weights=weights)
        self.perplexity(labels=labels, loss=total, weights=weights)
        if "next_sentence" in logits:
            self.next_sentence(
                labels=batch["next_sentence_label"].reshape(-1),
                predictions=logits["next_sentence"].argmax(-1),
                weights=rows_that_count(batch["attention_mask"]),
            )

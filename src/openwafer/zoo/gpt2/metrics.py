"""Metrics of next-token prediction, for GPT-2, GPT-3 and GPT-J."""

from __future__ import annotations

import gzip
from typing import Any

from torch import Tensor

from openwafer.data.tokenizers import Tokenizer
from openwafer.frontends.torch.metrics import (
    AccuracyMetric,
    BitsPerByteMetric,
    CBMetric,
    PerplexityMetric,
)
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.losses import token_losses
from openwafer.zoo.model import Batch, Logits, ModelConfig

__all__ = ["GzipMetric", "NextTokenMetrics"]

MAX_GZIP_TOKENS = 1 << 22
"""Enough for a stable figure; more would take longer to compress than a small model to evaluate."""


class NextTokenMetrics(EvalMetrics):
    """eval/accuracy_lm and eval/perplexity_lm over the tokens that count; where the data know the
    text that they stand for, its eval/bits_per_byte and, to compare, what gzip -9 takes."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        self._accuracy = AccuracyMetric(name="eval/accuracy_lm")
        self._perplexity = PerplexityMetric(name="eval/perplexity_lm")
        self._bits = self._gzip = None
        if getattr(info, "bytes_per_token", 0.0):
            self._bits = BitsPerByteMetric(info.bytes_per_token, name="eval/bits_per_byte")
        if getattr(info, "tokenizer", None) is not None:
            self._gzip = GzipMetric(info.tokenizer, name="eval/gzip_bits_per_byte")

    def update(self, logits: Logits, batch: Batch) -> None:
        assert isinstance(logits, Tensor)
        labels, mask = batch["labels"], batch["attention_mask"]
        total = (token_losses(logits, labels) * mask).sum()
        self._accuracy(labels=labels, predictions=logits.argmax(-1), weights=mask)
        self._perplexity(labels=labels, loss=total, weights=mask)
        if self._bits is not None:
            self._bits(labels=labels, loss=total, weights=mask)
        if self._gzip is not None:
            self._gzip(labels, mask)


class GzipMetric(CBMetric):
    """Bits per byte of the evaluated text under gzip -9, for comparison.

    Args:
        tokenizer: turns tokens into text (`decode`).
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None) -> None:
        self._tokenizer = tokenizer
        super().__init__(name)

    def init_state(self) -> None:
        self._tokens: list[int] = []

    def update_on_host(self, labels: Tensor, mask: Tensor) -> None:
        """labels, mask [batch, seq]."""
        if len(self._tokens) < MAX_GZIP_TOKENS:
            self._tokens += labels[mask.bool()].tolist()

    def compute(self) -> float:
        text = self._tokenizer.decode(self._tokens).encode()
        return 8 * len(gzip.compress(text, 9)) / len(text) if text else 0.0

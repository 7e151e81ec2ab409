"""ROUGE of extractive summaries.

Decides which sentences are the summary (the highest logits), what they are compared with (the
sentences whose label is 1), and that each document counts once. The scores are in text_scores.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, Protocol

import torch

from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs
from openwafer.frontends.torch.metrics.text_scores import rouge_l, rouge_n, rouge_words

__all__ = ["RougeScoreMetric"]


class _Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class RougeScoreMetric(CBMetric):
    """Mean F1 over documents.

    Args:
        kind: of unigrams, bigrams, or the longest common subsequence.
        num_sentences: in a summary.
        tokenizer: makes words of the tokens; without one the tokens themselves are compared.
    """

    def __init__(
        self,
        kind: Literal["rouge1", "rouge2", "rougeL"] = "rouge1",
        num_sentences: int = 3,
        tokenizer: _Decoder | None = None,
        name: str | None = None,
    ) -> None:
        if kind not in ("rouge1", "rouge2", "rougeL"):
            raise ConfigError(f"kind {kind!r}", allowed="rouge1, rouge2, rougeL")
        self._kind, self._num_sentences, self._tokenizer = kind, num_sentences, tokenizer
        super().__init__(name or kind)

    def init_state(self) -> None:
        self.total = 0.0
        self.num_documents = 0

    def update_on_device(
        self,
        labels: torch.Tensor,
        cls_indices: torch.Tensor,
        cls_weights: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits: torch.Tensor,
    ) -> DeviceOutputs:
        """labels, cls_indices, cls_weights and logits [batch, sentences]; the rest [batch, seq]."""
        given = [labels, cls_indices, cls_weights, input_ids, attention_mask, logits]
        return DeviceOutputs(args=given)

    def update_on_host(self, *tensors: torch.Tensor) -> None:
        labels, indices, weights, ids, mask, logits = (tensor.tolist() for tensor in tensors)
        for row in range(len(labels)):
            places = [k for k, weight in enumerate(weights[row]) if weight > 0]
            if not places:  # a row that only fills the batch
                continue
            scores: list[float] = logits[row]
            ranked = sorted(places, key=scores.__getitem__, reverse=True)[: self._num_sentences]
            length = int(sum(mask[row]))
            sentences = _sentences(ids[row], [indices[row][k] for k in places], length)
            by_place = dict(zip(places, sentences, strict=True))
            candidate = self._words([by_place[k] for k in sorted(ranked)])
            reference = self._words([by_place[k] for k in places if labels[row][k] == 1])
            self.total += self._score(candidate, reference)
            self.num_documents += 1

    def _words(self, sentences: Sequence[Sequence[int]]) -> Sequence[Hashable]:
        tokens = [token for sentence in sentences for token in sentence]
        return rouge_words(self._tokenizer.decode(tokens)) if self._tokenizer else tokens

    def _score(self, candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
        if self._kind == "rougeL":
            return rouge_l(candidate, reference)
        return rouge_n(candidate, reference, 1 if self._kind == "rouge1" else 2)

    def compute(self) -> float:
        return self.total / self.num_documents if self.num_documents else 0.0


def _sentences(ids: Sequence[int], starts: Sequence[int], length: int) -> list[Sequence[int]]:
    """Each sentence's tokens, without the cls token before it and the sep token behind."""
    ends = [*starts[1:], length]
    return [ids[start + 1 : end - 1] for start, end in zip(starts, ends, strict=True)]

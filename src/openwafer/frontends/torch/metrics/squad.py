"""Exact match and F1 of answers to questions about a text.

Decides that a question whose text was read in several windows has one answer, the best of all, and
that each question counts once. How logits become an answer is the data's business
(openwafer.data.squad).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch

from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs
from openwafer.frontends.torch.metrics.text_scores import exact_match, word_f1

__all__ = ["Answers", "SquadMetric"]


class Answers(Protocol):
    """What knows the questions: `question_answering` data's `answers`."""

    @property
    def references(self) -> Mapping[str, Sequence[str]]:
        """The right answers of each question; none means that the text has no answer."""
        ...

    def best(
        self, unique_id: int, start_logits: torch.Tensor, end_logits: torch.Tensor
    ) -> tuple[str, str, float]:
        """Question, answer and its score, from one window's logits [seq]."""
        ...


class SquadMetric(CBMetric):
    """Mean score of all questions seen.

    Args:
        answers: the evaluated data's.
        kind: which of the two scores.
    """

    def __init__(
        self,
        answers: Answers,
        kind: Literal["exact_match", "f1"] = "f1",
        name: str | None = None,
    ) -> None:
        if kind not in ("exact_match", "f1"):
            raise ConfigError(f"kind {kind!r}", allowed="exact_match, f1")
        self._answers, self._kind = answers, kind
        super().__init__(name or kind)

    def init_state(self) -> None:
        self.best: dict[str, tuple[float, str]] = {}

    def update_on_device(
        self, unique_ids: torch.Tensor, start_logits: torch.Tensor, end_logits: torch.Tensor
    ) -> DeviceOutputs:
        """unique_ids [batch]; logits [batch, seq]. A negative id is a row that only fills."""
        return DeviceOutputs(args=[unique_ids, start_logits, end_logits])

    def update_on_host(
        self, unique_ids: torch.Tensor, start_logits: torch.Tensor, end_logits: torch.Tensor
    ) -> None:
        rows = zip(unique_ids.tolist(), start_logits.float(), end_logits.float(), strict=True)
        for unique_id, starts, ends in rows:
            if unique_id < 0:
                continue
            question, text, score = self._answers.best(unique_id, starts, ends)
            if question not in self.best or score > self.best[question][0]:
                self.best[question] = (score, text)

    def compute(self) -> float:
        score = exact_match if self._kind == "exact_match" else word_f1
        references = self._answers.references
        scores = [score(text, references[question]) for question, (_, text) in self.best.items()]
        return sum(scores) / len(scores) if scores else 0.0

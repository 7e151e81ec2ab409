"""From the logits of a question's window to an answer in words.

Decides which pairs of first and last token may be an answer, and when there is none. Source: Devlin
et al., "BERT" (2018), sections 4.2 and 4.3: the pair with the highest sum of logits; no answer
where the cls token's sum is higher and the questions include unanswerable ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SquadAnswers", "Window"]


@dataclass(frozen=True, slots=True)
class Window:
    """example: its number; first: the position of the context's first token in the sequence;
    offsets [n, 2]: the characters of the context that each of its n tokens stands for."""

    example: int
    first: int
    offsets: npt.NDArray[np.int64]


class SquadAnswers:
    """Everything that is needed to judge predictions; items are known by their `unique_ids`.

    Args:
        windows: one for each item.
        identifiers, contexts: one for each example.
        references: the right answers of each identifier.
        max_answer_length: in tokens.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        identifiers: Sequence[str],
        contexts: Sequence[str],
        references: Mapping[str, Sequence[str]],
        *,
        max_answer_length: int,
    ) -> None:
        self._windows, self._identifiers, self._contexts = windows, identifiers, contexts
        self._references = dict(references)
        self._max_length = max_answer_length
        self._some_without = any(not answers for answers in references.values())

    @property
    def references(self) -> Mapping[str, Sequence[str]]:
        return self._references

    def best(
        self, unique_id: int, start_logits: torch.Tensor, end_logits: torch.Tensor
    ) -> tuple[str, str, float]:
        """The question's identifier, the answer and its score (the sum of its two logits).

        Args:
            unique_id: of the item.
            start_logits, end_logits: [seq].
        """
        window = self._windows[unique_id]
        identifier = self._identifiers[window.example]
        starts = start_logits.detach().cpu().double().numpy()
        ends = end_logits.detach().cpu().double().numpy()
        inside = slice(window.first, window.first + len(window.offsets))
        sums = starts[inside, None] + ends[None, inside]
        sums = np.where(_allowed(len(window.offsets), self._max_length), sums, -np.inf)
        if not sums.size:
            return identifier, "", float("-inf")
        first, last = np.unravel_index(int(np.argmax(sums)), sums.shape)
        score = float(sums[first, last])
        if self._some_without and starts[0] + ends[0] > score:
            # Compared between windows by how little an answer is wanted.
            return identifier, "", score
        begin, end = int(window.offsets[first, 0]), int(window.offsets[last, 1])
        return identifier, self._contexts[window.example][begin:end], score


def _allowed(length: int, longest: int) -> npt.NDArray[np.bool_]:
    """[first, last]: the last token is not before the first, and not too far behind it."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    return (distance >= 0) & (distance < longest)

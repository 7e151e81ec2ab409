"""Which tokens a masked language model must find, drawn anew in each epoch, a batch at a time.

Decides positions, whole words, and what stands in a masked token's place: the mask in 80 of 100
cases, a random token in 10, itself in 10 (Devlin et al., "BERT", 2018, section 3.1). Does not
decide what the sequences are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.keyed_random import keyed_uniforms
from openwafer.data.tokenizers import Tokenizer

__all__ = ["Masked", "MaskingRule", "mask_batch"]

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Sorts after every uniform number, and after every other word.
_NEVER = 2.0
_DRAW_POSITIONS, _DRAW_KIND, _DRAW_TOKEN = 101, 102, 103


@dataclass(frozen=True, slots=True)
class Masked:
    """input_ids [batch, seq] with masks in; positions, mask (1: counts) and labels [batch, p], of
    each row the masked ones first, by position."""

    input_ids: Integers
    positions: Integers
    mask: Integers
    labels: Integers


class MaskingRule:
    """Args:
    probability: share of a sequence's tokens (special ones count) that is masked; at least one.
    max_predictions: p, no more than this.
    whole_word: a word's tokens are masked together. One that does not fit is left alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        probability: float = 0.15,
        max_predictions: int = 20,
        whole_word: bool = False,
    ) -> None:
        self.probability, self.max_predictions = probability, max_predictions
        self.word_starts = tokenizer.word_starts if whole_word else None
        self.mask_id = tokenizer.need("mask")
        self.is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.is_special[list(tokenizer.ids.present())] = True
        self.replacements = np.flatnonzero(~self.is_special)


def mask_batch(
    ids: Integers, lengths: Integers, rule: MaskingRule, items: npt.NDArray[Any], seed: int
) -> Masked:
    """Mask a batch.

    Args:
        ids: [batch, seq], padded on the right.
        lengths: [batch], tokens without padding.
        items, seed: the key of each row's random numbers.
    """
    batch, length = ids.shape
    real = np.arange(length)[None, :] < lengths[:, None]
    candidates = real & ~rule.is_special[ids]
    wanted = np.maximum(1, np.rint(lengths * rule.probability)).astype(np.int64)
    wanted = np.minimum(np.minimum(wanted, rule.max_predictions), candidates.sum(axis=1))
    score = np.where(candidates, keyed_uniforms(seed, items, length, draw=_DRAW_POSITIONS), _NEVER)
    chosen = _first(score, wanted)
    if rule.word_starts is not None:
        starts = rule.word_starts(ids) | ~candidates
        starts[:, 1:] |= ~candidates[:, :-1]  # no word goes on behind a special token
        words = _whole_words(score, starts, wanted, rule)
        found_one = words.any(axis=1, keepdims=True)
        chosen = np.where(found_one, words, chosen)
    positions, mask = _gathered(chosen, rule.max_predictions)
    rows = np.arange(batch)[:, None]
    labels = np.where(mask, ids[rows, positions], 0)
    kind = keyed_uniforms(seed, items, rule.max_predictions, draw=_DRAW_KIND)
    other = keyed_uniforms(seed, items, rule.max_predictions, draw=_DRAW_TOKEN)
    random_tokens = rule.replacements[(other * len(rule.replacements)).astype(np.int64)]
    new = np.where(kind < 0.8, rule.mask_id, np.where(kind < 0.9, random_tokens, labels))
    masked_ids = ids.copy()
    row_numbers, columns = np.nonzero(mask)
    masked_ids[row_numbers, positions[row_numbers, columns]] = new[row_numbers, columns]
    return Masked(masked_ids, positions, mask.astype(np.int64), labels)


def _first(score: npt.NDArray[np.float64], wanted: Integers) -> Flags:
    """[batch, seq]: the `wanted` tokens of the lowest score in each row."""
    order = np.argsort(score, axis=1, kind="stable")
    chosen = np.zeros(score.shape, dtype=bool)
    taken = np.arange(score.shape[1])[None, :] < wanted[:, None]
    np.put_along_axis(chosen, order, taken, axis=1)
    return chosen


def _whole_words(
    score: npt.NDArray[np.float64], starts: Flags, wanted: Integers, rule: MaskingRule
) -> Flags:
    """Words in the order of their first token's score, until enough tokens are masked."""
    length = score.shape[1]
    columns = np.arange(length)[None, :]
    starts = starts.copy()
    starts[:, 0] = True
    first = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    word_score = np.take_along_axis(score, first, axis=1)
    sizes = _sizes(first)
    fits = (word_score < _NEVER) & (sizes <= rule.max_predictions)
    word_score = np.where(fits, word_score, _NEVER)
    order = np.argsort(word_score, axis=1, kind="stable")
    in_order = np.take_along_axis(first, order, axis=1)
    new_word = np.ones_like(starts)
    new_word[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    begin = np.maximum.accumulate(np.where(new_word, columns, 0), axis=1)
    end = begin + np.take_along_axis(sizes, order, axis=1)
    taken = (begin < wanted[:, None]) & (end <= rule.max_predictions)
    taken &= np.take_along_axis(fits, order, axis=1)
    chosen = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(chosen, order, taken, axis=1)
    return chosen


def _sizes(first: Integers) -> Integers:
    """[batch, seq]: how many tokens the word of each token has; `first` is where it begins."""
    batch, length = first.shape
    flat = (first + np.arange(batch)[:, None] * length).ravel()
    counts = np.bincount(flat, minlength=batch * length)
    return counts[flat].reshape(batch, length)


def _gathered(chosen: Flags, count: int) -> tuple[Integers, Flags]:
    """Positions of the chosen tokens [batch, count], ascending, zeros behind; and which count."""
    number = np.cumsum(chosen, axis=1) - 1
    rows, columns = np.nonzero(chosen)
    positions = np.zeros((chosen.shape[0], count), dtype=np.int64)
    mask = np.zeros((chosen.shape[0], count), dtype=bool)
    places = number[rows, columns]
    positions[rows, places] = columns
    mask[rows, places] = True
    return positions, mask

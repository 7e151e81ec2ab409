"""Scores of texts against references: SQuAD's and ROUGE. Plain functions on strings and sequences.

Sources: Rajpurkar et al., "SQuAD" (2016), for the normalization, exact match and F1; Lin, "ROUGE: A
Package for Automatic Evaluation of Summaries" (2004), sections 2 and 3.1. Does not stem words.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = [
    "exact_match",
    "normalized_answer",
    "rouge_l",
    "rouge_n",
    "rouge_words",
    "word_f1",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"[a-z0-9]+")


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalized prediction is one of the references; none of them means no answer."""
    wanted = {normalized_answer(reference) for reference in references or ("",)}
    return float(normalized_answer(prediction) in wanted)


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of common words with any reference."""
    return max(_word_f1(prediction, reference) for reference in references or ("",))


def _word_f1(prediction: str, reference: str) -> float:
    ours, theirs = normalized_answer(prediction).split(), normalized_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_words(text: str) -> list[str]:
    """Lower-case words and numbers, as ROUGE compares them."""
    return _WORDS.findall(text.lower())


def rouge_n(candidate: Sequence[Hashable], reference: Sequence[Hashable], n: int) -> float:
    """F1 of common n-grams."""
    ours, theirs = _ngrams(candidate, n), _ngrams(reference, n)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence."""
    return _f1(_common_length(candidate, reference), len(candidate), len(reference))


def _ngrams(words: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(second) + 1)
    for item in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = diagonal + 1 if item == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]

"""Small tasks made up on the spot, for models whose real data do not ship with anything.

Decides the tasks: each is learnable by a small network in minutes and not by its majority class,
the same on every machine, and which of its items are held out: none of them is in training. Does
not tokenize beyond the word lists that it gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.keyed_random import derive_seed, item_generator, keyed_integers
from openwafer.data.params import Split
from openwafer.data.tokenizers import WordTokenizer

__all__ = [
    "Question",
    "number_pairs",
    "number_words",
    "paired_tokens",
    "pairs_tokenizer",
    "questions",
    "reversal_pairs",
    "summaries",
    "tagged_sentences",
    "translation_words",
]

_SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "<mask>")
_NUM_PAIRED = 20

_ONE_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
_ONES = _ONE_WORDS.split()
_TEN_WORDS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = _TEN_WORDS.split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

_NAMES = {
    "people": "Ada Boris Clara Dmitri Elena Farid Grace Hugo Ines Jonas Keiko Liam Mira Nadia",
    "family": "Abbott Becker Castro Dubois Evans Fischer Garcia Haddad Ivanov Jensen Kim Lopez",
    "places": "Lima Oslo Cairo Quito Turin Delhi Porto Dakar Kyoto Perth Bergen Lagos Riga",
    "companies": "Nordlicht Vantage Helio Quarry Maple Tundra Beacon Orchard Cobalt Harbor",
    "kinds": "Labs Works Group Institute Bank",
    "things": "apples books lamps chairs drums ropes coins kites boats plums bells maps",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
_PEOPLE, _FAMILY, _PLACES, _COMPANIES, _KINDS, _THINGS, _DAYS = (
    names.split() for names in _NAMES.values()
)


def pairs_tokenizer() -> WordTokenizer:
    """The words of pairs: 0 .. 19, 0th .. 19th, and the special ones."""
    numbers = range(_NUM_PAIRED)
    return WordTokenizer([*_SPECIAL, *map(str, numbers), *(f"{number}th" for number in numbers)])


@dataclass(frozen=True, slots=True)
class _Pairs:
    seed: int

    def __call__(self, out: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> None:
        num_pairs = (out.shape[1] + 1) // 2
        first = keyed_integers(self.seed, numbers, num_pairs, below=_NUM_PAIRED)
        paired = np.stack([first, first + _NUM_PAIRED], axis=-1).reshape(len(out), -1)
        out[:] = paired[:, : out.shape[1]] + len(_SPECIAL)


def paired_tokens(split: Split) -> Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], None]:
    """Fills windows with random numbers, each followed by its ordinal: `7 7th 13 13th`. There are
    so many windows that none of an evaluation is in training. What is hidden can be told from its
    neighbour where single tokens are hidden."""
    return _Pairs(derive_seed("pairs", _data(split)))


def number_words(number: int) -> str:
    """A number below a million in English words, without `and`."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        rest = number % 10
        return _TENS[number // 10] + (f" {_ONES[rest]}" if rest else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % unit
    return f"{number_words(number // unit)} {name}" + (f" {number_words(rest)}" if rest else "")


def translation_words() -> list[str]:
    """The shared vocabulary of the two translation tasks."""
    named = {*_ONES, *_TENS[2:], "hundred", "thousand"}
    return [*_SPECIAL, *"0123456789", *_LETTERS, *sorted(named)]


def number_pairs(split: Split, count: int) -> tuple[list[str], list[str]]:
    """Digits of numbers below a million, and the numbers in words. One number in 16 is held out."""
    generator = np.random.Generator(np.random.Philox(key=[derive_seed("numbers", split), 0]))
    sources: list[str] = []
    targets: list[str] = []
    while len(sources) < count:
        digits = int(generator.integers(1, 7))
        number = int(generator.integers(0, 10**digits))
        if _is_of(split, str(number), every=16):
            sources.append(" ".join(str(number)))
            targets.append(number_words(number))
    return sources, targets


def reversal_pairs(split: Split, count: int) -> tuple[list[str], list[str]]:
    """Words of 3 to 12 letters, and their letters in reverse. One word in 16 is held out."""
    generator = np.random.Generator(np.random.Philox(key=[derive_seed("reverse", split), 0]))
    sources: list[str] = []
    targets: list[str] = []
    while len(sources) < count:
        word = [_LETTERS[i] for i in generator.integers(0, 26, int(generator.integers(3, 13)))]
        text = " ".join(word)
        if _is_of(split, text, every=16):
            sources.append(text)
            targets.append(" ".join(reversed(word)))
    return sources, targets


def _data(split: Split) -> str:
    return "train" if split == "train" else "eval"


def _is_of(split: Split, text: str, *, every: int = 4) -> bool:
    """Whether an item may be in this split: one in `every` is held out, by a hash of its text."""
    return (derive_seed("held out", text) % every == 0) == (_data(split) == "eval")


def _pick(generator: np.random.Generator, words: Any) -> str:
    return str(words[int(generator.integers(len(words)))])


def _name(generator: np.random.Generator, kind: str) -> list[str]:
    """Words of a name. Some words are of two kinds, so that only their neighbours tell."""
    if kind == "PER":
        both = [_pick(generator, (*_PEOPLE, *_PLACES[:4])), _pick(generator, _FAMILY)]
        return both if generator.random() < 0.6 else both[:1]
    if kind == "LOC":
        return [_pick(generator, (*_PLACES, *_FAMILY[:4]))]
    return [_pick(generator, (*_COMPANIES, *_PLACES[:4], *_FAMILY[:4])), _pick(generator, _KINDS)]


_SENTENCES = (
    "{PER} moved from {LOC} to {LOC} on {day} .",
    "on {day} {ORG} hired {PER} and {PER} .",
    "{PER} said that {ORG} sold {count} {things} in {LOC} .",
    "nobody in {LOC} had heard of {PER} before {day} .",
    "{ORG} opened an office in {LOC} .",
    "the {things} of {PER} were sent to {ORG} by mistake .",
    "it rained on {day} , and {count} {things} were lost .",
    "{count} {things} from {LOC} went to {PER} of {ORG} .",
)


def tagged_sentences(split: Split, count: int) -> list[tuple[list[str], list[str]]]:
    """Sentences with people, places and organizations: words, and labels O, B-PER, I-PER, ..."""
    seed = derive_seed("entities", _data(split))
    found: list[tuple[list[str], list[str]]] = []
    for number in itertools.count():
        if len(found) == count:
            break
        generator = item_generator(seed, number)
        words: list[str] = []
        labels: list[str] = []
        for slot in _pick(generator, _SENTENCES).split():
            kind = slot.strip("{}")
            if kind in ("PER", "LOC", "ORG"):
                name = _name(generator, kind)
                labels += [f"B-{kind}"] + [f"I-{kind}"] * (len(name) - 1)
                words += name
            else:
                labels.append("O")
                words.append(_filler(generator, slot))
        if _is_of(split, " ".join(words)):
            found.append((words, labels))
    return found


def _filler(generator: np.random.Generator, slot: str) -> str:
    choices = {"{day}": _DAYS, "{things}": _THINGS}
    if slot == "{count}":
        return _ONES[int(generator.integers(2, 20))]
    return _pick(generator, choices[slot]) if slot in choices else slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about a text, in SQuAD's terms; `start` is the answer's first character."""

    identifier: str
    context: str
    question: str
    answer: str
    start: int


def questions(split: Split, count: int) -> list[Question]:
    """Texts about three people who each bought things somewhere, and a question about one."""
    seed = derive_seed("questions", _data(split))
    found: list[Question] = []
    for number in itertools.count():
        if len(found) == count:
            break
        generator = item_generator(seed, number)
        people = [str(name) for name in generator.permutation(_PEOPLE)[:3]]
        chosen = int(generator.integers(3))
        asked = ("where", "what", "when")[int(generator.integers(3))]
        context, answer, start = "", "", 0
        for place, person in enumerate(people):
            facts = {
                "what": f"{_ONES[int(generator.integers(2, 20))]} {_pick(generator, _THINGS)}",
                "where": _pick(generator, _PLACES),
                "when": _pick(generator, _DAYS),
            }
            sentence = f"{person} bought {facts['what']} in {facts['where']} on {facts['when']} . "
            if place == chosen:
                answer = facts[asked]
                start = len(context) + sentence.index(answer, len(person))
            context += sentence
        person = people[chosen]
        ask = (
            f"what did {person} buy ?" if asked == "what" else f"{asked} did {person} buy things ?"
        )
        if not _is_of(split, context + ask):
            continue
        found.append(
            Question(
                identifier=f"{_data(split)}-{len(found)}",
                context=context,
                question=ask,
                answer=answer,
                start=start,
            )
        )
    return found


def summaries(split: Split, count: int) -> list[tuple[list[str], list[int]]]:
    """Texts whose first sentence names their subject: sentences, and 1 for those about it."""
    seed = derive_seed("summaries", _data(split))
    found: list[tuple[list[str], list[int]]] = []
    for number in itertools.count():
        if len(found) == count:
            break
        generator = item_generator(seed, number)
        subject, *others = (str(word) for word in generator.permutation(_THINGS)[:4])
        sentences, labels = [f"this is about {subject} ."], [1]
        for _ in range(int(generator.integers(4, 9))):
            about = generator.random() < 0.3
            thing = subject if about else _pick(generator, others)
            person, place = _pick(generator, _PEOPLE), _pick(generator, _PLACES)
            sentence = (
                f"{person} took the {thing} to {place} .",
                f"in {place} the {thing} were praised by {person} .",
                f"{person} of {place} forgot {_ONES[int(generator.integers(2, 20))]} {thing} .",
            )[int(generator.integers(3))]
            sentences.append(sentence)
            labels.append(int(about))
        if _is_of(split, " ".join(sentences)):
            found.append((sentences, labels))
    return found

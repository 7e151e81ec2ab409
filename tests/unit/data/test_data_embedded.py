"""What every machine has: the standard library's text, and generated tasks that make sense."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwafer.data import build_dataset
from openwafer.data.chunks import ordered_chunks, package_chunks
from openwafer.data.embedded import source_files, stdlib_text, subject_text
from openwafer.data.generated import (
    number_pairs,
    number_words,
    paired_tokens,
    questions,
    reversal_pairs,
    summaries,
    tagged_sentences,
)
from openwafer.data.params import Split
from openwafer.errors import ConfigError

VALUES = {
    word: number
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
} | {
    word: 10 * number
    for number, word in enumerate(
        ["x", "x", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    )
    if number > 1
}


def read_number(words: list[str]) -> int:
    if "thousand" in words:
        place = words.index("thousand")
        return 1000 * read_number(words[:place]) + read_number(words[place + 1 :])
    if "hundred" in words:
        place = words.index("hundred")
        return 100 * read_number(words[:place]) + read_number(words[place + 1 :])
    return sum(VALUES[word] for word in words)


@given(number=st.integers(0, 999_999))
def test_number_words_read_back(number: int) -> None:
    assert read_number(number_words(number).split()) == number


def test_translation_pairs_are_right_and_apart() -> None:
    for make, check in (
        (number_pairs, lambda s, t: read_number(t.split()) == int(s.replace(" ", ""))),
        (reversal_pairs, lambda s, t: s == t[::-1]),
    ):
        found: dict[str, set[str]] = {}
        for split in ("train", "eval"):
            sources, targets = make(split, 300)  # type: ignore[arg-type]
            assert all(check(s, t) for s, t in zip(sources, targets, strict=True))
            assert make(split, 300) == (sources, targets)  # type: ignore[arg-type]
            found[split] = set(sources)
        assert not found["train"] & found["eval"]


def test_questions_have_their_answer() -> None:
    found = questions("train", 200)
    for question in found:
        end = question.start + len(question.answer)
        assert question.context[question.start : end] == question.answer
        (person,) = re.findall(r"did (\w+) buy", question.question)
        sentence = next(s for s in question.context.split(" . ") if s.startswith(person))
        assert question.answer in sentence
    assert len({question.answer for question in found}) > 50


def test_names_and_summaries() -> None:
    sentences = tagged_sentences("train", 300)
    kinds: dict[str, set[str]] = {}
    for words, labels in sentences:
        assert len(words) == len(labels)
        for previous, label in zip(["O", *labels], labels, strict=False):
            if label.startswith("I-"):
                assert previous[2:] == label[2:]
        for word, label in zip(words, labels, strict=True):
            kinds.setdefault(word, set()).add(label)
    # Words alone do not decide: some are of several kinds.
    assert sum(len(labels) > 1 for labels in kinds.values()) > 5
    for sentences_of, labels_of in summaries("train", 100):
        subject = sentences_of[0].removeprefix("this is about ").removesuffix(" .")
        assert labels_of == [int(subject in sentence.split()) for sentence in sentences_of]


def paired(split: Split) -> list[Hashable]:
    window = np.empty((2000, 24), dtype=np.int64)
    paired_tokens(split)(window, np.arange(2000))
    return list(map(tuple, window.tolist()))


def pixels_of(task: str) -> Callable[[Split], list[Hashable]]:
    def pixels(split: Split) -> list[Hashable]:
        dataset = build_dataset(task, {}, split)
        images = dataset.batch(np.arange(min(len(dataset), 2000)), 0)["images"]
        return [image.numpy().tobytes() for image in images]

    return pixels


ITEMS: dict[str, Callable[[Split], list[Hashable]]] = {
    "pairs": paired,
    "names": lambda split: [" ".join(words) for words, _ in tagged_sentences(split, 1000)],
    "purchases": lambda split: [(q.context, q.question) for q in questions(split, 400)],
    "subjects": lambda split: [" ".join(texts) for texts, _ in summaries(split, 400)],
    "numbers": lambda split: list(number_pairs(split, 400)[0]),
    "reverse": lambda split: list(reversal_pairs(split, 400)[0]),
    "packages": lambda split: [text for text, _ in package_chunks(split)],
    "order": lambda split: [(first, second) for first, second, _ in ordered_chunks(split)],
    "subjects as text": lambda split: [file.text for file in subject_text(split)],
    "digits": pixels_of("digits"),
    "shapes": pixels_of("segmentation"),
}


@pytest.mark.parametrize(
    "name",
    # scikit-learn and all images take seconds.
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("digits", "shapes"))) for n in ITEMS],
)
def test_nothing_held_out_is_in_training(name: str) -> None:
    train, held_out = set(ITEMS[name]("train")), set(ITEMS[name]("eval"))
    assert len(held_out) > 40
    assert not train & held_out


def test_the_standard_library_is_text_and_held_out_whole() -> None:
    train, held_out = source_files("train"), source_files("eval")
    assert not {file.name for file in train} & {file.name for file in held_out}
    assert sum(len(file.text) for file in train) > 2_000_000
    assert sum(len(file.text) for file in held_out) > 100_000
    names = [f"/{file.name}" for file in train]
    assert not any("/test/" in name or "site-packages" in name for name in names)
    some = stdlib_text("train", 50_000)
    size = sum(len(file.text.encode()) for file in some)
    assert 50_000 <= size < 50_000 + len(some[-1].text.encode())


def test_packages_are_told_apart_by_files_of_both_splits() -> None:
    train, held_out = package_chunks("train"), package_chunks("eval")
    assert {package for _, package in train} == {package for _, package in held_out}
    assert not any(
        "import " in line
        for text, _ in train
        for line in text.splitlines()
        if line.startswith(("import", "from"))
    )


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_embedded_text_trains_and_evaluates_alike(tokenizer: str) -> None:
    params: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": 300,
        "embedded_bytes": 30_000,
        "max_sequence_length": 64,
    }
    train, held_out = (build_dataset("causal_lm", params, split) for split in ("train", "eval"))
    assert train.info.vocab_size == held_out.info.vocab_size
    batch = train.batch(np.arange(4), 0)
    assert (batch["labels"][:, :-1] == batch["input_ids"][:, 1:]).all()
    assert (batch["labels"][:3, -1] == batch["input_ids"][1:, 0]).all()
    assert train.info.tokenizer is not None
    text = "".join(train.info.tokenizer.decode(row) for row in batch["input_ids"].numpy())
    assert text[:200] in stdlib_text("train", 30_000)[0].text
    assert train.info.bytes_per_token == pytest.approx(1.0 if tokenizer == "byte" else 2.0, rel=0.3)


def test_an_unknown_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="embedded") as caught:
        build_dataset("masked_lm", {"embedded": "subject"}, "train")
    assert "did you mean `subjects`?" in str(caught.value)


@pytest.mark.slow
def test_embedded_tasks_are_not_their_majority() -> None:
    for task in ("classification", "token_classification", "summarization"):
        info = build_dataset(task, {"tokenizer": "byte", "max_sequence_length": 64}, "eval").info
        assert info.majority_share < 0.75
        assert info.num_classes >= 2

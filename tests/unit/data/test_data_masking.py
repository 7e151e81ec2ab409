"""Masking and sentence pairs against what they promise, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openwafer.data import build_dataset
from openwafer.data.masking import MaskingRule, mask_batch
from openwafer.data.sentence_pairs import chunk_sentences, fit_lengths
from openwafer.data.tokenizers import ByteTokenizer, WordTokenizer

VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"w{n}" for n in range(20)),
    *(f"##c{n}" for n in range(10)),
]
TOKENIZER = WordTokenizer(VOCAB)


@given(
    rows=st.lists(
        st.lists(st.integers(2, len(VOCAB) - 1), min_size=1, max_size=18), min_size=1, max_size=5
    ),
    probability=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    most=st.integers(1, 6),
    whole_word=st.booleans(),
    seed=st.integers(0, 5),
)
@example(rows=[[5, 25, 2, 25]], probability=0.0, most=1, whole_word=True, seed=0)
def test_masks_are_what_they_promise(
    rows: list[list[int]], probability: float, most: int, whole_word: bool, seed: int
) -> None:
    rule = MaskingRule(
        TOKENIZER, probability=probability, max_predictions=most, whole_word=whole_word
    )
    ids = np.zeros((len(rows), 20), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    masked = mask_batch(ids, lengths, rule, np.arange(len(rows)), seed)
    for number, row in enumerate(rows):
        count = int(masked.mask[number].sum())
        positions = masked.positions[number, :count].tolist()
        candidates = [p for p, token in enumerate(row) if token > 4]
        target = min(most, max(1, round(len(row) * probability)), len(candidates))
        assert masked.mask[number].tolist() == [1] * count + [0] * (most - count)
        assert positions == sorted(set(positions))
        assert set(positions) <= set(candidates)
        assert masked.labels[number].tolist() == [row[p] for p in positions] + [0] * (most - count)
        if whole_word:
            words = slow_word_numbers(row)
            sizes = [words.count(n) for n in words]
            if any(sizes[p] <= most for p in candidates):
                # Whole words, and no more begun once there were enough.
                assert all(
                    positions.count(p)
                    for p in candidates
                    if words[p] in {words[q] for q in positions}
                )
                assert count <= most
        else:
            assert count == target
        assert (count > 0) == bool(candidates)
        untouched = [p for p in range(20) if p not in positions]
        assert (masked.input_ids[number, untouched] == ids[number, untouched]).all()
        assert all(int(t) >= 4 for t in masked.input_ids[number, positions])


def slow_word_numbers(row: list[int]) -> list[int]:
    numbers: list[int] = []
    for place, token in enumerate(row):
        begins = (
            place == 0 or token <= 4 or row[place - 1] <= 4 or not VOCAB[token].startswith("##")
        )
        numbers.append(numbers[-1] + 1 if numbers and begins else numbers[-1] if numbers else 0)
    return numbers


def test_eighty_ten_ten_and_every_position() -> None:
    rule = MaskingRule(TOKENIZER, probability=0.25, max_predictions=8)
    ids = np.full((4000, 32), 7, dtype=np.int64)
    ids[:, 0] = TOKENIZER.ids.cls
    masked = mask_batch(ids, np.full(4000, 32), rule, np.arange(4000), 1)
    new = masked.input_ids[np.arange(4000)[:, None], masked.positions].ravel()
    share = {"mask": (new == 4).mean(), "same": (new == 7).mean()}
    # A random token is the same one in 1 of 30 cases.
    assert share["mask"] == pytest.approx(0.8, abs=0.01)
    assert share["same"] == pytest.approx(0.1 + 0.1 / 30, abs=0.01)
    others = np.bincount(new, minlength=len(VOCAB))
    assert others[:4].sum() == 0
    assert (others[5:] > 0).all()
    counts = np.bincount(masked.positions.ravel(), minlength=32)
    assert counts[0] == 0
    expected = 4000 * 8 / 31
    assert np.abs(counts[1:] - expected).max() < 6 * np.sqrt(expected)


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    most=st.integers(1, 12),
)
def test_runs_of_sentences(lengths: list[list[int]], most: int) -> None:
    """Against the obvious loop."""
    flat = [n for document in lengths for n in document]
    sentences = np.cumsum([0, *flat])
    documents = np.cumsum([0, *(sum(document) for document in lengths)])
    runs, owners = chunk_sentences(sentences, documents, most)
    expected: list[tuple[int, int]] = []
    owner: list[int] = []
    first = 0
    for number, document in enumerate(lengths):
        run, size = [], 0
        for place, length in enumerate(document):
            if run and size + length > most:
                expected.append((run[0], run[-1] + 1))
                owner.append(number)
                run, size = [], 0
            run.append(first + place)
            size += length
        expected.append((run[0], run[-1] + 1))
        owner.append(number)
        first += len(document)
    assert [tuple(run) for run in runs.tolist()] == expected
    assert owners.tolist() == owner


@given(first=st.integers(1, 50), second=st.integers(1, 50), room=st.integers(2, 60))
def test_two_parts_fit(first: int, second: int, room: int) -> None:
    kept = fit_lengths(first, second, room)
    assert 1 <= kept[0] <= first
    assert 1 <= kept[1] <= second
    assert sum(kept) == min(room, first + second)


@pytest.fixture(scope="module")
def pairs(texts: Path) -> Any:
    params = {
        "data_dir": str(texts),
        "tokenizer": "wordpiece",
        "vocab_size": 200,
        "max_sequence_length": 48,
        "max_predictions_per_seq": 6,
    }
    return build_dataset("masked_lm", params, "train")


def test_next_sentences_are_next_and_others_are_from_elsewhere(pairs: Any, texts: Path) -> None:
    tokenizer = pairs.info.tokenizer
    documents = [tokenizer.decode(tokenizer.encode(p.read_text())) for p in sorted(texts.iterdir())]
    count = 4 * len(pairs)
    indices = np.tile(np.arange(len(pairs)), 4)
    found = [pairs.sequences(indices[:count], seed) for seed in range(4)]
    random_share = np.mean([np.mean(f.is_random_next) for f in found])
    assert 0.4 < random_share < 0.75  # runs of one sentence always get a random one
    sequences = found[0]
    for row in range(len(pairs)):
        length = int(sequences.lengths[row])
        middle = int(np.argmax(sequences.segments[row])) if sequences.segments[row].any() else 0
        first = tokenizer.decode(sequences.ids[row, 1 : middle - 1])
        second = tokenizer.decode(sequences.ids[row, middle : length - 1])
        homes = [number for number, text in enumerate(documents) if first in text]
        assert homes
        together = any(f"{first} {second}" in documents[n] for n in homes)
        if not sequences.is_random_next[row]:
            assert together
        assert sequences.ids[row, length:].sum() == 0
        assert sequences.segments[row].tolist() == [0] * middle + [1] * (length - middle) + [0] * (
            48 - length
        )


def test_the_length_does_not_tell_which_sentences_are_next(pairs: Any) -> None:
    indices = np.arange(len(pairs))
    found = [pairs.sequences(indices, seed) for seed in range(20)]
    is_random = np.concatenate([f.is_random_next for f in found]) == 1
    lengths = np.concatenate([f.lengths for f in found])
    gap = lengths[is_random].mean() - lengths[~is_random].mean()
    assert abs(gap) < 0.5 * lengths.std()


def test_the_name_of_the_configurations_is_read(texts: Path) -> None:
    params = {"data_dir": str(texts), "tokenizer": "byte", "max_sequence_length": 64}
    both = [{"mask_whole_word": True}, {"whole_word_masking": True}, {}]
    found = [
        build_dataset("masked_lm", {**params, **more}, "train").batch([0, 1], 3) for more in both
    ]
    positions = [batch["masked_lm_positions"].tolist() for batch in found]
    assert positions[0] == positions[1] != positions[2]


def test_batches_of_bert_and_roberta(pairs: Any, texts: Path) -> None:
    batch = pairs.example_batch(3)
    assert list(batch) == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "next_sentence_label",
        "masked_lm_positions",
        "masked_lm_mask",
        "labels",
    ]
    assert batch["labels"].shape == (3, 6)
    assert batch["next_sentence_label"].shape == (3, 1)
    params = {
        "data_dir": str(texts),
        "tokenizer": "byte",
        "disable_nsp": True,
        "gather_mlm_labels": False,
    }
    dataset = build_dataset("masked_lm", params, "train")
    spread = dataset.batch([1, 2], 5)
    assert spread["labels"].shape == spread["masked_lm_mask"].shape == (2, 128)
    gathered = build_dataset("masked_lm", {**params, "gather_mlm_labels": True}, "train").batch(
        [1, 2], 5
    )
    for row in range(2):
        places = gathered["masked_lm_positions"][row][gathered["masked_lm_mask"][row] == 1]
        assert spread["masked_lm_mask"][row].nonzero().flatten().tolist() == places.tolist()
        assert (spread["labels"][row][places] == gathered["labels"][row][: len(places)]).all()
    tokens = ByteTokenizer()
    assert (gathered["input_ids"][:, 0] == tokens.ids.cls).all()
    assert (gathered["input_ids"][:, -1] == tokens.ids.sep).all()

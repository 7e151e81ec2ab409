"""Tokenizers: nothing is lost, words are words, files are read or refused with their place."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openwafer.data.subwords import SubwordTokenizer, train_bpe, train_wordpiece
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import ByteTokenizer, Tokenizer, WordTokenizer
from openwafer.errors import ConfigError, DataError

LINES = [f"the {word} of unhappy cats, walking {word}s" for word in ("king", "queen", "song")] * 9
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return train_bpe(LINES, 300)


@pytest.fixture(scope="module")
def wordpiece() -> SubwordTokenizer:
    return train_wordpiece(LINES, 60)


@given(text=TEXTS)
@example(text="a\u00e9\u6f22\U0001f600")
def test_bytes_lose_nothing(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == [byte + 5 for byte in text.encode()]
    for number, (begin, end) in zip(ids, offsets, strict=True):
        assert number - 5 in text[begin:end].encode()


@given(text=TEXTS)
def test_bpe_loses_nothing(text: str, bpe: SubwordTokenizer) -> None:
    assert bpe.decode(bpe.encode(text)) == text


def test_lower_case_keeps_offsets_of_the_given_text() -> None:
    text = "A\u0130B"  # its lower case has one character more
    ids, offsets = ByteTokenizer(do_lower=True).encode_with_offsets(text)
    assert ByteTokenizer().decode(ids) == text.lower()
    assert offsets[-1].tolist() == [2, 3]


def test_special_tokens_are_known_and_never_encoded(
    bpe: SubwordTokenizer, wordpiece: SubwordTokenizer
) -> None:
    for tokenizer in (ByteTokenizer(), bpe, wordpiece):
        present = tokenizer.ids.present()
        assert not set(tokenizer.encode("the king").tolist()) & set(present)
        for name in ("pad", "unk", "cls", "sep", "mask", "eos"):
            assert 0 <= tokenizer.need(name) < tokenizer.vocab_size
    with pytest.raises(ConfigError, match="mask"):
        WordTokenizer(["<pad>", "a"]).need("mask")


def test_training_is_the_same_again(bpe: SubwordTokenizer, wordpiece: SubwordTokenizer) -> None:
    assert train_bpe(LINES, 300).tokens() == bpe.tokens()
    assert train_wordpiece(LINES, 60).tokens() == wordpiece.tokens()


def test_saved_and_sent_away(tmp_path: Path, bpe: SubwordTokenizer) -> None:
    text = "The kings, walking."
    for number, tokenizer in enumerate(
        (
            bpe,
            train_wordpiece(LINES, 60),
            ByteTokenizer(do_lower=True),
            WordTokenizer(["[UNK]", "The"]),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer.save(folder)
        for copy in (load_tokenizer(folder), pickle.loads(pickle.dumps(tokenizer))):
            assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
            assert (copy.vocab_size, copy.ids) == (tokenizer.vocab_size, tokenizer.ids)


def slow_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text's words by its characters: letters and digits together, everything else alone or
    with the space before it."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    starts = tokenizer.word_starts(ids)
    words: list[str] = []
    for start, (begin, end) in zip(starts, offsets, strict=True):
        words = [*words, ""] if start else words
        words[-1] += text[begin:end]
    return words


def test_words_of_tokens(bpe: SubwordTokenizer, wordpiece: SubwordTokenizer) -> None:
    text = "the unhappy-kings walk2 (queens)"
    for tokenizer in (ByteTokenizer(), bpe, wordpiece):
        words = [word.strip() for word in slow_words(tokenizer, text) if word.strip()]
        assert words == ["the", "unhappy", "-", "kings", "walk2", "(", "queens", ")"]


def test_wordpiece_from_its_list(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nwalk\n##ing\nKing\n")
    ids = load_tokenizer(path).encode("walking king")
    assert ids.tolist() == [5, 6, 1]
    assert load_tokenizer(path, do_lower=True).encode("WALK").tolist() == [5]


def test_gpt2_files(tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    with pytest.raises(DataError, match="merges"):
        load_tokenizer(path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("aba").tolist() == [2, 0]
    assert tokenizer.ids.eos == 3


def test_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[UNK]\na\nb\na\n")
    with pytest.raises(DataError, match="twice") as caught:
        load_tokenizer(path)
    assert caught.value.where == f"{path}:4"
    path.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"\[UNK\]"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="not in the vocabulary"):
        WordTokenizer(["a"]).encode("a b")
    broken = tmp_path / "tokenizer.json"
    for content in ("{", '{"model": {"type": "nonsense"}}'):
        broken.write_text(content)
        with pytest.raises(DataError, match="not a tokenizer file"):
            load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ConfigError, match="too small"):
        train_bpe(LINES, 100)


def test_words_of_a_list() -> None:
    tokenizer = WordTokenizer(["[PAD]", "[UNK]", "walk", "##ing", "on"])
    assert tokenizer.encode(" walk ##ing  far").tolist() == [2, 3, 1]
    assert tokenizer.decode(np.array([0, 2, 3, 4])) == "walking on"
    assert tokenizer.word_starts(np.array([3, 2, 3, 4])).tolist() == [True, True, False, True]
    ids, offsets = tokenizer.encode_with_offsets("on walk")
    assert ids.tolist() == [4, 2]
    assert offsets.tolist() == [[0, 2], [3, 7]]

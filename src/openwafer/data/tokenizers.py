"""Tokenizers: from text to numbers and back.

Decides the interface, and the two tokenizers without a dependency (bytes; words of a given list).
The subword ones are in subwords.py; which one a name or a file means is decided in
tokenizer_files.py.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.errors import ConfigError, DataError

__all__ = [
    "ByteTokenizer",
    "SpecialIds",
    "Tokenizer",
    "WordTokenizer",
    "find_special_ids",
    "read_vocab",
]

Ids = npt.NDArray[np.int32]

_SPECIAL_NAMES: dict[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
    "unk": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls": ("[CLS]", "<s>", "<|endoftext|>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "[SEP]", "<|endoftext|>"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialIds:
    """The numbers of the special tokens; -1 for one that the vocabulary has not."""

    pad: int = -1
    unk: int = -1
    cls: int = -1
    sep: int = -1
    mask: int = -1
    bos: int = -1
    eos: int = -1

    def present(self) -> tuple[int, ...]:
        names = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
        return tuple(sorted({getattr(self, name) for name in names} - {-1}))


class Tokenizer(ABC):
    """Text to token numbers. `ids` are the special tokens' numbers, which encoding never adds."""

    kind: str
    vocab_size: int
    ids: SpecialIds

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The text's token numbers, int32."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Token numbers [n] and where each begins and ends in the text, in characters [n, 2]."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of these tokens, special ones left out."""

    @abstractmethod
    def word_starts(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which tokens begin a word, in sequences along the last dimension."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` reads."""

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def need(self, name: str) -> int:
        """The number of a special token.

        Raises:
            ConfigError: the vocabulary has none.
        """
        number = getattr(self.ids, name)
        if number < 0:
            raise ConfigError(
                f"the {self.kind} tokenizer has no {name} token",
                allowed=f"a vocabulary with one of {', '.join(_SPECIAL_NAMES[name])}",
                hint="the tokenizers that `openwafer prepare text` trains have all of them",
            )
        return number


def find_special_ids(vocab: Mapping[str, int]) -> SpecialIds:
    """The special tokens of a vocabulary, by their customary names."""
    found = {
        role: next((vocab[name] for name in names if name in vocab), -1)
        for role, names in _SPECIAL_NAMES.items()
    }
    return SpecialIds(**found)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: 0 pad, 1 eos and sep, 2 unk, 3 bos and cls, 4 mask, byte b is b + 5."""

    kind = "byte"
    first = 5

    def __init__(self, *, do_lower: bool = False) -> None:
        self.vocab_size = 256 + self.first
        self.ids = SpecialIds(pad=0, eos=1, sep=1, unk=2, bos=3, cls=3, mask=4)
        self._do_lower = do_lower
        alone = np.arange(self.vocab_size) - self.first
        self._in_word = np.array([b >= 128 or (b >= 0 and chr(b).isalnum()) for b in alone])

    def encode(self, text: str) -> Ids:
        text = text.lower() if self._do_lower else text
        data = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)
        return data.astype(np.int32) + self.first

    def encode_with_offsets(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        sizes = np.array([len(c.encode("utf-8", "replace")) for c in text], dtype=np.int64)
        # Lower case may change a character's number of bytes; offsets are of the text as given.
        parts = [self.encode(character) for character in text] if self._do_lower else None
        if parts is not None:
            sizes = np.array([len(part) for part in parts], dtype=np.int64)
        character = np.repeat(np.arange(len(text), dtype=np.int64), sizes)
        ids = self.encode(text) if not parts else np.concatenate(parts)
        return ids, np.stack([character, character + 1], axis=1)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        numbers = np.asarray(ids, dtype=np.int64) - self.first
        kept = numbers[(numbers >= 0) & (numbers < 256)]
        return kept.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def word_starts(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return joined_word_starts(self._in_word, self._in_word, ids)

    def save(self, folder: Path) -> None:
        content = {"type": "byte", "do_lower": self._do_lower}
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


class WordTokenizer(Tokenizer):
    """Words between spaces, by their line in a list; text that is tokenized already."""

    kind = "words"

    def __init__(self, words: Sequence[str], *, do_lower: bool = False) -> None:
        self._words = list(words)
        self._number = {word: number for number, word in enumerate(self._words)}
        self._do_lower = do_lower
        self.vocab_size = len(self._words)
        self.ids = find_special_ids(self._number)
        special = set(self.ids.present())
        self._decoded = [n not in special for n in range(self.vocab_size)]
        self._continues = np.array([word.startswith("##") for word in self._words], dtype=bool)

    def words(self) -> list[str]:
        """All words, by number."""
        return list(self._words)

    def numbers(self, words: Sequence[str]) -> Ids:
        """The numbers of words that were separated already."""
        unknown = self.ids.unk
        known = (self._number.get(word, unknown) for word in words)
        ids = np.fromiter(known, dtype=np.int32, count=len(words))
        if unknown < 0 and (ids < 0).any():
            raise DataError(
                f"the word {words[int(np.argmin(ids))]!r} is not in the vocabulary",
                allowed="its words, or any word where it has an [UNK] or <unk>",
            )
        return ids

    def encode(self, text: str) -> Ids:
        return self.numbers((text.lower() if self._do_lower else text).split())

    def encode_with_offsets(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        offsets: list[tuple[int, int]] = []
        position = 0
        for word in text.split():
            position = text.index(word, position)
            offsets.append((position, position + len(word)))
            position += len(word)
        return self.encode(text), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        numbers = [int(number) for number in ids]
        kept = (n for n in numbers if 0 <= n < self.vocab_size and self._decoded[n])
        return " ".join(self._words[number] for number in kept).replace(" ##", "")

    def word_starts(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        starts = ~self._continues[ids]
        starts[..., 0] = True
        return starts

    def save(self, folder: Path) -> None:
        content = {"type": "words", "do_lower": self._do_lower, "words": self._words}
        text = json.dumps(content, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def joined_word_starts(
    joins_left: npt.NDArray[np.bool_], joins_right: npt.NDArray[np.bool_], ids: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """A token goes on with a word where it may join the one before, which may join the next."""
    starts = np.ones(ids.shape, dtype=bool)
    starts[..., 1:] = ~(joins_left[ids[..., 1:]] & joins_right[ids[..., :-1]])
    return starts


def read_vocab(path: Path) -> list[str]:
    """The tokens of a vocabulary file, one a line.

    Raises:
        DataError: it cannot be read as text, is empty, or has a token twice.
    """
    try:
        words = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the vocabulary cannot be read: {error}", where=str(path)) from error
    words = [word.rstrip("\r") for word in words]
    while words and not words[-1]:
        words.pop()
    if not words:
        raise DataError("the vocabulary is empty", where=str(path), allowed="one token a line")
    first: dict[str, int] = {}
    for line, word in enumerate(words, start=1):
        if word in first:
            raise DataError(
                f"the token {word!r} is there twice",
                where=f"{path}:{line}",
                allowed="each token once",
                hint=f"it is on line {first[word]} too",
            )
        first[word] = line
    return words

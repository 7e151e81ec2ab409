"""Subword tokenizers, by the `tokenizers` library (extra `zoo`).

Decides which models, normalizers and special tokens are taken, and how tokens make words. The
library does the work: byte-level BPE as GPT-2 has it, WordPiece as BERT has it, both trained on
the user's text or read from files.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from openwafer.data.tokenizers import (
    Ids,
    Tokenizer,
    WordTokenizer,
    find_special_ids,
    joined_word_starts,
)
from openwafer.errors import ConfigError, DataError

__all__ = [
    "SubwordTokenizer",
    "bpe_from_files",
    "from_tokenizer_json",
    "train_bpe",
    "train_wordpiece",
    "vocabulary_words",
    "wordpiece_from_vocab",
]

_BPE_SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "<mask>", "<|endoftext|>")
_WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_THREADS = "TOKENIZERS_PARALLELISM"
_OFF = "off"  # not `false`, which a user may have set
_MIN_WORDPIECE, _MAX_ALPHABET = 32, 400


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "this tokenizer needs the tokenizers library",
            hint='pip install "openwafer[zoo]", or tokenizer: byte',
        ) from error
    # Its threads do not live on in forked processes, such as a DataLoader's, and using them there
    # would wait for ever. They are for training, here; `prepare` has processes of its own.
    os.environ.setdefault(_THREADS, _OFF)
    return tokenizers


@contextmanager
def _threads() -> Generator[None, None, None]:
    """Let the library use all cores a while, unless the user decided otherwise."""
    before = os.environ.get(_THREADS)
    if before == _OFF:
        os.environ[_THREADS] = "true"
    try:
        yield
    finally:
        os.environ[_THREADS] = before or _OFF


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        engine: a `tokenizers.Tokenizer`; padding, truncation and added special tokens are off.
        kind: `bpe` or `wordpiece`, for messages.
    """

    def __init__(self, engine: Any, *, kind: str) -> None:
        self._engine = engine
        engine.no_padding()
        engine.no_truncation()
        self.kind = kind
        vocab: dict[str, int] = engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.ids = find_special_ids(vocab)
        self._joins_left, self._joins_right = _joining(vocab, self.vocab_size, self.ids.present())

    def tokens(self) -> list[str]:
        """All tokens, by number."""
        return [self._engine.id_to_token(number) or "" for number in range(self.vocab_size)]

    def encode(self, text: str) -> Ids:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        found = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_with_offsets(self, text: str) -> tuple[Ids, npt.NDArray[np.int64]]:
        encoding = self._engine.encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.int32), offsets

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return self._engine.decode([int(number) for number in ids], skip_special_tokens=True)

    def word_starts(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return joined_word_starts(self._joins_left, self._joins_right, ids)

    def save(self, folder: Path) -> None:
        self._engine.save(str(folder / "tokenizer.json"), pretty=False)

    # The library's object is rebuilt from its text in another process.
    def __getstate__(self) -> dict[str, Any]:
        return {"text": self._engine.to_str(), "kind": self.kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        engine = _library().Tokenizer.from_str(state["text"])
        SubwordTokenizer.__init__(self, engine, kind=state["kind"])


def _joining(
    vocab: dict[str, int], size: int, special: Sequence[int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which tokens may go on with the word before them, and which the next may go on with.

    WordPiece says it (`##`); in the others a word begins after a space (the signs that stand for
    one) and where letters or digits follow something else.
    """
    left, right = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    wordpiece = any(token.startswith("##") for token in vocab)
    for token, number in vocab.items():
        if number in special:
            continue
        if wordpiece:
            left[number], right[number] = token.startswith("##"), True
        else:
            left[number] = _is_letter(token[0])
            right[number] = _is_letter(token[-1])
    return left, right


def _is_letter(sign: str) -> bool:
    """In byte-level BPE's alphabet, in which a space is Ġ and a line's end Ċ."""
    return sign.isalnum() and sign not in "ĠĊĉč"


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE, trained on the spot: any text can be encoded, nothing is unknown.

    Raises:
        ConfigError: the vocabulary is smaller than the bytes and the special tokens.
    """
    smallest = 256 + len(_BPE_SPECIAL)
    if vocab_size < smallest:
        raise ConfigError(
            f"a byte-level BPE vocabulary of {vocab_size} is too small",
            allowed=f"at least {smallest}: 256 bytes and {len(_BPE_SPECIAL)} special tokens",
            hint="tokenizer: byte needs no more than 261",
        )
    library = _library()
    engine = library.Tokenizer(library.models.BPE())
    _byte_level(library, engine)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_BPE_SPECIAL),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _threads():
        engine.train_from_iterator(texts, trainer=trainer)
    return SubwordTokenizer(engine, kind="bpe")


def _byte_level(library: ModuleType, engine: Any) -> None:
    engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = library.decoders.ByteLevel()


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, do_lower: bool = True
) -> SubwordTokenizer:
    """WordPiece as BERT has it, trained on the spot; the same vocabulary on every machine.

    Raises:
        ConfigError: the vocabulary is too small for the special tokens and some characters.
    """
    if vocab_size < _MIN_WORDPIECE:
        raise ConfigError(
            f"a WordPiece vocabulary of {vocab_size} is too small",
            allowed=f"at least {_MIN_WORDPIECE}",
        )
    library = _library()
    engine = _bert(library, library.models.WordPiece(unk_token="[UNK]"), do_lower=do_lower)
    documents = list(texts)
    alphabet = _alphabet(engine, documents, limit=min(_MAX_ALPHABET, vocab_size // 4))
    # The library numbers what it finds in the order of a hash map, and breaks ties by number;
    # tokens that are given first have their numbers.
    first = [*_WORDPIECE_SPECIAL, *alphabet, *(f"##{c}" for c in alphabet if _is_inside_words(c))]
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    with _threads():
        engine.train_from_iterator(documents, trainer=trainer)
    vocab: dict[str, int] = engine.get_vocab(with_added_tokens=True)
    return wordpiece_from_vocab(sorted(vocab, key=vocab.__getitem__), do_lower=do_lower)


def _alphabet(engine: Any, documents: Iterable[str], *, limit: int) -> list[str]:
    """The most frequent characters of the normalized text, sorted."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(engine.normalizer.normalize_str(document))
    found = [character for character in counts if not character.isspace()]
    found.sort(key=lambda character: (-counts[character], character))
    return sorted(found[:limit])


def _is_inside_words(character: str) -> bool:
    """Punctuation is a word of its own, in BERT's sense: all of ASCII's signs are."""
    ascii_sign = character.isascii() and not character.isalnum()
    return not ascii_sign and not unicodedata.category(character).startswith("P")


def wordpiece_from_vocab(words: Sequence[str], *, do_lower: bool) -> SubwordTokenizer:
    """BERT's tokenizer from its list of tokens.

    Raises:
        DataError: the list has no [UNK].
    """
    if "[UNK]" not in words:
        raise DataError(
            "the vocabulary has no [UNK]",
            allowed="a WordPiece vocabulary: one token a line, with [UNK], [CLS], [SEP], [MASK]",
        )
    library = _library()
    vocab = {word: number for number, word in enumerate(words)}
    model = library.models.WordPiece(vocab=vocab, unk_token="[UNK]")
    engine = _bert(library, model, do_lower=do_lower)
    engine.add_special_tokens([word for word in _WORDPIECE_SPECIAL if word in vocab])
    return SubwordTokenizer(engine, kind="wordpiece")


def _bert(library: ModuleType, model: Any, *, do_lower: bool) -> Any:
    engine = library.Tokenizer(model)
    engine.normalizer = library.normalizers.BertNormalizer(lowercase=do_lower)
    engine.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    engine.decoder = library.decoders.WordPiece()
    return engine


def from_tokenizer_json(path: Path) -> SubwordTokenizer:
    """A tokenizer.json of the library, whatever its model.

    Raises:
        DataError: the library cannot read it.
    """
    engine = _reading(path, lambda: _library().Tokenizer.from_file(str(path)))
    kind = type(engine.model).__name__.lower()
    return SubwordTokenizer(engine, kind="wordpiece" if kind == "wordpiece" else kind)


def bpe_from_files(path: Path) -> SubwordTokenizer:
    """Byte-level BPE from `vocab.json` or `encoder.json`, with its merges beside it.

    Raises:
        DataError: the merges are missing, or the library cannot read the files.
    """
    names = ("merges.txt", "vocab.bpe", *sorted(p.name for p in path.parent.glob("*.bpe")))
    merges = next((path.parent / name for name in names if (path.parent / name).is_file()), None)
    if merges is None:
        raise DataError(
            "a BPE vocabulary needs its merges",
            where=str(path),
            allowed="merges.txt or vocab.bpe in the same folder, or one tokenizer.json",
        )
    library = _library()

    def build() -> Any:
        engine = library.Tokenizer(library.models.BPE.from_file(str(path), str(merges)))
        _byte_level(library, engine)
        return engine

    return SubwordTokenizer(_reading(path, build), kind="bpe")


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConfigError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"not a tokenizer file: {error}", where=str(cast(object, path))) from error


def vocabulary_words(tokenizer: Tokenizer) -> list[str]:
    """The tokens as words that a vocabulary file can list, by number.

    Raises:
        ConfigError: they are no words.
    """
    if isinstance(tokenizer, WordTokenizer):
        return tokenizer.words()
    if isinstance(tokenizer, SubwordTokenizer) and tokenizer.kind == "wordpiece":
        return tokenizer.tokens()
    raise ConfigError(
        f"this layout of BERT holds words, not {tokenizer.kind} tokens",
        where="tokenizer",
        allowed="wordpiece, or a vocabulary file",
    )

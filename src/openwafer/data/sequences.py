"""What the fine-tuning tasks have in common: cls, a text, sep, perhaps another text, sep.

Decides how two texts are cut to fit, the batch entries that an encoder takes, and which tokenizer
the section means. Does not decide labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.cache import cached_folder
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.ragged import Ragged
from openwafer.data.sentence_pairs import fit_lengths
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import Ids, Tokenizer

__all__ = ["ENCODER_KEYS", "EncoderRows", "joined", "task_tokenizer"]

ENCODER_KEYS: dict[str, Any] = {
    **COMMON_KEYS,
    "max_sequence_length": 128,
    "vocab_file": None,
    "vocab_size": None,
    "tokenizer": "wordpiece",
    "do_lower": True,
}
_VOCAB_SIZE = 2048


def joined(tokenizer: Tokenizer, length: int, first: Ids, second: Ids | None) -> tuple[Ids, int]:
    """The sequence of one or two texts, at most `length` tokens, and where the second begins."""
    cls, sep = [tokenizer.need("cls")], [tokenizer.need("sep")]
    if second is None:
        ids = np.concatenate([cls, first[: length - 2], sep])
        return ids.astype(np.int32), len(ids)
    sizes = fit_lengths(len(first), len(second), length - 3)
    ids = np.concatenate([cls, first[: sizes[0]], sep, second[: sizes[1]], sep])
    return ids.astype(np.int32), sizes[0] + 2


class EncoderRows:
    """Sequences with their segments, read as batches.

    Args:
        sequences: see `joined`.
        length: of the padded rows.
    """

    def __init__(self, sequences: Iterable[tuple[Ids, int]], length: int) -> None:
        rows = list(sequences)
        self._ids = Ragged(ids for ids, _ in rows)
        self._second = np.array([begin for _, begin in rows], dtype=np.int64)
        self._length = length

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, indices: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
        """input_ids, attention_mask, token_type_ids: [len(indices), length]."""
        ids, mask = self._ids.padded(indices, self._length)
        in_second = np.arange(self._length)[None, :] >= self._second[indices][:, None]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": in_second.astype(np.int64) * mask,
        }


def task_tokenizer(
    params: InputParams, training_texts: Callable[[], Iterable[str]], origin: object
) -> Tokenizer:
    """The tokenizer of a section: its vocabulary file; or one that is trained on the training texts
    (the same for both splits, and kept in the cache).

    origin: what the training texts are, in words or numbers that change when they do.
    """
    lower = params.flag("do_lower")
    name = params.text("vocab_file") or params.text("tokenizer") or "byte"
    if name not in ("bpe", "wordpiece"):
        return load_tokenizer(name, do_lower=lower)
    size = params.optional_integer("vocab_size", minimum=1) or _VOCAB_SIZE

    def make(folder: Path) -> None:
        from openwafer.data.subwords import train_bpe, train_wordpiece

        if name == "bpe":
            train_bpe(training_texts(), size).save(folder)
        else:
            train_wordpiece(training_texts(), size, do_lower=lower).save(folder)

    return load_tokenizer(cached_folder("tokenizer", (2, name, size, lower, origin), make))

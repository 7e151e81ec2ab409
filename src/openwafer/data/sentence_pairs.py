"""Pairs of sentences for BERT's next-sentence prediction.

Decides which sentences make a sequence, where it is cut in two, and when the second part is a
random one (Devlin et al., "BERT", 2018, section 3.1: half of the time). Does not mask.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from openwafer.data.keyed_random import keyed_uniforms
from openwafer.data.masked_dataset import MaskedDataset, MaskedOptions, Sequences, text_info
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import DataError

__all__ = ["SentencePairs", "chunk_sentences", "fit_lengths"]

_DRAW_PAIR = 111


def chunk_sentences(
    sentences: npt.NDArray[np.int64], documents: npt.NDArray[np.int64], max_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Runs of whole sentences of one document, each as long as fits.

    Args:
        sentences: where each sentence begins, and the number of tokens.
        documents: the same for documents; each begins with a sentence.
        max_tokens: of a run; a longer sentence is a run of its own.

    Returns:
        Runs [num, 2], first sentence and the one after the last; and the document of each [num].
    """
    first_of_document = np.searchsorted(sentences, documents)
    runs: list[tuple[int, int]] = []
    owners: list[int] = []
    fits = np.searchsorted(sentences, sentences[:-1] + max_tokens, side="right") - 1
    for document, (begin, end) in enumerate(
        zip(first_of_document[:-1].tolist(), first_of_document[1:].tolist(), strict=True)
    ):
        position = begin
        while position < end:
            stop = min(max(int(fits[position]), position + 1), end)
            runs.append((position, stop))
            owners.append(document)
            position = stop
    return np.array(runs, dtype=np.int64).reshape(-1, 2), np.array(owners, dtype=np.int64)


def fit_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two parts is kept so that both together fit: the longer one is cut."""
    if first + second > room:
        second = min(second, max(room - first, room // 2))
        first = min(first, room - second)
    return first, second


class SentencePairs(MaskedDataset):
    """cls, some sentences, sep, the next or random ones, sep."""

    def __init__(
        self, shards: TokenShards, tokenizer: Tokenizer, source: str, options: MaskedOptions
    ) -> None:
        self._shards = shards
        self._cls, self._sep = tokenizer.need("cls"), tokenizer.need("sep")
        self._room = options.max_sequence_length - 3
        self._starts = shards.starts("sentences")
        documents = shards.starts("documents")
        self._runs, owners = chunk_sentences(self._starts, documents, self._room)
        if len(self._runs) < 2:
            raise DataError(
                f"{len(self._runs)} pieces of text make no pairs of sentences",
                where=str(shards.folder),
                allowed="at least two pieces of max_sequence_length tokens",
            )
        counts = np.bincount(owners, minlength=len(documents) - 1)
        ends = np.cumsum(counts)
        self._own_begin, self._own_end = (ends - counts)[owners], ends[owners]
        super().__init__(text_info(shards, tokenizer, source), len(self._runs), options)

    def sequences(self, indices: npt.NDArray[np.int64], seed: int) -> Sequences:
        length = self.options.max_sequence_length
        ids = np.zeros((len(indices), length), dtype=np.int64)
        segments = np.zeros_like(ids)
        lengths = np.zeros(len(indices), dtype=np.int64)
        is_random = np.zeros(len(indices), dtype=np.int64)
        uniforms = keyed_uniforms(seed, indices, 3, draw=_DRAW_PAIR)
        for row, index in enumerate(indices.tolist()):
            first, second, random_next = self._pair(index, uniforms[row])
            middle, end = len(first) + 2, len(first) + len(second) + 3
            ids[row, 0], ids[row, middle - 1], ids[row, end - 1] = self._cls, self._sep, self._sep
            ids[row, 1 : middle - 1], ids[row, middle : end - 1] = first, second
            segments[row, middle:end] = 1
            lengths[row], is_random[row] = end, random_next
        return Sequences(ids, lengths, segments, is_random)

    def _pair(
        self, index: int, uniforms: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], bool]:
        begin, end = self._runs[index].tolist()
        cut = begin + 1 + int(uniforms[0] * (end - begin - 1))
        elsewhere = len(self._runs) - int(self._own_end[index] - self._own_begin[index])
        random_next = elsewhere > 0 and uniforms[1] < 0.5
        start, second_end = int(self._starts[begin]), int(self._starts[end])
        if end - begin == 1:
            # One sentence goes on with itself.
            border = start + max(1, (second_end - start) // 2)
        else:
            border = int(self._starts[cut])
        second_begin, second_size = border, second_end - border
        if random_next:
            other = int(uniforms[2] * elsewhere)
            if other >= self._own_begin[index]:
                other += int(self._own_end[index] - self._own_begin[index])
            second_begin, second_end = self._starts[self._runs[other]].tolist()
            # As long as the next sentences are, or the length would tell which they are.
            second_size = min(max(1, second_size), second_end - second_begin)
        first_size, second_size = fit_lengths(border - start, second_size, self._room)
        read = self._shards.read
        return read(start, first_size), read(second_begin, second_size), random_next

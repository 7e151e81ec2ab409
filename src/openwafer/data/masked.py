"""Masked language modelling: BERT (with next sentences) and RoBERTa (without).

Decides what a sequence is: a window of packed text, a pair of sentences (sentence_pairs.py), or a
row of the documented CSV layout (bert_csv.py). The batch is that of masked_dataset.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.bert_csv import build_bert_csv
from openwafer.data.csv_files import holds_csv
from openwafer.data.dataset import KeyedDataset
from openwafer.data.masked_dataset import (
    MaskedDataset,
    MaskedOptions,
    Sequences,
    read_options,
    text_info,
)
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.sentence_pairs import SentencePairs
from openwafer.data.sources import token_source
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import DataError

__all__ = ["KEYS", "MaskedWindows", "build"]

KEYS: dict[str, Any] = {
    **COMMON_KEYS,
    "max_sequence_length": 128,
    "max_predictions_per_seq": 20,
    "masked_lm_prob": 0.15,
    "mask_whole_word": False,
    "whole_word_masking": None,
    "disable_nsp": False,
    "gather_mlm_labels": True,
    "dynamic_mlm_scale": False,
    "vocab_file": None,
    "vocab_size": None,
    "tokenizer": "wordpiece",
    "do_lower": True,
}
_VOCAB_SIZE = 2048


class MaskedWindows(MaskedDataset):
    """RoBERTa's sequences: cls, a window of the packed text, sep; no next sentence."""

    def __init__(
        self, shards: TokenShards, tokenizer: Tokenizer, source: str, options: MaskedOptions
    ) -> None:
        self._shards = shards
        self._cls, self._sep = tokenizer.need("cls"), tokenizer.need("sep")
        self._window = options.max_sequence_length - 2
        num_items = shards.num_tokens // self._window
        if num_items == 0:
            raise DataError(
                f"{shards.num_tokens} tokens are not one sequence of {self._window}",
                where=str(shards.folder),
            )
        super().__init__(text_info(shards, tokenizer, source), num_items, options)

    def sequences(self, indices: npt.NDArray[np.int64], seed: int) -> Sequences:
        ids = np.empty((len(indices), self._window + 2), dtype=np.int64)
        ids[:, 0], ids[:, -1] = self._cls, self._sep
        for row, index in zip(ids, indices, strict=True):
            self._shards.read_into(row[1:-1], int(index) * self._window)
        return Sequences(ids, np.full(len(indices), ids.shape[1], dtype=np.int64))


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    paths = params.paths("data_dir")
    if holds_csv(paths):
        return build_bert_csv(params, paths)
    shards, tokenizer, source = token_source(params, paths, vocab_size=_VOCAB_SIZE)
    options = read_options(params, tokenizer)
    if params.flag("disable_nsp"):
        return MaskedWindows(shards, tokenizer, source, options)
    return SentencePairs(shards, tokenizer, source, options)

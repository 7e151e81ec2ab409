"""Masked language modelling: BERT (with next sentences) and RoBERTa (without).

Decides the batch that both take, and what a sequence is: a window of packed text, a pair of
sentences, or a row of the documented CSV layout. The draws are in masking.py, the pairs in
sentence_pairs.py, the CSV layouts in csv_files.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openwafer.data.csv_files import holds_csv
from openwafer.data.dataset import Batch, DataInfo, Item, KeyedDataset
from openwafer.data.masking import MaskingRule, mask_batch
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.sources import token_source
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import DataError

__all__ = ["KEYS", "MaskedDataset", "MaskedOptions", "MaskedWindows", "Sequences", "build"]

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


@dataclass(frozen=True, slots=True)
class Sequences:
    """A batch before masking: ids [batch, seq], padded with zeros on the right; lengths [batch];
    and, where there are two segments, segments [batch, seq] and is_random_next [batch]."""

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64] | None = None
    is_random_next: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedOptions:
    """gather: labels and masks at the masked positions only, [batch, max_predictions]; otherwise
    [batch, seq]. dynamic_scale: also `mlm_loss_scale`."""

    max_sequence_length: int
    rule: MaskingRule
    gather: bool = True
    dynamic_scale: bool = False
    with_ids: bool = False


class MaskedDataset(KeyedDataset):
    """What all masked language modelling data have in common: the batch."""

    def __init__(self, info: DataInfo, num_items: int, options: MaskedOptions) -> None:
        info = replace(info, max_sequence_length=options.max_sequence_length)
        super().__init__(info, num_items, with_ids=options.with_ids)
        self.options = options

    @abstractmethod
    def sequences(self, indices: npt.NDArray[np.int64], seed: int) -> Sequences:
        """The sequences of these items, not masked yet."""

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        found = self.sequences(indices, seed)
        masked = mask_batch(found.ids, found.lengths, self.options.rule, indices, seed)
        length = found.ids.shape[1]
        rows = {
            "input_ids": masked.input_ids,
            "attention_mask": (np.arange(length)[None, :] < found.lengths[:, None]).astype(
                np.int64
            ),
        }
        if found.segments is not None and found.is_random_next is not None:
            rows["token_type_ids"] = found.segments
            rows["next_sentence_label"] = found.is_random_next[:, None]
        if self.options.gather:
            rows["masked_lm_positions"] = masked.positions
            rows["masked_lm_mask"] = masked.mask
            rows["labels"] = masked.labels
        else:
            rows["masked_lm_mask"] = _spread(masked.positions, masked.mask, masked.mask, length)
            rows["labels"] = _spread(masked.positions, masked.mask, masked.labels, length)
        return rows

    def finish(self, batch: Batch) -> None:
        if self.options.dynamic_scale:
            add_mlm_scale(batch)


def add_mlm_scale(batch: Batch) -> None:
    """`mlm_loss_scale` [batch, 1]: samples for each masked token of the batch."""
    mask = batch["masked_lm_mask"]
    scale = len(mask) / max(1.0, float(mask.sum()))
    batch["mlm_loss_scale"] = torch.full((len(mask), 1), scale)


def _spread(
    positions: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    values: npt.NDArray[np.int64],
    length: int,
) -> npt.NDArray[np.int64]:
    """[batch, seq] with the values at their positions, zeros elsewhere."""
    out = np.zeros((len(positions), length), dtype=np.int64)
    rows, columns = np.nonzero(mask)
    out[rows, positions[rows, columns]] = values[rows, columns]
    return out


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


def text_info(shards: TokenShards, tokenizer: Tokenizer, source: str) -> DataInfo:
    """What is known of tokenized text."""
    return DataInfo(
        source=source,
        vocab_size=shards.vocab_size,
        bytes_per_token=shards.num_bytes / max(1, shards.num_tokens),
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
    )


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    paths = params.paths("data_dir")
    if holds_csv(paths):
        from openwafer.data.bert_csv import build_bert_csv

        return build_bert_csv(params, paths)
    shards, tokenizer, source = token_source(params, paths, vocab_size=_VOCAB_SIZE)
    options = read_options(params, tokenizer)
    if params.flag("disable_nsp"):
        return MaskedWindows(shards, tokenizer, source, options)
    from openwafer.data.sentence_pairs import SentencePairs

    return SentencePairs(shards, tokenizer, source, options)


def read_options(params: InputParams, tokenizer: Tokenizer) -> MaskedOptions:
    """The section's keys about masking."""
    return MaskedOptions(
        max_sequence_length=params.integer("max_sequence_length", minimum=8),
        rule=MaskingRule(
            tokenizer,
            probability=params.number("masked_lm_prob", minimum=0.0, maximum=1.0),
            max_predictions=params.integer("max_predictions_per_seq", minimum=1),
            # Release 1.6's own configurations have the second name, which its code did not read.
            whole_word=params.flag("whole_word_masking", default=params.flag("mask_whole_word")),
        ),
        gather=params.flag("gather_mlm_labels"),
        dynamic_scale=params.flag("dynamic_mlm_scale"),
        with_ids=params.split == "predict",
    )

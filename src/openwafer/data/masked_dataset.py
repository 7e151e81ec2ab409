"""What all masked language modelling data have in common.

Decides the batch that BERT and RoBERTa take, and its options. What a sequence is, is decided in
masked.py (windows of packed text), sentence_pairs.py and bert_csv.py; the draws are in masking.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openwafer.data.dataset import Batch, DataInfo, Item, KeyedDataset
from openwafer.data.masking import MaskingRule, mask_batch
from openwafer.data.params import InputParams
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizers import Tokenizer

__all__ = [
    "MaskedDataset",
    "MaskedOptions",
    "Sequences",
    "add_mlm_scale",
    "read_options",
    "spread",
    "text_info",
]


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
            rows["masked_lm_mask"] = spread(masked.positions, masked.mask, masked.mask, length)
            rows["labels"] = spread(masked.positions, masked.mask, masked.labels, length)
        return rows

    def finish(self, batch: Batch) -> None:
        if self.options.dynamic_scale:
            add_mlm_scale(batch)


def add_mlm_scale(batch: Batch) -> None:
    """`mlm_loss_scale` [batch, 1]: samples for each masked token of the batch."""
    mask = batch["masked_lm_mask"]
    scale = len(mask) / max(1.0, float(mask.sum()))
    batch["mlm_loss_scale"] = torch.full((len(mask), 1), scale)


def spread(
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


def text_info(shards: TokenShards, tokenizer: Tokenizer, source: str) -> DataInfo:
    """What is known of tokenized text."""
    return DataInfo(
        source=source,
        vocab_size=shards.vocab_size,
        bytes_per_token=shards.num_bytes / max(1, shards.num_tokens),
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
    )


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

"""What every dataset of this room is: items by number, and random numbers by key.

Decides that an item depends only on (its number, the seed of the epoch), how items become a batch,
how a last batch is filled up, and how a dataset describes itself to the model that it feeds. Does
not decide the order of an epoch (dataloader.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from openwafer.data.tokenizers import Tokenizer

__all__ = ["Batch", "BatchKey", "DataInfo", "Item", "ItemKey", "KeyedDataset", "as_it_is"]

Item = Mapping[str, npt.NDArray[Any]]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """What a model, a metric or a log line needs to know of a dataset.

    source: one line, what data these are.
    vocab_size: of the inputs, sentinels included; 0 where there are no tokens.
    tgt_vocab_size: of the targets where they have a vocabulary of their own.
    bytes_per_token: of the text that the tokens stand for, on average; 0 where unknown.
    majority_share: share of the most frequent label: what guessing it always would reach.
    image_shape: (channels, height, width).
    answers: of question answering: what knows the right answers' words (SquadMetric's `Answers`).
    """

    source: str
    vocab_size: int = 0
    tgt_vocab_size: int = 0
    max_sequence_length: int = 0
    tgt_max_sequence_length: int = 0
    num_classes: int = 0
    label_names: tuple[str, ...] = ()
    majority_share: float = 0.0
    image_shape: tuple[int, int, int] | None = None
    bytes_per_token: float = 0.0
    pad_id: int = 0
    tokenizer: Tokenizer | None = None
    answers: Any = None


@dataclass(frozen=True, slots=True)
class ItemKey:
    """An item of an epoch: its number (-1: a row that only fills a batch) and the epoch's seed."""

    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The items of one batch, and the epoch's seed."""

    indices: npt.NDArray[np.int64]
    seed: int

    def __iter__(self) -> Iterator[ItemKey]:
        return (ItemKey(int(index), self.seed) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class KeyedDataset(Dataset[Any], ABC):
    """A map-style dataset of dictionaries of arrays of fixed shapes.

    Subclasses give `item`, or `rows` where a whole batch is made faster at once.

    Args:
        info: see DataInfo.
        num_items: how many there are.
        with_ids: batches also have `unique_ids`, the items' numbers, -1 for rows that only fill.
    """

    def __init__(self, info: DataInfo, num_items: int, *, with_ids: bool = False) -> None:
        self.info = info
        self._num_items = num_items
        self._with_ids = with_ids

    def __len__(self) -> int:
        return self._num_items

    @abstractmethod
    def item(self, index: int, seed: int) -> Item:
        """Item `index` (0 ≤ index < len) of the epoch whose seed is `seed`."""

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        """Several items, stacked."""
        items = [self.item(int(index), seed) for index in indices]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def finish(self, batch: Batch) -> None:
        """Add to a batch what depends on all its rows."""

    def batch(self, indices: Sequence[int] | npt.NDArray[Any], seed: int) -> Batch:
        """The batch of these items: ids, labels and masks int64, the rest float32.

        A negative index gives a row of zeros; such rows come last.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        wanted = numbers[numbers >= 0]
        assert (numbers[: len(wanted)] >= 0).all(), "rows that only fill a batch come last"
        num_filling = len(numbers) - len(wanted)
        rows = self.rows(wanted if len(wanted) else np.zeros(1, np.int64), seed)
        batch: Batch = {}
        for name, values in rows.items():
            values = values[: len(wanted)]
            if num_filling:
                filling = np.zeros((num_filling, *values.shape[1:]), values.dtype)
                values = np.concatenate([values, filling])
            batch[name] = torch.from_numpy(_standard(values))
        if self._with_ids:
            batch["unique_ids"] = torch.from_numpy(numbers.copy())
        self.finish(batch)
        return batch

    def example_batch(self, batch_size: int) -> Batch:
        """The first items, again and again where there are too few."""
        return self.batch(np.arange(batch_size) % len(self), 0)

    def __getitem__(self, key: int | ItemKey) -> Batch:
        if not isinstance(key, ItemKey):
            number = int(key)
            if not -len(self) <= number < len(self):
                raise IndexError(f"item {number} of {len(self)}")
            key = ItemKey(number % len(self), 0)
        batch = self.batch([key.index], key.seed)
        return {name: tensor[0] for name, tensor in batch.items()}

    def __getitems__(self, keys: BatchKey | Sequence[int | ItemKey]) -> Batch:
        """A whole batch, collated already: torch calls this instead of `__getitem__`."""
        if isinstance(keys, BatchKey):
            return self.batch(keys.indices, keys.seed)
        pairs = [key if isinstance(key, ItemKey) else ItemKey(int(key), 0) for key in keys]
        seeds = {pair.seed for pair in pairs}
        assert len(seeds) == 1, "the items of a batch are of one epoch"
        return self.batch([pair.index for pair in pairs], seeds.pop())


def as_it_is(batch: Batch) -> Batch:
    """The collate function of these datasets, whose batches are collated when they are made."""
    return batch


def _standard(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kind = np.float32 if values.dtype.kind == "f" else np.int64
    return np.ascontiguousarray(values, dtype=kind)

"""Which rows of an evaluation's batches are samples.

Decides that every batch of an evaluation carries `unique_ids`, the samples' numbers, with -1 for
the rows that only fill the last one: compiled programs take batches of one shape, and the loss and
the metrics leave these rows out. Does not decide what a row holds (openwafer.data).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from openwafer.data.dataset import Batch, BatchKey, KeyedDataset

__all__ = ["numbered"]


class _Numbered(Dataset[Any]):
    """A dataset whose batches say which of its items they hold."""

    def __init__(self, dataset: KeyedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: BatchKey) -> Batch:
        batch = self.dataset.__getitems__(keys)
        batch.setdefault("unique_ids", torch.from_numpy(keys.indices.copy()))
        return batch


def numbered(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader, with `unique_ids` [batch] int64 in every batch."""
    assert isinstance(loader.dataset, KeyedDataset)
    return DataLoader(
        _Numbered(loader.dataset),
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )

"""The order of an epoch, and the DataLoader.

Decides that the order and the epoch's seed come from (`shuffle_seed`, epoch), or from torch's
generator where there is no `shuffle_seed` (a run sets that from its own seed and the epoch), and
that evaluation always sees the same. Does not decide which task loads which batch (streaming/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from openwafer.data.dataset import Batch, BatchKey, KeyedDataset, as_it_is
from openwafer.data.keyed_random import derive_seed
from openwafer.data.params import COMMON_KEYS, InputParams, Split
from openwafer.errors import DataError

__all__ = ["EpochSampler", "make_dataloader"]


class EpochSampler(Sampler[BatchKey]):
    """Batches of item numbers, epoch by epoch.

    `set_epoch` chooses the epoch of the next iteration; without it they are counted.

    Args:
        num_items: of the dataset.
        batch_size: items in a batch.
        shuffle: a new order in each epoch.
        seed: of the order and of the items' random numbers; None takes one from torch's generator.
        same_every_epoch: evaluation: the epoch changes nothing, and a missing seed is 0.
        drop_last: leave a last, smaller batch out.
        pad_last: fill a last, smaller batch up with -1.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int | None = None,
        same_every_epoch: bool = False,
        drop_last: bool = True,
        pad_last: bool = False,
    ) -> None:
        self._num_items, self._batch_size = num_items, batch_size
        self._shuffle, self._seed, self._same = shuffle, seed, same_every_epoch
        self._drop_last, self._pad_last = drop_last, pad_last
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._num_items, self._batch_size)
        return whole + int(rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self.keys(epoch, torch.default_generator)

    def keys(self, epoch: int, generator: torch.Generator) -> Iterator[BatchKey]:
        """The epoch's batches; a seed that nothing says is drawn from `generator`."""
        return self._batches(self._epoch_seed(epoch, generator))

    def _epoch_seed(self, epoch: int, generator: torch.Generator) -> int:
        if self._same:
            return derive_seed(self._seed or 0, "evaluation")
        if self._seed is not None:
            return derive_seed(self._seed, epoch)
        return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())

    def _batches(self, seed: int) -> Iterator[BatchKey]:
        size = self._batch_size
        order = np.arange(self._num_items, dtype=np.int64)
        if self._shuffle:
            np.random.Generator(np.random.Philox(key=[seed, 0])).shuffle(order)
        for number in range(len(self)):
            indices = order[number * size : (number + 1) * size]
            if self._pad_last and len(indices) < size:
                indices = np.concatenate([indices, np.full(size - len(indices), -1)])
            yield BatchKey(indices, seed)


def make_dataloader(
    dataset: KeyedDataset, input_params: Mapping[str, Any], split: Split = "train"
) -> DataLoader[Batch]:
    """The loader of a dataset by the keys of its section (COMMON_KEYS; others are left alone).

    Raises:
        ConfigError: a key has a wrong value.
        DataError: there is not even one batch.
    """
    common = {key: value for key, value in input_params.items() if key in COMMON_KEYS}
    params = InputParams(common, COMMON_KEYS, split)
    of_split = "train_batch_size" if split == "train" else "eval_batch_size"
    name = of_split if params.get(of_split) is not None else "batch_size"
    batch_size = params.integer(name, minimum=1)
    pad_last = params.flag("pad_last_batch", default=split == "predict")
    drop_last = params.flag("drop_last", default=True) and not pad_last
    if len(dataset) == 0 or (drop_last and len(dataset) < batch_size):
        raise DataError(
            f"{len(dataset)} samples are not one batch of {batch_size} ({dataset.info.source})",
            where=params.where(name),
            allowed=f"a batch_size of at most {len(dataset)}, or more data",
        )
    num_workers = params.integer("num_workers")
    sampler = EpochSampler(
        len(dataset),
        batch_size,
        shuffle=params.flag("shuffle", default=split == "train"),
        seed=params.optional_integer("shuffle_seed"),
        same_every_epoch=split != "train",
        drop_last=drop_last,
        pad_last=pad_last,
    )
    return DataLoader(
        dataset,
        # torch hands on what a batch sampler gives, and to `__getitems__` it may be anything.
        batch_sampler=cast(Any, sampler),
        collate_fn=cast(Any, as_it_is),
        num_workers=num_workers,
        prefetch_factor=params.integer("prefetch_factor", minimum=1) if num_workers else None,
        persistent_workers=params.flag("persistent_workers") and num_workers > 0,
    )

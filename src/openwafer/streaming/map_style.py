"""Batches of a map-style `torch.utils.data.DataLoader`, any of them on its own.

Decides how a user's loader is rebuilt so that the order of an epoch comes from (seed, epoch), the
random numbers of a batch from (seed, epoch, batch), and only wanted batches are loaded. The
user's sampler runs whole in every task: it gives indices, which are cheap; data are not. Does not
decide which batches are wanted (`shard.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from openwafer.streaming.randomness import (
    RandomStream,
    derive_seed,
    own_generators,
    preserved,
    seed_all,
)
from openwafer.streaming.shard import Numbering
from openwafer.streaming.signals import outlive_first_signal
from openwafer.streaming.source import Batch

__all__ = ["MapStyleFeed"]

# Index lists taken from the user's sampler at a time: setting aside the global generators costs
# tens of microseconds, which a fast pipeline would notice on every batch.
_KEYS_AT_A_TIME = 32


@dataclass(frozen=True, slots=True)
class _BatchKey:
    """What the sampler gave for one batch, and the seed of its random numbers."""

    keys: Any
    seed: int


class _SeededDataset(Dataset[Any]):
    """The user's dataset, asked for whole batches; each is loaded under its own seed.

    The seed also holds for the collate function, which torch runs next in the same process.
    """

    def __init__(self, dataset: Any, collate: object, *, in_batches: bool) -> None:
        self.dataset = dataset
        self._collate = collate
        self._in_batches = in_batches

    def __getitem__(self, key: _BatchKey) -> Any:
        seed_all(key.seed, own_generators(self.dataset, self._collate))
        if not self._in_batches:
            return self.dataset[key.keys]
        load_many = getattr(self.dataset, "__getitems__", None)
        if load_many:
            return load_many(key.keys)
        return [self.dataset[index] for index in key.keys]


@dataclass(frozen=True, slots=True)
class _StartProcess:
    """What a DataLoader process does first: shows user code the user's dataset, not the one that
    wraps it, and keeps the process alive through the first SIGTERM or Ctrl-C."""

    user_function: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        outlive_first_signal()
        info: Any = get_worker_info()
        wrapper = info.dataset
        # The value is frozen for user code.
        object.__setattr__(info, "dataset", wrapper.dataset)
        if self.user_function is not None:
            self.user_function(worker_id)


class _WantedKeys:
    """The sampler of the rebuilt loader: runs the user's whole, passes on what is wanted.

    `epoch` and `start` are set before each iteration, so that one loader, with its persistent
    processes, serves all epochs.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, numbering: Numbering) -> None:
        # With batch_size=None there is no batch sampler: each key is a batch of the dataset's own.
        batch_sampler = loader.batch_sampler
        self._sampler: Iterable[Any] = loader.sampler if batch_sampler is None else batch_sampler
        self._parts = _sampler_parts(loader)
        self._generators = own_generators(loader, *self._parts)
        self._seed = seed
        self._numbering = numbering
        self.epoch = 0
        self.start = 0
        self.num_seen = 0

    @property
    def num_batches(self) -> int | None:
        try:
            return len(cast(Any, self._sampler))
        except (TypeError, NotImplementedError, AttributeError):
            return None

    def __iter__(self) -> Iterator[_BatchKey]:
        self.num_seen = 0
        return self._wanted(self.epoch, self.start)

    def _wanted(self, epoch: int, start: int) -> Iterator[_BatchKey]:
        for place, keys in enumerate(self._whole_epoch(epoch)):
            self.num_seen = place + 1
            number = self._numbering.number(place)
            if self._numbering.wants(number, start):
                yield _BatchKey(keys, derive_seed(self._seed, epoch, number))

    def _whole_epoch(self, epoch: int) -> Iterator[Any]:
        random_stream = RandomStream(derive_seed(self._seed, epoch, "order"), self._generators)
        with random_stream.installed():
            for part in self._parts:
                set_epoch = getattr(part, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(epoch)
            iterator = iter(self._sampler)
        while True:
            with random_stream.installed():
                some = list(islice(iterator, _KEYS_AT_A_TIME))
            if not some:
                return
            yield from some


def _sampler_parts(loader: DataLoader[Any]) -> list[Any]:
    """The sampler, the batch sampler and the sampler inside it, each once."""
    candidates: list[Any] = [loader.sampler, loader.batch_sampler]
    candidates.append(getattr(loader.batch_sampler, "sampler", None))
    return list({id(part): part for part in candidates if part is not None}.values())


class MapStyleFeed:
    """Batches of a map-style loader, by epoch and start.

    With `persistent_workers` torch keeps one iterator per loader: a new epoch ends the older.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, numbering: Numbering) -> None:
        self._keys = _WantedKeys(loader, seed, numbering)
        self._seed = seed
        self._loader = _rebuild(loader, self._keys)
        self._in_this_process = loader.num_workers == 0
        self._description = _describe(loader)

    @property
    def num_batches(self) -> int | None:
        return self._keys.num_batches

    @property
    def num_seen(self) -> int:
        """How many batches the sampler of the newest epoch has given, wanted or not."""
        return self._keys.num_seen

    @property
    def description(self) -> str:
        return self._description

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self._keys.epoch, self._keys.start = epoch, start
        with preserved():
            # Starting processes draws their base seed from the global generator.
            seed_all(derive_seed(self._seed, epoch, "processes"))
            iterator = iter(self._loader)
        end = object()
        while True:
            if self._in_this_process:
                with preserved():
                    batch = next(iterator, end)
            else:
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch


def _rebuild(loader: DataLoader[Any], keys: _WantedKeys) -> DataLoader[Any]:
    processes = loader.num_workers > 0
    in_batches = loader.batch_sampler is not None
    return DataLoader(
        _SeededDataset(loader.dataset, loader.collate_fn, in_batches=in_batches),
        batch_size=None,  # a key is already a whole batch
        sampler=keys,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        # Without an accelerator torch would only warn.
        pin_memory=loader.pin_memory and torch.accelerator.is_available(),
        timeout=loader.timeout,
        worker_init_fn=_StartProcess(loader.worker_init_fn) if processes else None,
        multiprocessing_context=loader.multiprocessing_context if processes else None,
        prefetch_factor=loader.prefetch_factor if processes else None,
        persistent_workers=loader.persistent_workers,
    )


def _describe(loader: DataLoader[Any]) -> str:
    """What a person needs to see why an epoch is empty."""
    try:
        size = f"{len(cast(Any, loader.dataset))} samples"
    except (TypeError, NotImplementedError):
        size = "a dataset without length"
    return f"{size}, batch_size={loader.batch_size}, drop_last={loader.drop_last}"

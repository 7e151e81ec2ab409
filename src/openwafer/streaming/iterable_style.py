"""Batches of data that can only be read from front to back.

Decides how an iterable dataset's loader, any other iterable, or a function that gives one, is read
again in each epoch with random numbers from (seed, epoch): every task reads all of it and passes
on what is wanted. Does not decide which batches are wanted (`shard.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import DataLoader

from openwafer.errors import DataError
from openwafer.streaming import tasks
from openwafer.streaming.randomness import RandomStream, derive_seed, own_generators
from openwafer.streaming.shard import Numbering
from openwafer.streaming.signals import outlive_first_signal
from openwafer.streaming.source import Batch

__all__ = ["IterableStyleFeed"]


class IterableStyleFeed:
    """Batches of an iterable, by epoch and start; what comes before is read and thrown away."""

    def __init__(self, data: object, seed: int, numbering: Numbering) -> None:
        if not isinstance(data, Iterable) and not callable(data):
            raise DataError(
                f"the data function gave a {type(data).__name__}, which has no batches",
                allowed="a torch DataLoader, another iterable, or a function that gives one",
            )
        self._data = data
        self._seed = seed
        self._numbering = numbering
        self._one_shot = isinstance(data, Iterator)
        self._begun = False
        self.num_seen = 0

    @property
    def num_batches(self) -> int | None:
        try:
            return len(cast(Any, self._data))
        except (TypeError, NotImplementedError):
            return None

    @property
    def description(self) -> str:
        return f"a {type(self._data).__name__} that gives nothing"

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self._begin()
        tasks.forget_consulted()
        random_stream, iterator = self._open(epoch)
        end = object()
        self.num_seen = 0
        while True:
            with random_stream.installed():
                batch = next(iterator, end)
            if batch is end:
                return
            if self.num_seen == 0:
                self._check_not_sharded_twice()
            number = self._numbering.number(self.num_seen)
            self.num_seen += 1
            if self._numbering.wants(number, start):
                yield batch

    def _begin(self) -> None:
        if self._one_shot and self._begun:
            raise DataError(
                f"the data are a {type(self._data).__name__}, which can be read only once,"
                " and another epoch is wanted",
                hint="give a DataLoader, or the function itself instead of what it returns",
            )
        self._begun = True

    def _open(self, epoch: int) -> tuple[RandomStream, Iterator[Any]]:
        data = self._data
        dataset = getattr(data, "dataset", None)
        owners = (data, dataset)
        random_stream = RandomStream(
            derive_seed(self._seed, epoch, "iterable"), own_generators(*owners)
        )
        with random_stream.installed():
            for owner in owners:
                set_epoch = getattr(owner, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(epoch)
            if isinstance(data, Iterable):
                return random_stream, iter(_repeatable(data))
            return random_stream, iter(cast(Callable[[], Iterable[Any]], data)())

    def _check_not_sharded_twice(self) -> None:
        numbering = self._numbering
        if numbering.shard.count == 1 or numbering.already_sharded or not tasks.was_consulted():
            return
        raise DataError(
            "the data ask for get_streaming_rank() only while they are read;"
            " they would be sharded twice",
            allowed="a data function or a dataset's constructor that asks for it",
            hint="call get_streaming_rank() in __init__ and keep the number",
        )


def _repeatable(data: Iterable[Any]) -> Iterable[Any]:
    """A view of a DataLoader that gives the same batches in the same order each time.

    Processes kept from the last epoch would go on with their old random numbers, and without
    `in_order` batches come as they are ready.
    """
    if not isinstance(data, DataLoader):
        return data
    view = copy.copy(data)
    vars(view).update(in_order=True, persistent_workers=False, _iterator=None)
    if view.num_workers:
        vars(view).update(worker_init_fn=_StartProcess(view.worker_init_fn))
    return cast("DataLoader[Any]", view)


@dataclass(frozen=True, slots=True)
class _StartProcess:
    """What a DataLoader process does first."""

    user_function: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        outlive_first_signal()
        if self.user_function is not None:
            self.user_function(worker_id)

"""The user's data loader as a deterministic, shardable, resumable sequence of batches.

Decides that batch k of epoch e depends only on (seed, e, k), never on how many tasks share the
work or where a run resumed, and how the user's mistakes in data code are reported. How each kind
of loader is read is in `map_style.py` and `iterable_style.py`. Does not move batches between
processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeGuard

from torch.utils.data import DataLoader, IterableDataset

from openwafer.errors import DataError, OpenWaferError
from openwafer.streaming import tasks
from openwafer.streaming.blame import user_place
from openwafer.streaming.iterable_style import IterableStyleFeed
from openwafer.streaming.map_style import MapStyleFeed
from openwafer.streaming.shard import Numbering, Shard
from openwafer.streaming.source import Batch

__all__ = ["BatchSequence", "Shard", "build_sequence"]

_logger = logging.getLogger("openwafer.streaming")


class _Feed(Protocol):
    @property
    def num_batches(self) -> int | None: ...
    @property
    def num_seen(self) -> int: ...
    @property
    def description(self) -> str: ...
    def batches(self, epoch: int, start: int) -> Iterator[Batch]: ...


class BatchSequence:
    """The batches of a user's loader that belong to one shard, epoch by epoch (a `BatchSource`).

    Map-style DataLoaders load only what the shard needs. An iterable dataset, any other iterable,
    or a function without arguments that gives one, is read from the front in every task. The
    caller's random number generators are left as they were.

    Args:
        loader: what the user's data function gave.
        seed: of the run.
        shard: which batches are this task's.
        already_sharded: the data function chose this task's part itself (it asked for
            `tasks.get_streaming_rank()`); then all batches are the shard's.

    Raises:
        DataError: `loader` cannot be iterated.
    """

    def __init__(
        self,
        loader: object,
        *,
        seed: int,
        shard: Shard = Shard(0, 1),  # noqa: B008 (frozen)
        already_sharded: bool = False,
    ) -> None:
        self._numbering = Numbering(shard, already_sharded)
        self._feed: _Feed
        if _is_map_style(loader):
            self._feed = MapStyleFeed(loader, seed, self._numbering)
        else:
            self._feed = IterableStyleFeed(loader, seed, self._numbering)
            if shard.count > 1 and not already_sharded:
                _logger.warning(
                    "the data can only be read from front to back: each of %d workers reads all of"
                    " them; divide them with num_streamers() and get_streaming_rank()",
                    shard.count,
                )

    @property
    def already_sharded(self) -> bool:
        return self._numbering.already_sharded

    @property
    def num_batches(self) -> int | None:
        """Batches of a whole epoch, not of the shard; None where the data have no length.

        Where the user sharded the data: the first number that this task cannot give; the epoch
        has as many batches as the least of all tasks' numbers.
        """
        length = self._feed.num_batches
        return None if length is None else self._numbering.number(length)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The shard's batches of epoch `epoch` from number `start` on.

        Raises:
            DataError: the epoch has no batch at all, or the user's code failed (with its line).
        """
        batches = self._feed.batches(epoch, start)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except OpenWaferError:
                raise
            except Exception as error:
                raise DataError(
                    f"loading data failed in epoch {epoch}: {type(error).__name__}: {error}",
                    where=user_place(error),
                ) from error
            yield batch
        if self._feed.num_seen == 0:
            raise DataError(
                f"epoch {epoch} has no batch: {self._feed.description}",
                allowed="at least one batch per epoch",
                hint="a smaller batch_size, or drop_last=False",
            )


def build_sequence(make_loader: Callable[[], object], *, seed: int, shard: Shard) -> BatchSequence:
    """Call the user's data function and take over what it gives, sharding it unless it asked for
    its streaming rank and so did that itself.

    Raises:
        DataError: the result cannot be iterated. What the function raises passes through.
    """
    tasks.forget_consulted()
    loader = make_loader()
    return BatchSequence(
        loader, seed=seed, shard=shard, already_sharded=tasks.was_consulted() and shard.count > 1
    )


def _is_map_style(loader: object) -> TypeGuard[DataLoader[Any]]:
    """A map-style DataLoader that iterates as torch's does (a subclass may replace that)."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader).__iter__ is DataLoader.__iter__
    )

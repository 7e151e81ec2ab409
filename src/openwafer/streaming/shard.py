"""Which task loads which batch.

Decides the numbering: batch k of an epoch belongs to shard `k % count`. Does not load anything.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Numbering", "Shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count` parts."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, f"no shard {self.index} of {self.count}"

    def first_from(self, start: int) -> int:
        """The first batch from `start` on that belongs to this shard."""
        return start + (self.index - start) % self.count


@dataclass(frozen=True, slots=True)
class Numbering:
    """From the place of a batch in this process's loader to its number in the whole epoch.

    already_sharded: the user's data function chose this task's part of the data itself, so that
    every batch of its loader belongs to the shard; the parts are interleaved.
    """

    shard: Shard
    already_sharded: bool = False

    def number(self, place: int) -> int:
        """The number in the epoch of the loader's batch `place`."""
        if self.already_sharded:
            return place * self.shard.count + self.shard.index
        return place

    def wants(self, number: int, start: int) -> bool:
        """Whether the batch of this number is to be loaded here."""
        return number >= start and number % self.shard.count == self.shard.index

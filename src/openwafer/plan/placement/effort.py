"""How much work the search may do.

Decides how an effort is counted: in steps, not in seconds, so that a machine that is slower or busy
gives the same placement. A time limit is only a cap on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Clock", "Effort"]

_SECONDS_PER_MOVE = 25e-6
_SECONDS_PER_MOVE_AND_BLOCK = 0.5e-6
_SECONDS_PER_ORDER = 0.4e-6
"""Rough rates of one core; one order costs blocks³ of the last. They only turn seconds into steps,
and with `_SHARE` they leave room for one a third as fast."""
_SHARE = 0.33


@dataclass(frozen=True, slots=True)
class Effort:
    """Steps of the search.

    most_groups: orders longer than this are grouped first (coarser, faster).
    orders: orders of the blocks that are tried for a faster slowest block. With 0, a larger floor
        is never slower.
    starts: how many floorplans are annealed. The best quarter goes on for four times as long, and
        so on to the last one.
    moves: changes tried for each of them at first.
    """

    most_groups: int = 48
    orders: int = 0
    starts: int = 4
    moves: int = 600

    @staticmethod
    def for_seconds(seconds: float, num_blocks: int) -> Effort:
        """An effort that takes about a third of `seconds` on one core of a usual machine."""
        use = seconds * _SHARE
        blocks = max(1, num_blocks)
        groups = 128 if seconds >= 20 else 48
        per_order = _SECONDS_PER_ORDER * min(blocks, groups) ** 3
        per_move = _SECONDS_PER_MOVE + _SECONDS_PER_MOVE_AND_BLOCK * blocks
        total = 0.7 * use / per_move
        starts = 64
        while starts > 1 and _first_round(total, starts) < 300 + 10 * blocks:
            starts //= 4
        return Effort(
            most_groups=groups,
            orders=int(0.2 * use / per_order),
            starts=starts,
            moves=_first_round(total, starts),
        )


class Clock:
    """A time limit, or none."""

    def __init__(self, seconds: float | None) -> None:
        self._start = time.monotonic()
        self._seconds = seconds

    def part(self, share: float) -> Clock:
        """A limit of its own: a share of the time that is left."""
        if self._seconds is None:
            return Clock(None)
        left = max(0.0, self._start + self._seconds - time.monotonic())
        return Clock(left * share)

    def gone(self) -> float:
        """The share of the time that is over, up to 1; always 0 without a limit."""
        if self._seconds is None:
            return 0.0
        return min(1.0, (time.monotonic() - self._start) / max(self._seconds, 1e-9))

    def expired(self) -> bool:
        """Whether it is all over."""
        return self.gone() >= 1.0


def _first_round(total: float, starts: int) -> int:
    """Moves of each start in the first round; every round has as many in all, and the trials
    of targets that weights ask for have about as many again."""
    rounds = {64: 5, 16: 4, 4: 3, 1: 2}[starts]
    return max(1, int(total / rounds / starts))

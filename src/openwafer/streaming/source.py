"""Where the training loop gets its batches from.

Decides what a source of batches offers. Does not decide whether they are loaded in this process
(`loader.py`) or by other tasks (`coordinator.py`): the loop cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

__all__ = ["Batch", "BatchSource", "Mode"]

Batch = Any
"""What the user's data loader yields: a tensor, or a tuple, list or dict of them, nested."""


Mode = Literal["train", "eval", "predict"]
"""Which of the user's data functions the batches come from."""


class BatchSource(Protocol):
    """A deterministic, resumable sequence of batches, epoch by epoch."""

    @property
    def num_batches(self) -> int | None:
        """Batches in one epoch (the whole epoch, not a shard); None where the data have no
        length."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches `start`, `start + 1`, ... of epoch `epoch`, both counted from 0.

        Raises:
            DataError: the epoch has no batch at all, or the user's data code failed.
            StreamingError: a task that loads the batches was lost.
        """
        ...

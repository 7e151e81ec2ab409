"""Rows of different lengths in two arrays: small, and shared by forked processes.

Decides storage and padding only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Ragged", "pad"]


class Ragged:
    """A sequence of integer rows."""

    def __init__(self, rows: Iterable[Sequence[int] | npt.NDArray[Any]]) -> None:
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        lengths = np.array([0, *(len(array) for array in arrays)], dtype=np.int64)
        self._starts = np.cumsum(lengths)
        self._flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self._flat[self._starts[index] : self._starts[index + 1]]

    def padded(
        self, indices: npt.NDArray[np.int64], length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows with zeros behind, cut where they are longer, and 1 where there is a value:
        [len(indices), length] each."""
        begins = self._starts[indices]
        sizes = np.minimum(self._starts[indices + 1] - begins, length)
        columns = np.arange(length)[None, :]
        real = columns < sizes[:, None]
        out = np.zeros(real.shape, dtype=np.int64)
        out[real] = self._flat[(begins[:, None] + columns)[real]]
        return out, real.astype(np.int64)


def pad(row: Sequence[int] | npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
    """The row with zeros behind, cut where it is longer."""
    out = np.zeros(length, dtype=np.int64)
    size = min(len(row), length)
    out[:size] = row[:size]
    return out

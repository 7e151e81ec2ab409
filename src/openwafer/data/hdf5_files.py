"""GPT-2's documented HDF5 files: attribute `n_examples`, and datasets `example_0`, `example_1`, …
of three rows: input_ids, attention_mask, labels.

Decides how an example is found and what is checked. Needs h5py (extra `zoo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.errors import ConfigError, DataError

__all__ = ["Hdf5Examples", "h5py_library"]


def h5py_library() -> ModuleType:
    """h5py.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(
            "HDF5 files need h5py", hint='pip install "openwafer[zoo]", or pip install h5py'
        ) from error
    return h5py


class Hdf5Examples(KeyedDataset):
    """input_ids, attention_mask, labels: [max_sequence_length], as they are in the files.

    Args:
        vocab_size: of the tokens; the files do not say it. None: GPT-2's, 50257.

    Raises:
        ConfigError: h5py is missing.
        DataError: no file, or one that is not of this layout.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        max_sequence_length: int,
        vocab_size: int | None,
        with_ids: bool = False,
    ) -> None:
        self._files = _files(paths)
        self._open_files: dict[int, Any] = {}
        self._length = max_sequence_length
        counts = [self._count(number) for number in range(len(self._files))]
        self._ends = np.cumsum(counts)
        info = DataInfo(
            source=f"{sum(counts):,} examples of {len(self._files)} HDF5 files",
            vocab_size=vocab_size or 50257,
            max_sequence_length=max_sequence_length,
        )
        super().__init__(info, int(self._ends[-1]), with_ids=with_ids)

    def _count(self, number: int) -> int:
        try:
            return int(self._open(number).attrs["n_examples"])
        except (OSError, KeyError) as error:
            raise DataError(
                f"not a file of examples: {error}",
                where=str(self._files[number]),
                allowed="HDF5 with the attribute n_examples and datasets example_0, example_1, ...",
            ) from error

    def _open(self, number: int) -> Any:
        if number not in self._open_files:
            self._open_files[number] = h5py_library().File(self._files[number], mode="r")
        return self._open_files[number]

    def item(self, index: int, seed: int) -> Item:
        number = int(np.searchsorted(self._ends, index, side="right"))
        inside = index - (int(self._ends[number - 1]) if number else 0)
        where = f"{self._files[number]}, example_{inside}"
        try:
            rows = np.asarray(self._open(number)[f"example_{inside}"], dtype=np.int64)
        except KeyError as error:
            raise DataError(
                "the example is missing",
                where=where,
                allowed="as many examples as n_examples says",
            ) from error
        if rows.shape != (3, self._length):
            raise DataError(
                f"the example has shape {list(rows.shape)}",
                where=where,
                allowed=f"[3, {self._length}]: input_ids, attention_mask, labels",
                hint="max_sequence_length is that of the files",
            )
        return {"input_ids": rows[0], "attention_mask": rows[1], "labels": rows[2]}

    # A file that is open here cannot be used in another process.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix in (".h5", ".hdf5"))
        else:
            found.append(path)
    if not found:
        raise DataError(
            "there are no HDF5 files",
            where=", ".join(map(str, paths)),
            allowed="files that end in .h5 or .hdf5",
            hint="openwafer prepare text ... --output hdf5 writes them",
        )
    return found

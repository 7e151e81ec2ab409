"""Files in the format of MNIST: IDX, gzipped or not.

Decides the names and the format. Does not decide scale or shape (digits.py). Source of the format:
Y. LeCun, C. Cortes, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.errors import DataError

__all__ = ["IDX_NAMES", "read_idx", "read_idx_images"]

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "eval": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The two files of each split."""


def read_idx_images(
    folder: Path, split: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images [item, height, width] and labels [item] of a split; any but `train` is the test set.

    Raises:
        DataError: a file is missing or broken, or the two do not belong together.
    """
    paths = [_find(folder, name) for name in IDX_NAMES["train" if split == "train" else "eval"]]
    images, labels = (read_idx(path) for path in paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"images of shape {list(images.shape)} and labels of shape {list(labels.shape)}",
            where=f"{paths[0]}, {paths[1]}",
            allowed="[item, height, width] and [item], equally many items",
        )
    return images, labels


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of one file: two zero bytes, type (unsigned bytes), rank, sizes, then the data.

    Raises:
        DataError: the file is of another format, or cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the file cannot be read: {error}", where=str(path)) from error
    rank = content[3] if len(content) >= 4 else 0
    if content[:3] != b"\x00\x00\x08" or not rank or len(content) < 4 + 4 * rank:
        raise DataError("not an IDX file of unsigned bytes", where=str(path))
    shape = tuple(int(size) for size in np.frombuffer(content[4 : 4 + 4 * rank], dtype=">u4"))
    data: npt.NDArray[Any] = np.frombuffer(content[4 + 4 * rank :], dtype=np.uint8)
    expected = int(np.prod(shape, dtype=np.int64))
    if data.size != expected:
        raise DataError(
            f"{data.size} bytes of data",
            where=str(path),
            allowed=f"{expected}, as its head says: {' × '.join(map(str, shape))}",
        )
    return data.reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"there is no {name} or {name}.gz",
        where=str(folder),
        allowed="the four files of MNIST: "
        + ", ".join(known for names in IDX_NAMES.values() for known in names),
    )

"""Handwritten digits: the files of MNIST, or the 1,797 digits of 8 × 8 pixels that scikit-learn
ships (extra `demo`).

Decides which are held out (MNIST's own test files; of the others every fifth), the scale 0..1, and
the size of an image. Source of the small ones: UCI, "Optical Recognition of Handwritten Digits".
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.idx_files import read_idx_images
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.errors import ConfigError

__all__ = ["KEYS", "Digits", "build"]

KEYS: dict[str, Any] = {**COMMON_KEYS, "image_shape": None}


class Digits(KeyedDataset):
    """images [pixels] float32, labels [].

    Args:
        images: [item, height, width], 0..1.
        labels: [item].
        source: one line, what data these are.
    """

    def __init__(
        self, images: npt.NDArray[Any], labels: npt.NDArray[Any], source: str, *, with_ids: bool
    ) -> None:
        _, height, width = images.shape
        self._images = np.ascontiguousarray(images.reshape(len(images), -1), dtype=np.float32)
        self._labels = labels.astype(np.int64)
        info = DataInfo(
            source=source,
            num_classes=10,
            label_names=tuple("0123456789"),
            image_shape=(1, height, width),
            majority_share=float(np.bincount(self._labels).max() / len(labels)),
        )
        super().__init__(info, len(labels), with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        return {"images": self._images[indices], "labels": self._labels[indices]}


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section. `image_shape`, [height, width, 1], asks for images of that size;
    without it they have their own.

    Raises:
        ConfigError: scikit-learn is missing and no data_dir is given.
        DataError: the files are missing or broken.
    """
    folders = params.paths("data_dir")
    if len(folders) > 1:
        raise params.wrong("data_dir", "one folder")
    if folders:
        pixels, labels = read_idx_images(folders[0], params.split)
        images, source = pixels / np.float32(255), f"{len(labels):,} digits of {folders[0]}"
    else:
        images, labels = _embedded(params.split)
        source = f"{len(labels):,} handwritten digits of scikit-learn"
    size = _wanted_size(params)
    if size is not None and size != images.shape[1:]:
        source += f", scaled to {size[0]} × {size[1]}"
        images = _scaled(images, size)
    return Digits(images, labels, source, with_ids=params.split == "predict")


def _embedded(split: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the digits come with scikit-learn",
            hint='pip install "openwafer[demo]", or the files of MNIST in data_dir',
        ) from error
    digits: Any = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    chosen = ~held_out if split == "train" else held_out
    return digits.images[chosen] / 16.0, digits.target[chosen]


def _wanted_size(params: InputParams) -> tuple[int, int] | None:
    shape: Any = params.get("image_shape")
    if shape is None:
        return None
    if not isinstance(shape, (list, tuple)):
        raise params.wrong("image_shape", "[height, width, 1]")
    sizes = [int(size) for size in cast("list[int]", shape)]
    if len(sizes) != 3 or min(sizes) < 1 or sizes[2] != 1:
        raise params.wrong("image_shape", "[height, width, 1]")
    return sizes[0], sizes[1]


def _scaled(images: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Between the nearest pixels."""
    tensor = torch.from_numpy(images.astype(np.float32))[:, None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[:, 0].numpy()

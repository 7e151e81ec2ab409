"""Images with masks, for segmentation: folders of files, and the embedded shapes.

Decides how images and masks are paired, brought to one shape, scaled and augmented. Files:
`<data_dir>/images/<name>` and `<data_dir>/masks/<name>` (or `train/images/...`), .npy, .pgm and
.ppm with nothing installed, .png and others with Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.image_files import IMAGE_ENDINGS, read_image
from openwafer.data.keyed_random import derive_seed, keyed_integers
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.shapes import draw_shapes
from openwafer.errors import DataError

__all__ = [
    "KEYS",
    "FolderImages",
    "Segmentation",
    "ShapeImages",
    "augmented",
    "build",
    "image_shape",
    "normalized",
]

KEYS: dict[str, Any] = {
    **COMMON_KEYS,
    "image_shape": [64, 64, 1],
    "num_classes": 2,
    "class_id": None,
    "augment_data": None,
    "normalize_data_method": "zero_centered",
    "train_test_split": 0.85,
    "only_defective_images": False,
    "dataset": None,
    "dataset_path": None,
}
_NORMALIZATIONS = ("zero_centered", "zero_one", "standard_score")
_EMBEDDED = {"train": 2000, "eval": 200, "predict": 200}
_KEPT_PIXELS = 1 << 22
"""Drawn images that are kept for the next epoch, 12 bytes a pixel: all of the small ones, whose
drawing would take longer than a small network's step."""
_DRAW_AUGMENT = 131


class Segmentation(KeyedDataset):
    """images [channels, height, width] float32, labels [height, width]."""

    def __init__(
        self, info: DataInfo, num_items: int, *, augment: bool, normalize: str, with_ids: bool
    ) -> None:
        self._augment, self._normalize = augment, normalize
        super().__init__(info, num_items, with_ids=with_ids)

    def _read(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Image [channels, height, width] in 0..1, and mask [height, width]."""
        raise NotImplementedError

    def item(self, index: int, seed: int) -> Item:
        image, mask = self._read(index)
        if self._augment:
            which = int(
                keyed_integers(seed, np.array([index]), 1, below=8, draw=_DRAW_AUGMENT)[0, 0]
            )
            image, mask = augmented(image, which), augmented(mask, which)
        return {"images": normalized(image, self._normalize), "labels": mask}


def augmented(image: npt.NDArray[Any], which: int) -> npt.NDArray[Any]:
    """One of 8 views: mirrored left to right (1), top to bottom (2), half a turn's transpose (4,
    square images only)."""
    if which & 1:
        image = image[..., ::-1]
    if which & 2:
        image = image[..., ::-1, :]
    if which & 4 and image.shape[-1] == image.shape[-2]:
        image = np.swapaxes(image, -1, -2)
    return image


def normalized(image: npt.NDArray[np.float32], method: str) -> npt.NDArray[np.float32]:
    """From 0..1 to -1..1 (zero_centered), or mean 0 and deviation 1 (standard_score), or as it
    is (zero_one)."""
    if method == "zero_centered":
        return image * 2 - 1
    if method == "standard_score":
        return (image - image.mean()) / max(float(image.std()), 1e-6)
    return image


class ShapeImages(Segmentation):
    """Shapes that are a little brighter than their textured background."""

    def __init__(self, info: DataInfo, num_items: int, *, seed: int, **options: Any) -> None:
        assert info.image_shape is not None
        self._seed, self._shape = seed, info.image_shape
        self._drawn: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]] = {}
        self._max_drawn = _KEPT_PIXELS // math.prod(info.image_shape)
        super().__init__(info, num_items, **options)

    def _read(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        found = self._drawn.get(index)
        if found is None:
            found = draw_shapes(self._seed, index, self._shape, self.info.num_classes)
            if len(self._drawn) < self._max_drawn:
                self._drawn[index] = found
        return found


class FolderImages(Segmentation):
    """Pairs of files of one name."""

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        info: DataInfo,
        class_id: int | None,
        **options: Any,
    ) -> None:
        self._pairs, self._class_id, self._options = list(pairs), class_id, options
        super().__init__(info, len(pairs), **options)

    def _read(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        image_path, mask_path = self._pairs[index]
        assert self.info.image_shape is not None
        channels, height, width = self.info.image_shape
        image = _with_channels(read_image(image_path), channels, image_path)
        mask = read_image(mask_path)
        if mask.ndim == 3:
            mask = mask[..., 0]
        if mask.shape != image.shape[1:]:
            raise DataError(
                f"the mask is {mask.shape[0]} × {mask.shape[1]} pixels",
                where=str(mask_path),
                allowed=f"{image.shape[1]} × {image.shape[2]}, as its image",
            )
        labels = self._labels(mask, mask_path)
        return _resized(image, (height, width), "bilinear"), _resized_mask(labels, (height, width))

    def defective(self) -> FolderImages:
        """Only the images whose mask is not all background.

        Raises:
            DataError: there is none.
        """
        kept = [pair for pair in self._pairs if self._labels(read_image(pair[1]), pair[1]).any()]
        if not kept:
            raise DataError("no mask marks anything", where=str(self._pairs[0][1].parent))
        return FolderImages(kept, self.info, self._class_id, **self._options)

    def _labels(self, mask: npt.NDArray[Any], path: Path) -> npt.NDArray[np.int64]:
        """Class numbers; with class_id 1 where the mask has that number; two classes may be black
        and anything else."""
        labels = mask.astype(np.int64)
        if self._class_id is not None:
            return (labels == self._class_id).astype(np.int64)
        if self.info.num_classes == 2:
            return (labels > 0).astype(np.int64)
        if labels.max() >= self.info.num_classes:
            raise DataError(
                f"the mask has the class {labels.max()}",
                where=str(path),
                allowed=f"0 to {self.info.num_classes - 1}",
                hint="num_classes, or class_id for one class against all",
            )
        return labels


def _with_channels(image: npt.NDArray[Any], channels: int, path: Path) -> npt.NDArray[np.float32]:
    """[channels, height, width] in 0..1: 8 or 16 bits, or floats as they are."""
    scale = float(np.iinfo(image.dtype).max) if image.dtype.kind in "ui" else 1.0
    scaled = image.astype(np.float32) / scale
    scaled = scaled[None] if scaled.ndim == 2 else np.moveaxis(scaled, -1, 0)
    if channels == 1 and scaled.shape[0] in (3, 4):
        # Luma of ITU-R BT.601.
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
        scaled = np.tensordot(weights, scaled[:3], axes=1)[None]
    if channels == 3 and scaled.shape[0] == 1:
        scaled = np.repeat(scaled, 3, axis=0)
    if channels == 3 and scaled.shape[0] == 4:
        scaled = scaled[:3]
    if scaled.shape[0] != channels:
        raise DataError(
            f"the image has {scaled.shape[0]} channels", where=str(path), allowed=str(channels)
        )
    return np.ascontiguousarray(scaled)


def _resized(
    image: npt.NDArray[np.float32], size: tuple[int, int], mode: str
) -> npt.NDArray[np.float32]:
    if image.shape[1:] == size:
        return image
    tensor = torch.from_numpy(image)[None]
    return F.interpolate(tensor, size=size, mode=mode, align_corners=False)[0].numpy()


def _resized_mask(mask: npt.NDArray[np.int64], size: tuple[int, int]) -> npt.NDArray[np.int64]:
    if mask.shape == size:
        return mask
    tensor = torch.from_numpy(mask)[None, None].to(torch.float32)
    return F.interpolate(tensor, size=size, mode="nearest")[0, 0].numpy().astype(np.int64)


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header. `image_shape` is [height, width,
    channels]."""
    height, width, channels = image_shape(params)
    classes = params.integer("num_classes", minimum=2)
    options: dict[str, Any] = {
        "augment": params.flag("augment_data", default=False) and params.split == "train",
        "normalize": params.choice("normalize_data_method", _NORMALIZATIONS),
        "with_ids": params.split == "predict",
    }
    paths = params.paths("dataset_path") or params.paths("data_dir")

    def info(source: str) -> DataInfo:
        return DataInfo(source=source, num_classes=classes, image_shape=(channels, height, width))

    if not paths:
        count = _EMBEDDED[params.split]
        seed = derive_seed("shapes", "train" if params.split == "train" else "eval")
        source = f"{count:,} images of shapes on textures"
        return ShapeImages(info(source), count, seed=seed, **options)
    share = params.number("train_test_split", minimum=0.0, maximum=1.0)
    pairs = [pair for path in paths for pair in _pairs(path, params.split, share)]
    if not pairs:
        raise DataError(
            f"there is no image of the {params.split} split",
            where=", ".join(map(str, paths)),
            allowed="images/NAME and masks/NAME",
        )
    source = f"{len(pairs):,} images of {', '.join(map(str, paths))}"
    class_id = params.optional_integer("class_id")
    dataset = FolderImages(pairs, info(source), class_id, **options)
    return dataset.defective() if params.flag("only_defective_images") else dataset


def image_shape(params: InputParams) -> tuple[int, int, int]:
    """Height, width and channels.

    Raises:
        ConfigError: `image_shape` is something else.
    """
    value = params.get("image_shape")
    sizes = cast("list[object]", value) if isinstance(value, (list, tuple)) else []
    found = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(found) != 3 or len(sizes) != 3:
        raise params.wrong("image_shape", "[height, width, channels]")
    return found[0], found[1], found[2]


def _pairs(folder: Path, split: str, share: float) -> list[tuple[Path, Path]]:
    """Images with their masks: of the split's own folder, or this split's share by a hash of the
    names."""
    named = folder / ("train" if split == "train" else "eval")
    own = named.is_dir()
    root = named if own else folder
    images, masks = root / "images", root / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise DataError(
            "there are no folders images and masks", where=str(root), allowed="both of them"
        )
    by_stem = {p.stem: p for p in sorted(masks.iterdir()) if p.suffix in IMAGE_ENDINGS}
    found: list[tuple[Path, Path]] = []
    for path in sorted(p for p in images.iterdir() if p.suffix in IMAGE_ENDINGS):
        if path.stem not in by_stem:
            raise DataError("the image has no mask", where=str(path), allowed=f"one in {masks}")
        in_training = derive_seed("split", path.stem) / 2**64 < share
        if own or in_training == (split == "train"):
            found.append((path, by_stem[path.stem]))
    return found

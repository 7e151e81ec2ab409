"""Images of a file as an array.

Decides the formats: .npy, .pgm and .ppm (binary) are read here; .png, .jpg and others by Pillow,
where it is installed. No array of objects is ever unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.errors import ConfigError, DataError

__all__ = ["IMAGE_ENDINGS", "read_image", "write_pgm"]

IMAGE_ENDINGS = (".npy", ".pgm", ".ppm", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

# Netpbm: magic number, width, height, largest value; comments from # to the line's end.
_HEADER = re.compile(rb"(P[56])\s+(?:#.*\s+)*(\d+)\s+(?:#.*\s+)*(\d+)\s+(?:#.*\s+)*(\d+)\s")


def read_image(path: Path) -> npt.NDArray[Any]:
    """[height, width] or [height, width, channels], in the file's own type.

    Raises:
        ConfigError: Pillow is needed and missing.
        DataError: the file is broken.
    """
    if path.suffix == ".npy":
        image = _reading(path, lambda: np.load(path, allow_pickle=False))
    elif path.suffix in (".pgm", ".ppm"):
        image = _netpbm(path)
    else:
        image = _by_pillow(path)
    if image.ndim not in (2, 3):
        raise DataError(
            f"the image has {image.ndim} dimensions",
            where=str(path),
            allowed="[height, width] or [height, width, channels]",
        )
    return image


def _reading(path: Path, read: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(read())
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"not an image: {error}", where=str(path)) from error


def _netpbm(path: Path) -> npt.NDArray[Any]:
    data = path.read_bytes()
    match = _HEADER.match(data)
    if match is None:
        raise DataError("not a binary PGM or PPM file", where=str(path), allowed="P5 or P6")
    width, height, largest = (int(match[group]) for group in (2, 3, 4))
    channels = 1 if match[1] == b"P5" else 3
    dtype = np.dtype(">u2" if largest > 255 else "u1")
    expected = width * height * channels
    values = np.frombuffer(data[match.end() :], dtype=dtype)
    if len(values) < expected:
        raise DataError(
            f"the image is cut short: {len(values)} values", where=str(path), allowed=str(expected)
        )
    image = values[:expected].reshape(height, width, channels).astype(dtype.newbyteorder("="))
    return image[..., 0] if channels == 1 else image


def _by_pillow(path: Path) -> npt.NDArray[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            f"{path.suffix} images need Pillow",
            where=str(path),
            allowed=".npy, .pgm and .ppm need nothing",
            hint="pip install pillow",
        ) from error

    def read() -> npt.NDArray[Any]:
        with Image.open(path) as opened:
            # A palette's numbers are a mask's classes.
            return np.asarray(opened)

    return _reading(path, read)


def write_pgm(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write [height, width] as a binary PGM file."""
    height, width = image.shape
    path.write_bytes(b"P5\n%d %d\n255\n" % (width, height) + image.astype(np.uint8).tobytes())

"""Images of shapes on textured backgrounds, drawn by number.

Decides what is drawn: waves of three directions and noise, a slope of brightness, and one to three
ellipses or rectangles, a little brighter or darker (class 1), their rims blurred by the noise. With
more classes the kind of shape is the class.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from openwafer.data.keyed_random import item_generator

__all__ = ["draw_shapes"]

_CONTRAST = 0.25
_NOISE = 0.06
_WAVE = np.float32(0.04)


def draw_shapes(
    seed: int, index: int, shape: tuple[int, int, int], num_classes: int = 2
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Image [channels, height, width] in 0..1 and mask [height, width], a function of (seed,
    index)."""
    channels, height, width = shape
    generator = item_generator(seed, index)
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    image = _background(generator, rows, columns)
    mask = np.zeros((height, width), dtype=np.int64)
    for _ in range(int(generator.integers(1, 4))):
        kind = int(generator.integers(2))
        inside = _shape(generator, kind, rows, columns)
        mask[inside] = 1 if num_classes == 2 else 1 + kind % (num_classes - 1)
        sign = 1.0 if kind == 0 or num_classes == 2 else -1.0
        image[inside] += np.float32(sign * _CONTRAST)
    noise = generator.standard_normal((channels, height, width), dtype=np.float32)
    noise *= np.float32(_NOISE)
    noise += image[None]
    return np.clip(noise, 0, 1, out=noise), mask


def _background(
    generator: np.random.Generator, rows: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    level, slope_rows, slope_columns = _uniform(generator, (0.3, -0.1, -0.1), (0.5, 0.1, 0.1))
    image = (level + slope_rows * rows) + slope_columns * columns
    for _ in range(3):
        turns_rows, turns_columns, phase = _uniform(generator, (-12, -12, 0), (12, 12, 6.28))
        down, across = 6.28 * turns_rows * rows + phase, 6.28 * turns_columns * columns
        # sin(down + across), from vectors.
        image += _WAVE * (np.sin(down) * np.cos(across) + np.cos(down) * np.sin(across))
    return image


def _uniform(
    generator: np.random.Generator, low: tuple[float, ...], high: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    return generator.uniform(low, high).astype(np.float32)


def _shape(
    generator: np.random.Generator,
    kind: int,
    rows: npt.NDArray[np.float32],
    columns: npt.NDArray[np.float32],
) -> npt.NDArray[np.bool_]:
    row, column = _uniform(generator, (0.15, 0.15), (0.85, 0.85))
    tall, wide = _uniform(generator, (0.08, 0.08), (0.22, 0.22))
    down, across = (rows - row) / tall, (columns - column) / wide
    if kind == 0:
        return down**2 + across**2 <= 1
    return (np.abs(down) <= 1) & (np.abs(across) <= 1)

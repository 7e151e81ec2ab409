"""Random numbers that are a function of a key: (seed, item, draw).

Decides how they are made: the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) over a counter, for a whole batch at a time. A number
depends on its key alone, so that neither the number of processes nor the other items of a batch
can change it. Does not decide what is drawn.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["derive_seed", "item_generator", "keyed_integers", "keyed_uniforms"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = 0xFFFFFFFFFFFFFFFF


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from names and numbers, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def keyed_uniforms(
    seed: int, items: npt.NDArray[Any], count: int, *, draw: int = 0
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1): [len(items), count], row i a function of (seed, items[i], draw).

    Args:
        seed: 64 bits.
        items: integers, one for each row.
        count: numbers in a row; a row of fewer numbers is the beginning of a longer one.
        draw: which of an item's independent rows.
    """
    start = _mix(np.array([seed & _MASK], dtype=np.uint64))
    start = _mix(start ^ np.asarray(items).astype(np.uint64))
    start = _mix(start ^ _mix(np.array([draw + 1], dtype=np.uint64)))
    counter = start[:, None] + np.arange(1, count + 1, dtype=np.uint64)[None, :] * _GAMMA
    return (_mix(counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_integers(
    seed: int, items: npt.NDArray[Any], count: int, *, below: int, draw: int = 0
) -> npt.NDArray[np.int64]:
    """Integers in [0, below): [len(items), count]."""
    return (keyed_uniforms(seed, items, count, draw=draw) * below).astype(np.int64)


def item_generator(seed: int, item: int) -> np.random.Generator:
    """A NumPy generator of one item's own, for draws whose number is not known before."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed & _MASK, item))))


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = bits + _GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))

"""Sizes of memory as users write them: `4GiB`, `512 MiB`, `8e9`.

Decides the spellings. Does not decide what a size is for.
"""

from __future__ import annotations

import re

from openwafer.errors import ConfigError

__all__ = ["parse_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size; without a unit it is in bytes. `GB` is 10⁹, `GiB` 2³⁰.

    Raises:
        ConfigError: it is no size, or nothing.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if not size:
        raise ConfigError(
            f"{text!r} is no size of memory", allowed="a number with B, MB, GB, MiB or GiB: 4GiB"
        )
    return size

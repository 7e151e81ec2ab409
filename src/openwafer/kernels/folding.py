"""Names of repeated modules, written once: `layer.0.mlp`, `layer.1.mlp` as `layer.{0..1}.mlp`.

Decides the spelling and what belongs together. Knows nothing of kernels or refusals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["fold_names", "folding_key"]

_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")


def folding_key(name: str) -> str:
    """Equal for names that differ in their numbered parts alone."""
    return _NUMBER.sub("#", name)


def fold_names(names: Iterable[str]) -> str:
    """One spelling for names of one `folding_key`; the numbers at each place as a range or list."""
    distinct = list(dict.fromkeys(names))
    places = zip(*(map(int, _NUMBER.findall(name)) for name in distinct), strict=True)
    spelled = iter([_numbers(sorted(set(numbers))) for numbers in places])
    return _NUMBER.sub(lambda _: next(spelled), distinct[0])


def _numbers(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    step = values[1] - values[0]
    if values == list(range(values[0], values[-1] + 1, step)):
        middle = f"..{values[-1]}" if len(values) > 2 else f",{values[-1]}"
        return f"{{{values[0]}{middle}{f' by {step}' if step > 1 and len(values) > 2 else ''}}}"
    return f"{{{','.join(map(str, values))}}}"

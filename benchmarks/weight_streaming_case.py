"""What a case of the weight streaming benchmark gives, and how two sides are compared.

Decides the result's form, the alternation and the medians, and how times of models that fit stand
for a model that does not. What a side runs is in its own module.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timed_child import TimedChild

__all__ = ["CaseResult", "carried_on", "machine", "step_seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One line of the benchmark; more is better in `ours` and `theirs`.

    details: what else was measured in the same run.
    """

    case: str
    ours: float
    theirs: float
    unit: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "ours": round(self.ours, 1),
            "theirs": round(self.theirs, 1),
            "ratio": round(self.ours / self.theirs, 3),
            "unit": self.unit,
            **self.details,
            "machine": machine(),
        }


def machine() -> str:
    """Processor, threads, memory and torch, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, torch {torch.__version__}"


def carried_on(seconds: tuple[float, float], layers: tuple[int, int], all_layers: int) -> float:
    """What a step of all layers would take, had they fitted: that of the model of few layers, and
    for every further layer the time that one adds.

    Args:
        seconds: a step of the model of few layers, and of the one of more.
        layers: of these two.
    """
    (few_seconds, more_seconds), (few, more) = seconds, layers
    return few_seconds + (all_layers - few) * (more_seconds - few_seconds) / (more - few)


def step_seconds(
    sides: Mapping[str, TimedChild], *, repeat: int = 5, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each step by side, the sides in turn; the first `warm_up` rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm_up + repeat):
        for name, child in sides.items():
            found[name].append(child.step()["seconds"])
    return {name: seconds[warm_up:] for name, seconds in found.items()}

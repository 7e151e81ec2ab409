"""How fast data come, by themselves.

Decides what is measured: batches taken as fast as they are given, after the first one (which pays
for starting processes). Does not decide what a run does about it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openwafer.nested import tensors_in

__all__ = ["InputRate", "measure_rate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRate:
    """seconds: of the batches counted, the first one left out where there is another."""

    samples_per_sec: float
    bytes_per_sec: float
    num_batches: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"input pipeline: {self.samples_per_sec:,.0f} samples/s"
            f" ({self.bytes_per_sec / 1e6:,.1f} MB/s, {self.num_batches} batches)"
        )


def measure_rate(
    batches: Iterable[Any], *, max_batches: int = 50, max_seconds: float = 2.0
) -> InputRate:
    """Take batches until `max_batches`, or `max_seconds` after the first one, and count.

    Args:
        batches: a DataLoader, or an epoch of a BatchSequence; of tensors, or tuples, lists or
            dictionaries of them. Samples are the leading dimension of the first tensor.
    """
    num_batches = num_samples = num_bytes = 0
    began = first = time.perf_counter()
    first_samples = first_bytes = 0
    for batch in batches:
        tensors = list(tensors_in(batch))
        num_samples += tensors[0].shape[0] if tensors and tensors[0].ndim else 1
        num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        num_batches += 1
        now = time.perf_counter()
        if num_batches == 1:
            first, first_samples, first_bytes = now, num_samples, num_bytes
        if num_batches >= max_batches or now - first >= max_seconds:
            break
    if num_batches > 1:
        num_samples, num_bytes = num_samples - first_samples, num_bytes - first_bytes
        began, num_batches = first, num_batches - 1
    seconds = max(time.perf_counter() - began, 1e-9)
    return InputRate(
        samples_per_sec=num_samples / seconds,
        bytes_per_sec=num_bytes / seconds,
        num_batches=num_batches,
        seconds=seconds,
    )

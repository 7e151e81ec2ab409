"""The compute limit of a step of GPT-2 XL: its matrix products alone, in bf16.

Decides which products those are and how one is timed. Does not decide when
(weight_streaming_xl.py): a machine's speed varies, so what is compared with a step is measured just
before and after it.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.weight_streaming_xl_side import MICROBATCHES, SEQUENCE

__all__ = ["product_seconds"]

WIDTH, FILTER, VOCABULARY, HEADS = 1600, 6400, 50257, 16

_LINEAR = ((WIDTH, WIDTH, 4), (FILTER, WIDTH, 1), (WIDTH, FILTER, 1))
"""A layer's weights: features out, features in, how many."""

_TIMES = 5
"""A product is timed so often, after a first time; the median counts."""


def product_seconds(layers: int) -> float:
    """Time of the matrix products of one step, forward and backward; their median rates hold for
    the few seconds that this takes."""
    per_layer = sum(_linear_seconds(out, into) * count for out, into, count in _LINEAR)
    head = _linear_seconds(VOCABULARY, WIDTH)
    return MICROBATCHES * (layers * (per_layer + _attention_seconds()) + head)


def _linear_seconds(features_out: int, features_in: int) -> float:
    """x·Wᵀ, and the gradients of both."""
    x = torch.randn(SEQUENCE, features_in).bfloat16()
    weight = torch.randn(features_out, features_in).bfloat16()
    grad = torch.randn(SEQUENCE, features_out).bfloat16()
    return _seconds(x, weight.t()) + _seconds(grad, weight) + _seconds(grad.t(), x)


def _attention_seconds() -> float:
    """Scores and their use: two products forward, four backward. A causal mask hides half of each,
    and what it hides is not counted."""
    head = torch.randn(HEADS, SEQUENCE, WIDTH // HEADS).bfloat16()
    scores = torch.randn(HEADS, SEQUENCE, SEQUENCE).bfloat16()
    return (2 * _seconds(head, head.transpose(1, 2)) + 4 * _seconds(scores, head)) / 2


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of one product, into memory that is there already."""
    result = left @ right
    found: list[float] = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        torch.matmul(left, right, out=result)
        found.append(time.perf_counter() - start)
    return statistics.median(found)

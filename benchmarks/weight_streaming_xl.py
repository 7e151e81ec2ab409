"""Case `xl`: GPT-2 XL (1.56 billion weights), AdamW, 4,096 tokens per update, in 4 GiB.

Ours is streamed from disk in a process that the kernel limits to 4 GiB of private writable memory.
Theirs is the same layers with everything resident, without a limit: measured on models of few
layers, which fit, and carried on to 48 by the time that a layer adds. Beside them: the share of the
compute limit, which is the time of the step's matrix products alone at the rate that they reach in
the same run, and how plain PyTorch ends within the same limit.

A step takes minutes, so a case runs `repeat` of them (3 or more for a figure to publish).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from benchmarks.timed_child import ChildError, TimedChild
from benchmarks.weight_streaming_case import CaseResult, step_seconds
from benchmarks.weight_streaming_xl_side import MICROBATCHES, SEQUENCE

__all__ = ["run"]

LAYERS = 48
LIMIT = "4GiB"
FEW, MORE = 1, 8
"""Layers of the resident models: as many as fit beside the streamed one."""

WIDTH, FILTER, VOCABULARY, HEADS = 1600, 6400, 50257, 16
_SIDE = "benchmarks.weight_streaming_xl_side"


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """Tokens per second."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arguments = {
            "streamed": ("streamed", "--layers", LAYERS, "--limit", LIMIT, "--folder", folder),
            "few": ("resident", "--layers", FEW),
            "more": ("resident", "--layers", MORE),
        }
        sides = {
            name: stack.enter_context(TimedChild(_SIDE, [str(a) for a in given]))
            for name, given in arguments.items()
        }
        seconds = step_seconds(sides, repeat=repeat, warm_up=1)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    per_layer = (median["more"] - median["few"]) / (MORE - FEW)
    resident = median["few"] + (LAYERS - FEW) * per_layer
    tokens = MICROBATCHES * SEQUENCE
    products = product_seconds()
    yield CaseResult(
        case=case,
        ours=tokens / median["streamed"],
        theirs=tokens / resident,
        unit="tokens/s",
        details={
            "memory limit": LIMIT,
            "share of compute limit": round(products / median["streamed"], 3),
            "seconds": {name: [round(s, 2) for s in values] for name, values in seconds.items()},
            "plain PyTorch in the same limit": plain_end(),
            "repeat": repeat,
        },
    )


def plain_end() -> str:
    """How the plain loop ends within the limit."""
    with TimedChild(_SIDE, ["plain", "--layers", str(LAYERS), "--limit", LIMIT]) as child:
        try:
            child.step()
        except ChildError as failed:
            return str(failed).strip().splitlines()[-1]
    return "takes a step"


def product_seconds() -> float:
    """Time of one step's matrix products alone, forward and backward, in bf16."""
    per_layer = sum(_linear_seconds(out, into) * count for out, into, count in _LINEAR)
    head = _linear_seconds(VOCABULARY, WIDTH)
    return MICROBATCHES * (LAYERS * (per_layer + _attention_seconds()) + head)


_LINEAR = ((WIDTH, WIDTH, 4), (FILTER, WIDTH, 1), (WIDTH, FILTER, 1))
"""A layer's weights: features out, features in, how many."""


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


def _seconds(left: torch.Tensor, right: torch.Tensor, times: int = 5) -> float:
    """Of one product, into memory that is there already: the median after a first one."""
    result = left @ right
    found: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        torch.matmul(left, right, out=result)
        found.append(time.perf_counter() - start)
    return statistics.median(found)

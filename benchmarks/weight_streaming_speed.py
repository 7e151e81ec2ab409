"""Cases `resident`, `ram` and `disk`: a model that would fit, against plain PyTorch.

GPT-2 small, sequence 512, without dropout, bf16 autocast with fp32 master weights, fused AdamW.
Theirs is the better of eager PyTorch and `torch.compile` of the whole model, in the same run.

Ours keeps freed memory with the process; plain PyTorch leaves it to the C library, which gives it
back. What the compiled model reaches where its user sets the C library likewise, by environment
variables, is printed beside: `compile_keeping_memory`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.timed_child import TimedChild
from benchmarks.weight_streaming_case import CaseResult, step_seconds
from benchmarks.weight_streaming_model import SEQUENCE

__all__ = ["run"]

BATCH_SIZE = 4
_SIDE = "benchmarks.weight_streaming_side"
_KEEPING_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """Tokens per second."""
    common = ["--batch_size", str(BATCH_SIZE)]
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(TimedChild(_SIDE, [name, *common]))
            for name in (case, "eager", "compile")
        }
        keeping = TimedChild(_SIDE, ["compile", *common], env=_KEEPING_MEMORY)
        sides["compile_keeping_memory"] = stack.enter_context(keeping)
        seconds = step_seconds(sides, repeat=repeat)
    rates = {
        name: BATCH_SIZE * SEQUENCE / statistics.median(values) for name, values in seconds.items()
    }
    yield CaseResult(
        case=case,
        ours=rates[case],
        theirs=max(rates["eager"], rates["compile"]),
        unit="tokens/s",
        details={
            **{name: round(rate, 1) for name, rate in rates.items() if name != case},
            "batch": [BATCH_SIZE, SEQUENCE],
            "threads": os.cpu_count(),
            "repeat": repeat,
        },
    )

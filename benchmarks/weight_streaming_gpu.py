"""Case `gpu`: GPT-J 6B, AdamW, sequence 2,048, in 24 GiB of GPU memory.

Ours is streamed from host memory (84 GiB: fp32 weights, Adam's two states and 16-bit copies), by a
process whose allocator is held to the limit. Theirs, of `gpu`, is the same layers with everything
resident: measured on models of few layers, which fit, and carried on to 28 by the time that a layer
adds. Theirs, of `gpu_deepspeed`, is ZeRO-Offload without a limit of GPU memory; it runs after the
others have ended, since its host memory does not fit beside ours.

The peak is the rate of a large bf16 product, before and after each streamed step: what the card
gives in this run, not what its data sheet says.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timed_child import TimedChild
from benchmarks.weight_streaming_case import CaseResult, carried_on
from benchmarks.weight_streaming_gpu_side import SETTINGS, Setting

__all__ = ["available", "run"]

WARM_UP = 2
_SIDE = "benchmarks.weight_streaming_gpu_side"
_THEIRS = "benchmarks.weight_streaming_gpu_deepspeed_child"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Seconds of a step, by side. peak: operations per second, before and after the streamed one.
    told: what the streamed side says besides."""

    streamed: float
    few: float
    more: float
    peak: tuple[float, float]
    told: Mapping[str, Any]

    def resident(self, setting: Setting) -> float:
        """A step of all layers, had they fitted."""
        return carried_on((self.few, self.more), (setting.few, setting.more), setting.layers)

    def share_of_peak(self, setting: Setting) -> float:
        return setting.step_flops(setting.layers) / self.streamed / statistics.mean(self.peak)


def available() -> bool:
    return torch.cuda.is_available()


def run(case: str, *, repeat: int = 5, name: str = "full") -> Iterator[CaseResult]:
    """Tokens per second; medians over the rounds, of the shares too."""
    setting = SETTINGS[name]
    if setting.device == "cuda" and not available():
        raise SystemExit(f"case {case}: there is no CUDA GPU here, so nothing was measured")
    rounds = _measured(name, setting, repeat)
    ours = setting.tokens / statistics.median(each.streamed for each in rounds)
    shares = [each.share_of_peak(setting) for each in rounds]
    details = {
        "device": _device_name(setting),
        "device memory limit": f"{setting.limit_bytes / 2**30:g} GiB",
        "share of bf16 peak": round(statistics.median(shares), 3),
        "peak TFLOP/s": round(statistics.median(_both(rounds)) / 1e12, 2),
        **_by_round(rounds),
        "most reserved bytes": rounds[-1].told.get("reserved"),
        "line": rounds[-1].told["line"],
        "batch": [setting.microbatches, setting.sequence],
        "repeat": repeat,
    }
    theirs = setting.tokens / statistics.median(each.resident(setting) for each in rounds)
    yield CaseResult(case=case, ours=ours, theirs=theirs, unit="tokens/s", details=details)
    if setting.device == "cuda" and importlib.util.find_spec("deepspeed"):
        yield _against_deepspeed(case, name, setting, ours, repeat)


def _measured(name: str, setting: Setting, repeat: int) -> list[_Round]:
    arguments = {
        "streamed": ("streamed", "--layers", setting.layers),
        "few": ("resident", "--layers", setting.few),
        "more": ("resident", "--layers", setting.more),
    }
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(TimedChild(_SIDE, [*map(str, given), "--setting", name]))
            for side, given in arguments.items()
        }
        return [_round(setting, sides) for _ in range(WARM_UP + repeat)][WARM_UP:]


def _round(setting: Setting, sides: Mapping[str, TimedChild]) -> _Round:
    before = product_rate(setting)
    streamed = sides["streamed"].step()
    after = product_rate(setting)
    return _Round(
        streamed=streamed["seconds"],
        few=sides["few"].step()["seconds"],
        more=sides["more"].step()["seconds"],
        peak=(before, after),
        told=streamed,
    )


def product_rate(setting: Setting) -> float:
    """Operations per second of a large bf16 product, into memory that is there already."""
    size = setting.product_size
    left = torch.randn(size, size, device=setting.device).bfloat16()
    right = torch.randn(size, size, device=setting.device).bfloat16()
    result = left @ right
    times: list[float] = []
    for _ in range(10):
        _wait(setting)
        start = time.perf_counter()
        for _ in range(5):
            torch.matmul(left, right, out=result)
        _wait(setting)
        times.append((time.perf_counter() - start) / 5)
    return 2.0 * size**3 / statistics.median(times)


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def _device_name(setting: Setting) -> str:
    return torch.cuda.get_device_name() if setting.device == "cuda" else "no GPU: the CPU"


def _both(rounds: Sequence[_Round]) -> list[float]:
    return [rate for each in rounds for rate in each.peak]


def _by_round(rounds: Sequence[_Round]) -> dict[str, Any]:
    """What each round gave, so that a reader sees how much it varies."""
    return {
        "seconds": {
            "streamed": [round(each.streamed, 3) for each in rounds],
            "few": [round(each.few, 3) for each in rounds],
            "more": [round(each.more, 3) for each in rounds],
        },
    }


def _against_deepspeed(
    case: str, name: str, setting: Setting, ours: float, repeat: int
) -> CaseResult:
    with TimedChild(_THEIRS, ["--setting", name]) as child:
        steps = [child.step() for _ in range(WARM_UP + repeat)][WARM_UP:]
    seconds = [step["seconds"] for step in steps]
    return CaseResult(
        case=f"{case}_deepspeed",
        ours=ours,
        theirs=setting.tokens / statistics.median(seconds),
        unit="tokens/s",
        details={
            "most reserved bytes": {"theirs": steps[-1]["reserved"]},
            "seconds": {"theirs": [round(each, 3) for each in seconds]},
            "order": "after ours, not in turn: host memory holds one of them",
            "repeat": repeat,
        },
    )

"""Case `xl`: GPT-2 XL (1.56 billion weights), AdamW, 4,096 tokens per update, in 4 GiB.

Ours is streamed from disk in a process that the kernel limits to 4 GiB of private writable memory.
Theirs is the same layers with everything resident, without a limit: measured on models of 1 and of
16 layers, which fit, and carried on to 48 by the time that a layer adds. Beside them: the share of
the compute limit, which is the time of the step's matrix products alone over the step's
(weight_streaming_xl_products.py), and how plain PyTorch ends within the same limit.

All of it in turn: products, a streamed step, products again, a resident step of either model. A
streamed step takes minutes, in which a shared host's speed changes: what it is compared with is the
mean of what was measured just before and just after it. A round takes about four minutes; the
first does not count.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.timed_child import ChildError, TimedChild
from benchmarks.weight_streaming_case import CaseResult, carried_on
from benchmarks.weight_streaming_xl_products import product_seconds
from benchmarks.weight_streaming_xl_side import MICROBATCHES, SEQUENCE

__all__ = ["run"]

LAYERS = 48
LIMIT = "4GiB"
FEW, MORE = 1, 16
"""Layers of the resident models: as many as fit in 24 GiB beside the streamed one."""

WARM_UP = 1
_SIDE = "benchmarks.weight_streaming_xl_side"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resident:
    """Seconds of a step of either model."""

    few: float
    more: float

    @property
    def all_layers(self) -> float:
        """A step of all layers, had they fitted."""
        return carried_on((self.few, self.more), (FEW, MORE), LAYERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """A streamed step, and what was measured before and after it; seconds. line: the streamed
    run's summary."""

    streamed: float
    residents: tuple[_Resident, _Resident]
    products: tuple[float, float]
    line: str

    @property
    def resident(self) -> float:
        return statistics.mean(each.all_layers for each in self.residents)

    @property
    def limit_share(self) -> float:
        return statistics.mean(self.products) / self.streamed


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """Tokens per second; medians over the rounds, of the shares too."""
    rounds = _measured(repeat)
    tokens = MICROBATCHES * SEQUENCE
    yield CaseResult(
        case=case,
        ours=tokens / statistics.median(each.streamed for each in rounds),
        theirs=tokens / statistics.median(each.resident for each in rounds),
        unit="tokens/s",
        details={
            "memory limit": LIMIT,
            "share of compute limit": round(statistics.median(r.limit_share for r in rounds), 3),
            **_by_round(rounds),
            "line": rounds[-1].line,
            "plain PyTorch in the same limit": plain_end(),
            "repeat": repeat,
        },
    )


def _measured(repeat: int) -> list[_Round]:
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
        before = [_resident(sides) for _ in range(WARM_UP + 1)][-1]
        rounds: list[_Round] = []
        for _ in range(WARM_UP + repeat):
            rounds.append(_round(sides, before))
            before = rounds[-1].residents[1]
        return rounds[WARM_UP:]


def _round(sides: Mapping[str, TimedChild], resident_before: _Resident) -> _Round:
    products_before = product_seconds(LAYERS)
    streamed = sides["streamed"].step()
    products_after = product_seconds(LAYERS)
    return _Round(
        streamed=streamed["seconds"],
        residents=(resident_before, _resident(sides)),
        products=(products_before, products_after),
        line=streamed["line"],
    )


def _resident(sides: Mapping[str, TimedChild]) -> _Resident:
    return _Resident(few=sides["few"].step()["seconds"], more=sides["more"].step()["seconds"])


def _by_round(rounds: Sequence[_Round]) -> dict[str, Any]:
    """What each round gave, so that a reader sees how much it varies."""
    return {
        "seconds": {
            "streamed": [round(r.streamed, 2) for r in rounds],
            "few": [round(each.few, 2) for each in _residents(rounds)],
            "more": [round(each.more, 2) for each in _residents(rounds)],
            "products": [[round(seconds, 1) for seconds in r.products] for r in rounds],
        },
        "ratios": [round(r.resident / r.streamed, 3) for r in rounds],
        "shares of compute limit": [round(r.limit_share, 3) for r in rounds],
    }


def _residents(rounds: Sequence[_Round]) -> list[_Resident]:
    """Before the first round and after each."""
    return [rounds[0].residents[0], *(each.residents[1] for each in rounds)]


def plain_end() -> str:
    """How the plain loop ends within the limit."""
    with TimedChild(_SIDE, ["plain", "--layers", str(LAYERS), "--limit", LIMIT]) as child:
        try:
            child.step()
        except ChildError as failed:
            return str(failed).strip().splitlines()[-1]
    return "takes a step"

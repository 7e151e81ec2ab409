"""Case `summary`: what the model of a step predicts, against the step.

    python -m benchmarks.weight_streaming_summary ram|disk --batch_size N     (stepped from outside)

Decides that the prediction is made from the parts as measured in every other step, and compared
with the steps between those, so that both see the same machine. `ratio` is predicted / measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.timed_child import TimedChild, serve_steps
from benchmarks.weight_streaming_case import CaseResult
from benchmarks.weight_streaming_side import make_side
from openwafer.runtime.timing.summary import RunSummary
from openwafer.runtime.timing.timeline import StepRecord, Timeline

__all__ = ["run"]

BATCH_SIZE = 4
STORES = ("ram", "disk")


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """Milliseconds per step, a result for each store; `repeat` steps on either side, after one
    each that warms up."""
    for store in STORES:
        arguments = [store, "--batch_size", str(BATCH_SIZE)]
        with TimedChild("benchmarks.weight_streaming_summary", arguments) as side:
            told = [side.step() for _ in range(2 + 2 * repeat)][-1]
        yield CaseResult(
            case=f"{case}_{store}",
            ours=1e3 * told["predicted_seconds"],
            theirs=1e3 * told["measured_seconds"],
            unit="ms",
            details={"line": told["line"], "repeat": repeat},
        )


class _Turns:
    """Gives steps to two summaries in turn."""

    def __init__(self, *summaries: RunSummary) -> None:
        self._summaries = summaries
        self._count = 0

    def add(self, record: StepRecord) -> None:
        self._summaries[self._count % len(self._summaries)].add(record)
        self._count += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("store", choices=STORES)
    parser.add_argument("--batch_size", type=int, required=True)
    arguments = parser.parse_args()
    predicts, measures = (RunSummary(on_disk=arguments.store == "disk") for _ in range(2))
    timeline = Timeline([_Turns(predicts, measures)])
    with make_side(arguments.store, arguments.batch_size, recorder=timeline) as take_step:

        def step(number: int) -> Mapping[str, Any]:
            timeline.begin_step(number)
            take_step(number)
            timeline.end_step()
            one, other = (
                summary.result(
                    prefetch_depth=timeline.prefetch_depth,
                    returns_waiting=timeline.returns_waiting,
                )
                for summary in (predicts, measures)
            )
            if one is None or other is None:
                return {}
            return {
                "predicted_seconds": one.predicted_seconds,
                "measured_seconds": other.measured.step_seconds,
                "line": one.line,
            }

        serve_steps(step)


if __name__ == "__main__":
    main()

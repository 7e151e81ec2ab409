"""Where the time of a run went, in one line, and what would change it.

Decides which steps count, which changes are weighed, and the words. Does not decide how seconds
are shared out (breakdown.py) or what a step should take (step_model.py), which also says how much
each change would bring.

The first step of a run is left out where there are more: it warms caches and compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from openwafer.runtime.timing.breakdown import KINDS, Breakdown, BreakdownSum, break_down
from openwafer.runtime.timing.step_model import PartsSum, StepParts, predict_step_seconds
from openwafer.runtime.timing.timeline import StepRecord

__all__ = ["RunSummary", "StepSummary"]

_WORTH = 0.03
"""A change is named where it would shorten the step by at least this share: less is noise."""
_MORE_MICROBATCHES = 2
_SHOWN_SECONDS = 0.0005
_MAX_SHOWN = 2
"""The best change may be the dearest one (memory for the whole store, say)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """The mean step of a run.

    predicted_seconds: by the model, of the parts as measured. changes: what would shorten the step,
    the best first, with the seconds (for the same samples) that it would then take.
    """

    num_steps: int
    measured: Breakdown
    predicted_seconds: float
    changes: tuple[tuple[str, float], ...]

    @property
    def bound_by(self) -> str:
        return self.measured.bound_by

    @property
    def line(self) -> str:
        """All of it in one line."""
        step, measured = self.measured.step_seconds, self.measured
        work = [f"{kind} {measured.busy_seconds[kind]:.3f}" for kind in KINDS]
        waits = {**measured.exposed_seconds, "other": measured.other_seconds}
        waits.pop("compute")
        exposed = [f"{name} {s:.3f}" for name, s in waits.items() if s >= _SHOWN_SECONDS]
        hidden_not = f"{', '.join(exposed)} s" if exposed else "nothing"
        return (
            f"Step {step:.3f} s: {', '.join(work)} s; not hidden behind compute: {hidden_not}. "
            f"Bound by {self.bound_by} ({self._share():.0%}). "
            f"The model of its parts predicts {self.predicted_seconds:.3f} s "
            f"({self.predicted_seconds / step - 1:+.0%}). {self._advice()}"
        )

    def _share(self) -> float:
        shares = {**self.measured.exposed_seconds, "other": self.measured.other_seconds}
        return max(shares.values()) / self.measured.step_seconds

    def _advice(self) -> str:
        if not self.changes:
            return "To change: nothing here that would shorten it by much."
        shown = [f"{what} (to {seconds:.3f} s)" for what, seconds in self.changes[:_MAX_SHOWN]]
        return f"To change: {'; or '.join(shown)}."

    def fields(self) -> Mapping[str, object]:
        """For performance.json; seconds per step."""
        measured = self.measured
        return {
            "step_seconds": measured.step_seconds,
            "predicted_step_seconds": self.predicted_seconds,
            "busy_seconds_per_step": dict(measured.busy_seconds),
            "exposed_seconds_per_step": {
                **measured.exposed_seconds,
                "other": measured.other_seconds,
            },
            "bound_by": self.bound_by,
            "suggestions": [what for what, _ in self.changes],
        }


@dataclass(slots=True)
class _Sums:
    breakdowns: BreakdownSum = field(default_factory=BreakdownSum)
    parts: PartsSum = field(default_factory=PartsSum)

    def add(self, record: StepRecord) -> None:
        self.breakdowns.add(break_down(record))
        self.parts.add(record)


class RunSummary:
    """Takes the steps of a run as they end; keeps sums only.

    Args:
        on_disk: whether the weight store is on disk.
    """

    def __init__(self, *, on_disk: bool) -> None:
        self._on_disk = on_disk
        self._first: _Sums | None = None
        self._rest = _Sums()

    def add(self, record: StepRecord) -> None:
        """Take a step."""
        if self._first is None:
            self._first = _Sums()
            self._first.add(record)
        else:
            self._rest.add(record)

    def result(self, *, prefetch_depth: int, returns_waiting: int = 1) -> StepSummary | None:
        """The mean step; None before the first has ended.

        Args:
            prefetch_depth: how many layers ahead the run fetches.
            returns_waiting: how many layers' gradients may wait for the store.
        """
        sums = self._rest if self._rest.breakdowns.num_steps else self._first
        if sums is None:
            return None
        measured = sums.breakdowns.mean()
        parts = sums.parts.mean(measured.other_seconds + measured.exposed_seconds["input"])
        parts = replace(parts, returns_waiting=returns_waiting)
        predicted = predict_step_seconds(parts, prefetch_depth=prefetch_depth)
        return StepSummary(
            num_steps=sums.breakdowns.num_steps,
            measured=measured,
            predicted_seconds=predicted,
            changes=self._changes(parts, measured, predicted, prefetch_depth),
        )

    def _changes(
        self, parts: StepParts, measured: Breakdown, predicted: float, depth: int
    ) -> tuple[tuple[str, float], ...]:
        """What the model says would help. Each is weighed against its own prediction, and taken
        from the measured step, so that an error of the model does not pass for a gain."""
        weighed = [
            (
                f"fetch further ahead (prefetch depth {depth + 1}; needs device memory for one "
                "more layer)",
                predict_step_seconds(parts, prefetch_depth=depth + 1),
            ),
            (
                f"{_MORE_MICROBATCHES} times the microbatches per update (`grad_accum_steps`)",
                predict_step_seconds(_longer(parts), prefetch_depth=depth) / _MORE_MICROBATCHES,
            ),
            (
                "faster input: more workers, or num_workers of the data loader",
                predicted - measured.exposed_seconds["input"],
            ),
        ]
        if parts.recompute:
            once = {item: s - parts.recompute.get(item, 0.0) for item, s in parts.compute.items()}
            weighed.append(
                (
                    "keep activations (more device memory, or --activations spill)",
                    predict_step_seconds(replace(parts, compute=once), prefetch_depth=depth),
                )
            )
        if self._on_disk:
            in_ram = replace(parts, fetch=dict.fromkeys(parts.fetch, 0.0))
            weighed.append(
                (
                    "--weight_store ram, or a faster disk",
                    predict_step_seconds(in_ram, prefetch_depth=depth),
                )
            )
        step = measured.step_seconds
        gains = [(what, step - (predicted - seconds)) for what, seconds in weighed]
        worth = [(what, max(0.0, s)) for what, s in gains if step - s >= _WORTH * step]
        return tuple(sorted(worth, key=lambda change: change[1]))


def _longer(parts: StepParts) -> StepParts:
    """More microbatches per update: more compute for the same traffic. Input grows with it."""
    compute = {item: _MORE_MICROBATCHES * s for item, s in parts.compute.items()}
    return replace(parts, compute=compute, alone_seconds=_MORE_MICROBATCHES * parts.alone_seconds)

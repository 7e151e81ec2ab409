"""`openwafer bench machine-model`: predicted against published, with the relative error.

Decides how rows are run and printed. Which rows there are is in machine_model_rows.py.

    python -m benchmarks.machine_model [--quick] [--only WORD] [--out FILE.md]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine_model_rows import (
    KERNEL_ROWS,
    NOT_USABLE,
    PLAN_ROWS,
    STREAMING_ROWS,
    PlanRow,
)

__all__ = ["Result", "main", "results"]

_LIMIT = 0.35


@dataclass(frozen=True)
class Result:
    """One compared number. `row`: its identifier in the open set, if it is there."""

    group: str
    row: str
    what: str
    predicted: float
    published: float
    unit: str
    source: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def results(*, quick: bool = False, only: str = "") -> Iterator[Result]:
    """Every usable row, one after the other. `quick` leaves out the deep networks."""
    for row in PLAN_ROWS:
        if only.lower() in row.name.lower() and not (quick and row.slow):
            yield from _plan_results(row)
    for name, build, machine, settings in STREAMING_ROWS:
        if only.lower() in name.lower():
            yield from _streaming_results(name, build, machine, settings)
    for kernel in KERNEL_ROWS:
        if only.lower() in kernel.what.lower():
            yield Result(
                "kernels", kernel.row, kernel.what, kernel.predict(_machine("wse2")),
                kernel.published, kernel.unit, kernel.source,
            )  # fmt: skip


def _plan_results(row: PlanRow) -> Iterator[Result]:
    plan = _plan(row)
    for identifier, what, published, unit, read in row.readings:
        group = "plans" if "[est]" in unit else "training, pipelined"
        yield Result(group, identifier, what, read(plan), published, unit, row.source)


@cache
def _machine(name: str) -> Any:
    from openwafer.machine.spec import load_machine

    return load_machine(name)


def _optimizer() -> Any:
    """AdamW in mixed precision: two fp32 moments and an fp32 copy of each weight."""
    from openwafer.kernels.kernel import OptimizerCost

    return OptimizerCost(name="adamw", state_bytes_per_parameter=12, ops_per_parameter=14)


def _captured(network: Any, mode: str) -> Any:
    from openwafer.frontends.torch.capture import capture_module
    from openwafer.kernels.match import match
    from openwafer.plan.layers import cut_layers

    module, batch = network
    program = capture_module(module, batch).program
    return cut_layers(program), match(program, execution_mode=mode), program  # type: ignore[arg-type]


def _plan(row: PlanRow) -> Any:
    from openwafer.plan.plan import build_plan

    layers, graph, program = _captured(row.build(), row.mode)
    return build_plan(
        program, layers, graph, _machine(row.machine), plan_hash="0" * 64, optimizer=_optimizer()
    )


def _streaming_results(name: str, build: Any, machine: str, settings: Any) -> Iterator[Result]:
    from openwafer.plan.fabric.streaming import plan_streaming

    captured = _captured(build(4), "weight_streaming")
    for identifier, what, batch, systems, published, source in settings:
        _, predicted = plan_streaming(
            *captured, _machine(machine), optimizer=_optimizer(), num_systems=systems,
            batch_size=batch,
        )  # fmt: skip
        yield Result(
            "training, weight streaming", identifier, f"{name}, {what}",
            predicted.samples_per_second, published, "samples/s", source,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------- output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="predicted against published numbers")
    parser.add_argument("--quick", action="store_true", help="without the deep networks")
    parser.add_argument("--only", default="", help="rows whose network has this word in its name")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    done: list[Result] = []
    lines = ["| row | what | predicted | published | error | unit | source |",
             "|---|---|---:|---:|---:|---|---|"]  # fmt: skip
    print("\n".join(lines))
    for result in results(quick=arguments.quick, only=arguments.only):
        done.append(result)
        lines.append(_line(result))
        print(lines[-1], flush=True)
    lines += ["", *_summary(done), "", *_fitted(), "", *_unusable()]
    print("\n".join(lines[len(done) + 2 :]))
    print(f"\n{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if arguments.out:
        head = "# Predicted against published\n\n`openwafer bench machine-model`\n\n"
        arguments.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _line(result: Result) -> str:
    return (
        f"| {result.row} | {result.what} | {_number(result.predicted)} | "
        f"{_number(result.published)} | {result.error:+.1%} | {result.unit} | {result.source} |"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _summary(done: Sequence[Result]) -> Iterator[str]:
    yield (
        "The constants below were chosen with these rows in sight, so this is how well the model "
        "describes them, not how well it foretells others."
    )
    yield ""
    for group in [*dict.fromkeys(r.group for r in done), "all"]:
        errors = [abs(r.error) for r in done if group in (r.group, "all")]
        if errors:
            far = sum(error > _LIMIT for error in errors)
            yield (
                f"- {group}: {len(errors)} rows, median {median(errors):.1%}, largest "
                f"{max(errors):.1%}, {far} beyond {_LIMIT:.0%}"
            )


def _fitted() -> Iterator[str]:
    yield "Fitted constants (all else is from specification); the last is a choice between two:"
    yield ""
    machine = _machine("wse2_r1")
    for name, source in machine.fitted:
        value: Any = getattr(machine, name)
        shown = (
            f"{value.float16} in 16 bits, {value.float32} in fp32"
            if hasattr(value, "float16")
            else f"{value:,}"
        )
        yield f"- `{name}` = {shown}: {source.removeprefix('fitted: ')}"


def _unusable() -> Iterator[str]:
    yield "Not usable:"
    yield ""
    for what, reason in NOT_USABLE:
        yield f"- {what}: {reason}"


if __name__ == "__main__":
    sys.exit(main())

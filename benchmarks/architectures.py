"""`python -m benchmarks.architectures`: which architectures validate, as docs/architectures.md.

Decides how each architecture is tried (captured for training, matched in both modes) and the page's
form. Which architectures there are is in architecture_zoo.py. They run in batches, one process for
each, so that memory stays bounded; everything that could vary but the times is fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_BATCH_SIZE = 12
_GROUPS = ("text encoder", "text decoder", "encoder-decoder", "vision", "torch.nn")
_FIXED_ENVIRONMENT = {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
_HOME = re.compile(r"/\S*/(?:site-packages/|(?=benchmarks/))")
"""What differs from machine to machine in a path."""


@dataclass(frozen=True)
class Row:
    """What was found about one architecture. `explanation` is empty where it validates."""

    name: str
    group: str
    verdict: str
    num_operations: int
    coverage: dict[str, float]
    capture_seconds: float
    match_seconds: float
    explanation: str


def try_architecture(name: str) -> Row:
    """Build, capture and match one architecture of the list."""
    import torch

    from benchmarks.architecture_zoo import ARCHITECTURES
    from openwafer.errors import OpenWaferError
    from openwafer.frontends.torch.capture import capture_module
    from openwafer.kernels.kernel import BOTH_MODES
    from openwafer.pipeline import validate_program

    architecture = next(a for a in ARCHITECTURES if a.name == name)
    torch.manual_seed(1)
    model, batch = architecture.build()
    began = time.perf_counter()
    try:
        program = capture_module(model, batch).program
    except OpenWaferError as error:
        seconds = time.perf_counter() - began
        verdict = "not captured"
        return Row(name, architecture.group, verdict, 0, {}, seconds, 0.0, _portable(str(error)))
    captured = time.perf_counter()
    reports = [validate_program(program, mode) for mode in BOTH_MODES]
    matched = (time.perf_counter() - captured) / len(reports)
    refused = [report for report in reports if not report.ok]
    return Row(
        name,
        architecture.group,
        "refused" if refused else "validated",
        len(program.operations),
        {report.execution_mode: report.coverage for report in reports},
        captured - began,
        matched,
        _portable("\n".join(refused[0].verdict_lines())) if refused else "",
    )


def _portable(text: str) -> str:
    return _HOME.sub("", text)


def run_in_batches(names: Sequence[str]) -> list[Row]:
    """Try the architectures in processes of their own, `_BATCH_SIZE` in each."""
    rows: list[Row] = []
    for start in range(0, len(names), _BATCH_SIZE):
        command = [sys.executable, "-m", "benchmarks.architectures", "--child"]
        done = subprocess.run(
            [*command, *names[start : start + _BATCH_SIZE]],
            env={**os.environ, **_FIXED_ENVIRONMENT},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        rows.extend(Row(**json.loads(line)) for line in lines)
        print(f"{len(rows)} of {len(names)}", file=sys.stderr)
    return rows


def page(rows: Sequence[Row]) -> str:
    """The table, with a summary above it and every refusal below it."""
    import torch
    import transformers

    lines = [
        "# Architectures",
        "",
        "Made by `python -m benchmarks.architectures`; do not edit. Small random configurations,",
        "nothing downloaded, each captured in training form with its loss and matched in both",
        "execution modes. Seconds are on two CPU cores.",
        "",
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.",
        "",
        "| group | architectures | validated in both modes |",
        "|---|---|---|",
    ]
    for group in _GROUPS:
        members = [row for row in rows if row.group == group]
        good = sum(row.verdict == "validated" for row in members)
        if members:
            share = f"{good} ({good / len(members):.0%})"
            lines.append(f"| {group} | {len(members)} | {share} |")
    for group in _GROUPS:
        lines += ["", f"## {group.capitalize() if group != 'torch.nn' else group}", ""]
        lines += ["| architecture | verdict | layer pipelined | weight streaming | operations "
                  "| capture (s) | match (s) |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [_row_text(row) for row in rows if row.group == group]
    lines += ["", "## What was not validated, as the user reads it", ""]
    for row in rows:
        if row.explanation:
            lines += [f"### {row.name}", "", "```", row.explanation, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _row_text(row: Row) -> str:
    shares = [f"{row.coverage[mode]:.1%}" if row.coverage else "–" for mode in _MODES]
    return (
        f"| {row.name} | {row.verdict} | {shares[0]} | {shares[1]} | {row.num_operations or '–'} "
        f"| {row.capture_seconds:.1f} | {row.match_seconds:.2f} |"
    )


_MODES = ("layer_pipelined", "weight_streaming")


def main(argv: Sequence[str] | None = None) -> int:
    """Try all architectures (or those named) and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures")
    parser.add_argument("names", nargs="*", help="these alone, printed instead of written")
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        warnings.simplefilter("ignore")
        for name in arguments.names:
            print(json.dumps(asdict(try_architecture(name))), flush=True)
        return 0
    from benchmarks.architecture_zoo import ARCHITECTURES

    rows = run_in_batches(arguments.names or [a.name for a in ARCHITECTURES])
    if arguments.names:
        print(page(rows))
    else:
        arguments.output.write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

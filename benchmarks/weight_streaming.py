"""Training of models in both modes against what one would use instead.

    python -m benchmarks.weight_streaming [--cases resident,ram,disk] [--repeat 5]

Prints one JSON line per case: ours, theirs, their ratio, the unit, and the machine. Both sides run
in processes of their own and step in turn; a figure is the median of the repetitions.

Decides which cases there are. What a case compares is in its module.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.weight_streaming_case import CaseResult

CASES: Mapping[str, str] = {
    "resident": "benchmarks.weight_streaming_speed",
    "ram": "benchmarks.weight_streaming_speed",
    "disk": "benchmarks.weight_streaming_speed",
    "xl": "benchmarks.weight_streaming_xl",
    "memory": "benchmarks.weight_streaming_memory",
    "deepspeed": "benchmarks.weight_streaming_deepspeed",
    "fsdp": "benchmarks.weight_streaming_fsdp",
    "summary": "benchmarks.weight_streaming_summary",
    "gpu": "benchmarks.weight_streaming_gpu",
}
"""Case → the module whose `run(case, repeat=…)` gives its results, one or several."""

NEED_GPU = frozenset({"gpu"})

Run = Callable[..., Iterator[CaseResult]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    here = [case for case in CASES if case not in NEED_GPU or torch.cuda.is_available()]
    parser.add_argument("--cases", default=",".join(here), help="comma-separated")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    chosen = arguments.cases.split(",")
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    for case in chosen:
        run: Run = importlib.import_module(CASES[case]).run
        for result in run(case, repeat=arguments.repeat):
            print(json.dumps(result.line()), flush=True)


if __name__ == "__main__":
    main()

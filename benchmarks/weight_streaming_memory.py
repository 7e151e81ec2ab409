"""Case `memory`: how the peak memory of a streamed step grows with the number of layers.

GPT-2 small's width, 12, 24 and 48 layers, one sequence of 256 tokens, weights on disk. Each model
is trained for two steps in a process of its own, whose private writable memory (VmData) is read all
the while. Ours and theirs are the peaks of 12 and 48 layers, so that 1 is no growth.

    python -m benchmarks.weight_streaming_memory recompute 12      (one such process)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.weight_streaming_batches import make_batches
from benchmarks.weight_streaming_case import CaseResult
from benchmarks.weight_streaming_xl_side import make_ours
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.frontends.torch.weights_in_files import WeightsInFiles
from openwafer.runtime.memory.activations import Policy
from openwafer.runtime.memory.host_memory import process_bytes
from openwafer.zoo import build

__all__ = ["run"]

DEPTHS = (12, 24, 48)
SEQUENCE = 256
BUDGET_BYTES = 2 << 30
"""More than is needed. With a budget, most of what is freed goes back at once, so that the peak is
what is in use, but for an eighth of the budget at most."""


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """MiB, the median of `repeat` runs: threads meet differently each time."""
    policies: tuple[Policy, ...] = ("recompute", "spill", "keep")
    for policy in policies:
        rounds = [[_peak_mib(policy, layers) for layers in DEPTHS] for _ in range(repeat)]
        peaks = [statistics.median(of_depth) for of_depth in zip(*rounds, strict=True)]
        yield CaseResult(
            case=f"{case}: {policy}",
            ours=peaks[0],
            theirs=peaks[-1],
            unit="MiB",
            details={
                "layers": list(DEPTHS),
                "peaks": [round(peak) for peak in peaks],
                "runs": [[round(peak) for peak in peaks] for peaks in rounds],
            },
        )


def _peak_mib(policy: Policy, layers: int) -> float:
    done = subprocess.run(
        [sys.executable, "-m", __name__, policy, str(layers)],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[1],
    )
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


class _Watch(threading.Thread):
    """Reads the process's memory a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, process_bytes())


def _train(policy: Policy, layers: int) -> float:
    """Two steps; the peak in MiB."""
    batches = make_batches(1, (1, SEQUENCE), 50257)
    torch.manual_seed(1)
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        with WeightsInFiles(Path(folder)):
            model = build("gpt2/small", layers=layers, max_position_embeddings=SEQUENCE, **rates)
        rules = StreamingRules(
            weight_store=f"disk:{folder}", device_memory_bytes=BUDGET_BYTES, activations=policy
        )
        # `auto` would compile the deeper models alone, so that their peaks could not be compared.
        executor = make_ours(model, "weight_streaming", rules, batches, layer_compiler="eager")
        watch = _Watch()
        watch.start()
        for step in range(2):
            executor.train_step(batches, step=step)
        watch.over.set()
        watch.join()
        executor.close()
    return watch.peak_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("policy", choices=["recompute", "spill", "keep"])
    parser.add_argument("layers", type=int)
    arguments = parser.parse_args()
    print(json.dumps({"peak_mib": _train(arguments.policy, arguments.layers)}))


if __name__ == "__main__":
    main()

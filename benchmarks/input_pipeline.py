"""Whether the zoo's own data keep up with the steps that they feed.

    python -m benchmarks.input_pipeline [--models bert/tiny,gpt2/tiny] [--seconds 2]

For each tiny model, whose steps are the shortest: samples per second that its input pipeline gives
(no worker processes, batches of the training section), and that plain PyTorch trains (forward,
backward, AdamW, both threads). The two take turns; medians of the turns. A ratio of 1 would mean
that half of the time goes into the input; with `num_workers: 1` it would mean none.

Prints one JSON line per model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence

import torch

from openwafer.data import build_dataset, make_dataloader, measure_rate
from openwafer.zoo.catalog import build, family_of, load, names

TURNS = 5


def measure(name: str, seconds: float) -> dict[str, object]:
    """One model's two rates, in samples per second."""
    section = dict(load(name).raw["train_input"])
    dataset = build_dataset(family_of(name).task, section, "train")
    loader = make_dataloader(dataset, {**section, "num_workers": 0}, "train")
    torch.manual_seed(0)
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = next(iter(loader))

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()

    step()
    input_rates: list[float] = []
    step_rates: list[float] = []
    for _ in range(TURNS):
        rate = measure_rate(loader, max_batches=1_000_000, max_seconds=seconds / TURNS)
        input_rates.append(rate.samples_per_sec)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / TURNS:
            step()
            steps += 1
        step_rates.append(steps * len(next(iter(batch.values()))) / (time.perf_counter() - began))
    given, trained = statistics.median(input_rates), statistics.median(step_rates)
    return {
        "model": name,
        "input_samples_per_sec": round(given),
        "step_samples_per_sec": round(trained),
        "ratio": round(given / trained, 1),
        "share_of_a_step_percent": round(100 * trained / (given + trained), 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(n for n in names() if n.endswith("/tiny")))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side of each model")
    arguments = parser.parse_args(argv)
    for name in arguments.models.split(","):
        print(json.dumps(measure(name, arguments.seconds)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

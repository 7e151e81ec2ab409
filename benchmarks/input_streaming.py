"""How fast workers stream batches to a coordinator on one machine.

    python -m benchmarks.input_streaming [--seconds 5] [--repeat 5] [--cases bytes …]
    python -m benchmarks.input_streaming --memory_minutes 10 [--cases bytes …]

Three cases, each with two worker processes and a coordinator that discards what it gets:
    bytes         batches of 16 MiB: bytes per second (goal 2 GB/s)
    connections   the same without shared memory, as between machines: through TCP over loopback
    samples       fc_mnist's samples (784 float32 and a label, batch 256) through the DataLoader of
                  each worker: samples per second (goal 50,000)

Prints one JSON line per case: the rate of each repetition, their median, the goal, the machine.
With `--memory_minutes`, each case runs for that long, and the line says for each process how much
memory it held in the second tenth of the time, in the last one, and at most, and the slope of a
line through all looks (least squares, the first tenth left out), in bytes per minute. Pages of
shared memory count for each process that has touched them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from openwafer.streaming import auth
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.tasks import TaskEnvironment
from openwafer.streaming.worker import run_worker, worker_shard

NUM_WORKERS = 2
BATCH_BYTES = 16 << 20
GOALS = {"bytes": 2e9, "connections": None, "samples": 50_000.0}
LOOK_SECONDS = 0.5


class SameBatch:
    """The same large batch over and over: nothing but the transport takes time."""

    def __init__(self) -> None:
        self.batch = torch.zeros(BATCH_BYTES // 4)

    def __len__(self) -> int:
        return 1 << 20

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(len(self)):
            yield self.batch


def loader(case: str) -> Any:
    if case != "samples":
        return SameBatch()
    torch.manual_seed(0)
    images, labels = torch.rand(12_800, 784), torch.randint(10, (12_800,))
    return DataLoader(TensorDataset(images, labels), batch_size=256, shuffle=True, drop_last=True)


def stream(case: str, rank: int, address: str, secret_file: Path) -> None:
    """A worker process."""
    torch.set_num_threads(1)
    place = TaskEnvironment(
        rank=rank, num_tasks=NUM_WORKERS + 1, secret_file=secret_file, secret_is_given=True
    )
    shard = worker_shard(place)
    shards = case != "samples"
    run_worker(
        lambda mode: BatchSequence(loader(case), seed=1, shard=shard, already_sharded=shards),
        address,
        place,
        settings=StreamSettings(shared_slots=0) if case == "connections" else StreamSettings(),
    )


Looks = list[tuple[float, list[int]]]
"""Seconds since the first batch, and what each process holds, coordinator first."""


def measure(case: str, seconds: float, looks: Looks | None = None) -> float:
    """Bytes or samples per second. `looks` collects what the processes hold, twice a second."""
    with tempfile.TemporaryDirectory() as folder:
        secret_file = Path(folder) / "secret"
        secret = auth.create_secret(secret_file)
        context = multiprocessing.get_context("fork")
        with Coordinator("127.0.0.1:0", NUM_WORKERS, secret) as coordinator:
            workers = [
                context.Process(target=stream, args=(case, rank, coordinator.address, secret_file))
                for rank in range(1, NUM_WORKERS + 1)
            ]
            for worker in workers:
                worker.start()
            watched = [os.getpid(), *(worker.pid or 0 for worker in workers)]
            rate = _rate(coordinator, case, seconds, watched, looks)
        for worker in workers:
            worker.join(30)
    return rate


def _rate(
    coordinator: Coordinator, case: str, seconds: float, watched: list[int], looks: Looks | None
) -> float:
    source = coordinator.source("train")
    amount, epoch, began, looked = 0, 0, 0.0, 0.0
    while True:
        for batch in source.epoch(epoch):
            now = time.perf_counter()
            if not began:
                began = now  # the first batch only starts the clock
                continue
            amount += batch[1].shape[0] if case == "samples" else BATCH_BYTES
            if looks is not None and now - looked >= LOOK_SECONDS:
                looks.append((now - began, [_resident_bytes(pid) for pid in watched]))
                looked = now
            if now - began >= seconds:
                return amount / (now - began)
        epoch += 1


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_line(case: str, minutes: float) -> dict[str, Any]:
    looks: Looks = []
    rate = measure(case, 60 * minutes, looks)
    tenth = max(1, len(looks) // 10)
    settled = looks[tenth:]
    line: dict[str, Any] = {"case": f"memory, {case}", "minutes": minutes}
    line |= {"per_second": round(rate), "looks": len(looks)}
    for index, name in enumerate(["coordinator", *(f"worker {n + 1}" for n in range(NUM_WORKERS))]):
        held = [each[index] for _, each in settled]
        slope = statistics.linear_regression([at / 60 for at, _ in settled], held).slope
        line[name] = {
            "second_tenth_bytes": round(statistics.median(held[:tenth])),
            "last_tenth_bytes": round(statistics.median(held[-tenth:])),
            "most_bytes": max(each[index] for _, each in looks),
            "slope_bytes_per_minute": round(slope),
        }
    return line


def rate_line(case: str, rates: list[float]) -> dict[str, Any]:
    return {
        "case": case,
        "per_second": round(statistics.median(rates)),
        "all": [round(rate) for rate in sorted(rates)],
        "goal": GOALS[case],
        "workers": NUM_WORKERS,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory_minutes", type=float, help="watch memory instead, for so long")
    arguments = parser.parse_args()
    if arguments.memory_minutes:
        for case in arguments.cases:
            print(json.dumps(memory_line(case, arguments.memory_minutes)), flush=True)
        return
    found: dict[str, list[float]] = {case: [] for case in arguments.cases}
    for _ in range(arguments.repeat):
        for case, rates in found.items():
            rates.append(measure(case, arguments.seconds))
    for case, rates in found.items():
        print(json.dumps(rate_line(case, rates)), flush=True)


if __name__ == "__main__":
    main()

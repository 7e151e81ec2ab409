"""How fast workers stream batches to a coordinator on one machine.

    python -m benchmarks.input_streaming [--seconds 5] [--repeat 5]
    python -m benchmarks.input_streaming --memory_minutes 10

Two cases, each with two worker processes and a coordinator that discards what it gets:
    bytes     batches of 16 MiB: bytes per second over the sockets (goal 2 GB/s)
    samples   fc_mnist's samples (784 float32 and a label, batch 256) through the DataLoader of each
              worker: samples per second (goal 50,000)

Prints one JSON line per case: the median of the repetitions, the goal, and the machine. With
`--memory_minutes`, both cases run for that long together instead, and the line says how much memory
the coordinator and its workers held: in the second tenth of the time, in the last one, and at most.
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
from openwafer.streaming.tasks import TaskEnvironment
from openwafer.streaming.worker import run_worker, worker_shard

NUM_WORKERS = 2
BATCH_BYTES = 16 << 20
GOALS = {"bytes": 2e9, "samples": 50_000.0}


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
    if case == "bytes":
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
    shards = case == "bytes"
    run_worker(
        lambda mode: BatchSequence(loader(case), seed=1, shard=shard, already_sharded=shards),
        address,
        place,
    )


def measure(case: str, seconds: float, memory: list[int] | None = None) -> float:
    """Bytes or samples per second. `memory` collects what all processes hold, twice a second."""
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
            rate = _rate(coordinator, case, seconds, watched, memory)
        for worker in workers:
            worker.join(30)
    return rate


def _rate(
    coordinator: Coordinator,
    case: str,
    seconds: float,
    watched: list[int],
    memory: list[int] | None,
) -> float:
    source = coordinator.source("train")
    amount, epoch, began, looked = 0, 0, 0.0, 0.0
    while True:
        for batch in source.epoch(epoch):
            now = time.perf_counter()
            if not began:
                began = now  # the first batch only starts the clock
                continue
            amount += BATCH_BYTES if case == "bytes" else batch[1].shape[0]
            if memory is not None and now - looked >= 0.5:
                memory.append(sum(map(_resident_bytes, watched)))
                looked = now
            if now - began >= seconds:
                return amount / (now - began)
        epoch += 1


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch_memory(minutes: float) -> None:
    """Each case for half of the time."""
    for case in GOALS:
        memory: list[int] = []
        rate = measure(case, 30 * minutes, memory)
        tenth = max(1, len(memory) // 10)
        settled = memory[tenth:]
        line = {
            "case": f"memory, {case}",
            "minutes": minutes / 2,
            "per_second": round(rate),
            "second_tenth_bytes": round(statistics.median(settled[:tenth])),
            "last_tenth_bytes": round(statistics.median(settled[-tenth:])),
            "most_bytes": max(memory),
            "looks": len(memory),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory_minutes", type=float, help="watch memory instead, for so long")
    arguments = parser.parse_args()
    if arguments.memory_minutes:
        watch_memory(arguments.memory_minutes)
        return
    found: dict[str, list[float]] = {case: [] for case in GOALS}
    for _ in range(arguments.repeat):
        for case, rates in found.items():
            rates.append(measure(case, arguments.seconds))
    for case, rates in found.items():
        line = {
            "case": case,
            "per_second": round(statistics.median(rates)),
            "lowest": round(min(rates)),
            "highest": round(max(rates)),
            "goal": GOALS[case],
            "workers": NUM_WORKERS,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""A worker task as a process of its own, for the tests that kill one side.

python streaming_task.py worker ADDRESS RANK NUM_TASKS [slow|hang|fail|process]
python streaming_task.py coordinator NUM_WORKERS      prints its address, takes two batches, sleeps
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from openwafer.errors import OpenWaferError
from openwafer.streaming import auth
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.tasks import TaskEnvironment
from openwafer.streaming.worker import run_worker, worker_shard

SECRET_FILE = Path(os.environ["OPENWAFER_SECRET_FILE"])


def batches(how: str) -> Iterator[torch.Tensor]:
    for number in range(100_000):
        if how == "slow":
            time.sleep(0.02)
        if how == "hang" and number == 4:
            time.sleep(1000)
        if how == "fail" and number == 4:
            raise KeyError("no such label")  # the worker's own error
        yield torch.full((8,), float(number))


def worker(address: str, rank: str, num_tasks: str, how: str = "slow") -> None:
    environment = TaskEnvironment(
        rank=int(rank), num_tasks=int(num_tasks), secret_file=SECRET_FILE, secret_is_given=True
    )
    shard = worker_shard(environment)
    data = lambda: batches(how)  # noqa: E731
    if how == "process":
        data = DataLoader(TensorDataset(torch.zeros(100_000, 8)), batch_size=4, num_workers=1)
    run_worker(lambda mode: BatchSequence(data, seed=1, shard=shard), address, environment)


def coordinator(num_workers: str) -> None:
    with Coordinator("127.0.0.1:0", int(num_workers), auth.read_secret(SECRET_FILE)) as ours:
        print(ours.address, flush=True)
        epoch = ours.source("train").epoch(0)
        next(epoch)
        next(epoch)
        print("streaming", flush=True)
        time.sleep(1000)


if __name__ == "__main__":
    try:
        {"worker": worker, "coordinator": coordinator}[sys.argv[1]](*sys.argv[2:])
    except OpenWaferError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None

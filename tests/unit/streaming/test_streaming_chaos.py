"""Workers that are lost and come back, strangers that knock, all at random: nothing is lost or
repeated, and nothing hangs."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from openwafer.errors import StreamingError
from openwafer.streaming import auth, wire
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.tasks import TaskEnvironment
from openwafer.streaming.worker import run_worker, worker_shard

NUM_WORKERS = 3
SETTINGS = StreamSettings(
    handshake_timeout_seconds=1, connect_timeout_seconds=60, replace_timeout_seconds=120
)


def loader() -> DataLoader[Any]:
    x = torch.arange(61 * 3.0).reshape(61, 3)
    return DataLoader(TensorDataset(x, torch.arange(61)), batch_size=4, shuffle=True)


def values(batches: Iterator[Any]) -> list[Any]:
    return [[part.tolist() for part in batch] for batch in batches]


class Worker:
    """A worker in a thread; a new one takes the place of one that was lost."""

    def __init__(self, rank: int, address: str, secret_file: Path, stop: threading.Event) -> None:
        place = TaskEnvironment(
            rank=rank, num_tasks=NUM_WORKERS + 1, secret_file=secret_file, secret_is_given=True
        )
        shard = worker_shard(place)

        def live() -> None:
            while not stop.is_set():
                with contextlib.suppress(StreamingError, OSError):
                    run_worker(
                        lambda mode: BatchSequence(loader(), seed=5, shard=shard),
                        address,
                        place,
                        settings=SETTINGS,
                    )

        self.thread = threading.Thread(target=live, daemon=True)
        self.thread.start()


@contextmanager
def chaos(coordinator: Coordinator, num_events: int, seed: int) -> Iterator[list[str]]:
    """Loses workers and knocks as a stranger, until all events have happened or the body ends."""
    draw, over, events = random.Random(seed), threading.Event(), list[str]()
    host, port = coordinator.address.split(":")
    silent: list[socket.socket] = []

    def knock(data: bytes, stay: bool) -> None:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.sendall(data)
            silent.append(connection) if stay else connection.close()

    def lose() -> None:
        rank = draw.randint(1, NUM_WORKERS)
        with contextlib.suppress(OSError):
            coordinator._ledger.workers[rank].connection.shutdown(socket.SHUT_RDWR)

    def go_on() -> None:
        acts = {
            "lost": lose,
            "garbage": lambda: knock(draw.randbytes(draw.randint(1, 3000)), stay=False),
            "slow": lambda: knock(b"O", stay=True),
        }
        while len(events) < num_events and not over.wait(draw.uniform(0, 0.02)):
            name = draw.choice(list(acts))
            acts[name]()
            events.append(name)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield events
    finally:
        over.set()
        thread.join()
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(
    "num_events", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_nothing_is_lost_or_repeated(tmp_path: Path, num_events: int) -> None:
    secret_file, stop = tmp_path / "secret", threading.Event()
    secret = auth.create_secret(secret_file)
    expected = [values(BatchSequence(loader(), seed=5).epoch(epoch)) for epoch in range(50)]
    with Coordinator(
        "127.0.0.1:0", NUM_WORKERS, secret, settings=SETTINGS, workers_come_back=True
    ) as coordinator:
        for rank in range(1, NUM_WORKERS + 1):
            Worker(rank, coordinator.address, secret_file, stop)
        source = coordinator.source("train")
        coordinator.wait_for_workers()
        with chaos(coordinator, num_events, seed=num_events) as events:
            epoch = 0
            while len(events) < num_events or epoch < 3:
                assert values(source.epoch(epoch % 50)) == expected[epoch % 50]
                epoch += 1
        assert "lost" in events
        stop.set()


def test_one_that_does_not_come_back_is_named(tmp_path: Path) -> None:
    secret = auth.create_secret(tmp_path / "secret")
    settings = StreamSettings(replace_timeout_seconds=0.5, close_timeout_seconds=0.2)
    with Coordinator(
        "127.0.0.1:0", 1, secret, settings=settings, workers_come_back=True
    ) as coordinator:
        host, port = coordinator.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            auth.introduce(connection, secret, 1, 60)
            described = {"is": "described", "mode": "train", "num_batches": 3}
            wire.send_message(connection, described | {"already_sharded": False})
            threading.Timer(0.2, connection.shutdown, (socket.SHUT_RDWR,)).start()
            started = time.monotonic()
            with pytest.raises(StreamingError, match=r"worker 1 .*was lost.*did not come back"):
                next(coordinator.source("train").epoch(0))
            assert time.monotonic() - started < 60

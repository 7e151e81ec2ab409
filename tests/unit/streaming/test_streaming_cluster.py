"""Coordinator and workers together, in threads where all is well and in processes that die."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from openwafer.errors import DataError, StreamingError
from openwafer.streaming import auth, wire
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.tasks import TaskEnvironment
from openwafer.streaming.worker import run_worker, worker_shard

LOCAL = "127.0.0.1:0"
FAST = StreamSettings(
    handshake_timeout_seconds=3,
    join_timeout_seconds=60,
    connect_timeout_seconds=60,
    close_timeout_seconds=5,
)
MakeLoader = Callable[[str, int], Any]


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    auth.create_secret(path)
    return path


def environment(rank: int, num_workers: int, secret_file: Path) -> TaskEnvironment:
    return TaskEnvironment(
        rank=rank, num_tasks=num_workers + 1, secret_file=secret_file, secret_is_given=True
    )


class WorkerThread(threading.Thread):
    """A worker in this process; `error` is what it ended with."""

    def __init__(
        self,
        rank: int,
        address: str,
        num_workers: int,
        secret_file: Path,
        make_loader: MakeLoader,
        *,
        settings: StreamSettings = FAST,
        already_sharded: bool = False,
    ) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self.address = address
        self.settings = settings
        self.environment = environment(rank, num_workers, secret_file)
        shard = worker_shard(self.environment)
        self.make = lambda mode: BatchSequence(
            make_loader(mode, rank), seed=7, shard=shard, already_sharded=already_sharded
        )

    def run(self) -> None:
        try:
            run_worker(self.make, self.address, self.environment, settings=self.settings)
        except BaseException as error:
            self.error = error


@contextmanager
def cluster(
    secret_file: Path,
    num_workers: int,
    make_loader: MakeLoader,
    settings: StreamSettings = FAST,
    *,
    worker_settings: StreamSettings = FAST,
    **options: Any,
) -> Iterator[tuple[Coordinator, list[WorkerThread]]]:
    secret = auth.read_secret(secret_file)
    with Coordinator(LOCAL, num_workers, secret, settings=settings) as coordinator:
        address = coordinator.address
        workers = [
            WorkerThread(
                *(rank, address, num_workers, secret_file, make_loader),
                settings=worker_settings,
                **options,
            )
            for rank in range(1, num_workers + 1)
        ]
        for worker in workers:
            worker.start()
        yield coordinator, workers
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def hand_driven_worker(
    coordinator: Coordinator, secret: bytes, rank: int
) -> Iterator[socket.socket]:
    """A connection that passed as worker `rank` and described its train data; the rest is said by
    the test."""
    host, port = coordinator.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        auth.introduce(connection, secret, rank, 60)
        described = {"is": "described", "num_batches": None, "already_sharded": False}
        wire.send_message(connection, described | {"mode": "train"})
        yield connection


def send_batch(coordinator: Coordinator, connection: socket.socket, number: int) -> None:
    until(lambda: bool(coordinator._ledger.streams))
    message = {"is": "batch", "stream": 0, "number": number}
    wire.send_batch(connection, message, number, max_payload_bytes=100)


def digits(mode: str, rank: int) -> DataLoader[Any]:
    size = 41 if mode == "train" else 10
    x = torch.arange(size * 3.0).reshape(size, 3)
    return DataLoader(TensorDataset(x, torch.arange(size)), batch_size=4, shuffle=mode == "train")


def values(batches: Any) -> list[list[Any]]:
    return [[part.tolist() for part in batch] for batch in batches]


def alone(mode: str, epoch: int, start: int = 0) -> list[list[Any]]:
    return values(BatchSequence(digits(mode, 0), seed=7).epoch(epoch, start))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_batches_are_those_of_a_single_process(secret_file: Path, num_workers: int) -> None:
    with cluster(secret_file, num_workers, digits) as (coordinator, workers):
        train = coordinator.source("train")
        assert train.num_batches == 11
        assert values(train.epoch(0)) == alone("train", 0)
        assert values(train.epoch(1, 5)) == alone("train", 1, 5)
        assert values(train.epoch(2, 11)) == []
        assert sorted(coordinator.waited_seconds) == list(range(1, num_workers + 1))
    assert [worker.error for worker in workers] == [None] * num_workers


def test_evaluation_in_the_middle_of_an_epoch(secret_file: Path) -> None:
    with cluster(secret_file, 2, digits) as (coordinator, _):
        train, evaluate = coordinator.source("train"), coordinator.source("eval")
        epoch = train.epoch(0)
        first = values(islice(epoch, 3))
        for _ in range(2):
            assert values(evaluate.epoch(0)) == alone("eval", 0)
        assert first + values(epoch) == alone("train", 0)
        # An epoch that is left early does not disturb the next.
        left = train.epoch(1)
        next(left)
        assert values(train.epoch(2)) == alone("train", 2)


def test_workers_may_come_first_and_the_log_lines_are_the_documented_ones(
    secret_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="openwafer.streaming")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    worker = WorkerThread(1, address, 1, secret_file, digits)
    worker.start()
    time.sleep(0.4)
    with Coordinator(address, 1, auth.read_secret(secret_file), settings=FAST) as coordinator:
        coordinator.wait_for_workers()
        assert values(coordinator.source("eval").epoch(0)) == alone("eval", 0)
    worker.join(60)
    assert worker.error is None
    assert "Waiting for 1 streamer(s) to prime the data pipeline" in caplog.messages
    assert "Streamers are ready" in caplog.messages


def test_data_sharded_by_the_user(secret_file: Path) -> None:
    def own_shard(mode: str, rank: int) -> list[torch.Tensor]:
        return [torch.tensor(n) for n in range(10) if n % 3 == rank - 1]

    with cluster(secret_file, 3, own_shard, already_sharded=True) as (coordinator, _):
        source = coordinator.source("train")
        # Rank 1 has 0, 3, 6, 9; rank 2 ends first, after 7: the epoch is 0 to 9.
        assert source.num_batches == 10
        assert [int(batch) for batch in source.epoch(0)] == list(range(10))
        assert [int(batch) for batch in source.epoch(0, 4)] == list(range(4, 10))


def test_workers_that_see_different_data(secret_file: Path) -> None:
    def sized(mode: str, rank: int) -> list[int]:
        return [0] * (4 + rank)

    with (
        cluster(secret_file, 2, sized) as (coordinator, _),
        pytest.raises(StreamingError, match=r"do not see the same train data.*1: 5, 2: 6"),
    ):
        next(coordinator.source("train").epoch(0))

    def unsized(mode: str, rank: int) -> Any:
        return lambda: iter(range(2 if rank == 1 else 9))

    with (
        cluster(secret_file, 2, unsized) as (coordinator, _),
        pytest.raises(StreamingError, match="same dataset"),
    ):
        list(coordinator.source("train").epoch(0))


def test_memory_is_bounded_while_the_consumer_is_slow(secret_file: Path) -> None:
    loaded = {1: 0, 2: 0}

    def counting(mode: str, rank: int) -> Any:
        def batches() -> Iterator[int]:
            for number in range(1000):
                loaded[rank] += 1
                yield number

        return batches

    with cluster(secret_file, 2, counting) as (coordinator, _):
        epoch = coordinator.source("train").epoch(0)
        for taken in range(1, 6):
            assert next(epoch) == taken - 1
            time.sleep(0.1)
            # Each reads everything and streams every second: window + consumed, at most.
            assert max(loaded.values()) <= 2 * (FAST.window_batches + taken // 2 + 1)
        until(lambda: min(loaded.values()) > 2 * FAST.window_batches)


def test_a_worker_that_sends_more_than_asked_is_stopped(secret_file: Path) -> None:
    secret = auth.read_secret(secret_file)
    with (
        Coordinator(LOCAL, 1, secret, settings=FAST) as coordinator,
        hand_driven_worker(coordinator, secret, 1) as flood,
    ):
        first = threading.Thread(target=send_batch, args=(coordinator, flood, 0), daemon=True)
        first.start()
        epoch = coordinator.source("train").epoch(0)
        assert next(epoch) == 0
        for number in range(1, FAST.window_batches + 2):
            send_batch(coordinator, flood, number)
        until(lambda: coordinator._ledger.failure is not None)
        with pytest.raises(StreamingError, match="more batches than it was asked for"):
            next(epoch)


def test_strangers_are_refused_and_data_go_on(
    secret_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    auth.create_secret(other)
    secret = auth.read_secret(secret_file)
    with Coordinator(LOCAL, 2, secret, settings=FAST) as coordinator, ExitStack() as strangers:
        host, port = coordinator.address.split(":")

        def connect() -> socket.socket:
            return strangers.enter_context(socket.create_connection((host, int(port)), timeout=60))

        silent = connect()
        connect().sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + b"x" * 100)
        connect().sendall(b"\xff" * (1 << 20))
        connect().close()
        wrong = WorkerThread(1, coordinator.address, 2, other, digits)
        unknown = WorkerThread(9, coordinator.address, 9, secret_file, digits)
        first = WorkerThread(1, coordinator.address, 2, secret_file, digits)
        first.start()
        for stranger in (wrong, unknown):
            stranger.start()
            stranger.join(60)
            assert isinstance(stranger.error, auth.RefusedError)
        until(lambda: 1 in coordinator.waited_seconds)
        second_first = WorkerThread(1, coordinator.address, 2, secret_file, digits)
        second_first.start()
        second_first.join(60)
        assert "already connected" in str(second_first.error)
        second = WorkerThread(2, coordinator.address, 2, secret_file, digits)
        second.start()
        assert values(coordinator.source("train").epoch(0)) == alone("train", 0)
        silent.settimeout(60)
        assert silent.recv(1) == b""  # hung up at the deadline
        # All are in: nobody else can even connect.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=60)
    for worker in (first, second):
        worker.join(60)
        assert worker.error is None
    refusals = [
        m for m in caplog.messages if re.match(r"refused a connection from 127\.0\.0\.1:", m)
    ]
    assert any("does not speak this protocol" in m for m in refusals)
    assert any("not one of this run's workers" in m for m in refusals)
    assert any("took too long" in m or "timed out" in m for m in refusals)


def test_a_worker_that_passed_and_then_sends_an_oversized_frame(secret_file: Path) -> None:
    secret = auth.read_secret(secret_file)
    with Coordinator(LOCAL, 1, secret, settings=FAST) as coordinator:
        host, port = coordinator.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            auth.introduce(connection, secret, 1, 60)
            connection.sendall(b"OWST\x01\x02\0\0" + b"\xff" * 12)
            with pytest.raises(StreamingError, match=r"worker 1 .* was lost: .*declares"):
                next(coordinator.source("train").epoch(0))


def test_missing_workers_are_named(secret_file: Path) -> None:
    settings = StreamSettings(join_timeout_seconds=0.3)
    secret = auth.read_secret(secret_file)
    with (
        Coordinator(LOCAL, 3, secret, settings=settings) as coordinator,
        pytest.raises(StreamingError, match="1, 2, 3 of 3 did not connect"),
    ):
        coordinator.wait_for_workers()


def test_a_silent_worker_is_named_and_then_ends_the_run(
    secret_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = auth.read_secret(secret_file)
    settings = StreamSettings(warn_after_seconds=1, fail_after_seconds=4, close_timeout_seconds=0.2)
    with (
        Coordinator(LOCAL, 2, secret, settings=settings) as coordinator,
        hand_driven_worker(coordinator, secret, 1) as talking,
        hand_driven_worker(coordinator, secret, 2),
    ):
        sender = threading.Thread(target=send_batch, args=(coordinator, talking, 0), daemon=True)
        sender.start()
        epoch = coordinator.source("train").epoch(0)
        assert next(epoch) == 0
        with pytest.raises(StreamingError, match=r"worker 2 .*has sent nothing"):
            next(epoch)
        assert coordinator.waited_seconds[1] < 4
    warnings = [message for message in caplog.messages if "waiting for worker 2" in message]
    assert len(warnings) == 1


def test_the_users_error_in_a_worker_reaches_both_sides(secret_file: Path) -> None:
    def faulty(mode: str, rank: int) -> Any:
        if mode == "eval":
            raise ValueError("no eval data")  # the line of the data function
        return [torch.ones(1), {1, 2}, torch.ones(1), torch.ones(1)]

    for mode, message, kind in (
        ("eval", "failed: ValueError: no eval data", ValueError),
        ("train", r"worker 2 .*failed: `batch` is a builtins.set", DataError),
    ):
        with cluster(secret_file, 2, faulty) as (coordinator, workers):
            with pytest.raises(StreamingError, match=message) as caught:
                list(coordinator.source(mode).epoch(0))
            if mode == "eval":
                assert caught.value.where.startswith(__file__ + ":")
        assert any(isinstance(worker.error, kind) for worker in workers)


def test_the_coordinators_address_must_be_ours(secret_file: Path) -> None:
    secret = auth.read_secret(secret_file)
    with pytest.raises(StreamingError, match="cannot listen"):
        Coordinator("192.0.2.1:9000", 1, secret)
    with (
        Coordinator(LOCAL, 1, secret) as coordinator,
        pytest.raises(StreamingError, match="cannot listen"),
    ):
        Coordinator(coordinator.address, 1, secret)


def test_a_worker_gives_up_in_time(secret_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = StreamSettings(connect_timeout_seconds=0.3)
    with pytest.raises(StreamingError, match="could not reach the coordinator"):
        run_worker(
            lambda mode: BatchSequence([1], seed=0),
            address,
            environment(1, 1, secret_file),
            settings=settings,
        )


# Processes that die.

TASK = Path(__file__).with_name("streaming_task.py")


@contextmanager
def task(secret_file: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(TASK), *map(str, arguments)],
        env=os.environ | {"OPENWAFER_SECRET_FILE": str(secret_file)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its DataLoader processes too
        process.communicate()


def test_a_worker_killed_in_mid_stream_is_named_within_seconds(secret_file: Path) -> None:
    secret = auth.read_secret(secret_file)
    with (
        Coordinator(LOCAL, 2, secret) as coordinator,
        task(secret_file, "worker", coordinator.address, 1, 3, "process"),
        task(secret_file, "worker", coordinator.address, 2, 3, "process") as victim,
    ):
        epoch = coordinator.source("train").epoch(0)
        list(islice(epoch, 5))
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(StreamingError) as caught:
            list(epoch)
        assert time.monotonic() - killed < 30
        assert f"worker 2 (host {socket.gethostname()}, pid {victim.pid}" in str(caught.value)
        assert re.search(r"last batch received from it: train epoch 0 batch \d+", str(caught.value))


def test_a_worker_killed_while_the_loop_is_busy_is_noticed(secret_file: Path) -> None:
    """The next batch that is asked for raises, though batches of the dead worker are at hand."""
    secret = auth.read_secret(secret_file)
    with (
        Coordinator(LOCAL, 1, secret) as coordinator,
        task(secret_file, "worker", coordinator.address, 1, 2, "fast") as victim,
    ):
        epoch = coordinator.source("train").epoch(0)
        next(epoch)
        until(
            lambda: any(map(len, next(iter(coordinator._ledger.streams.values())).waiting.values()))
        )
        victim.kill()
        until(lambda: coordinator._ledger.failure is not None)
        with pytest.raises(StreamingError, match=r"worker 1 .* was lost"):
            next(epoch)


def test_a_workers_own_error_is_in_the_coordinators(secret_file: Path) -> None:
    secret = auth.read_secret(secret_file)
    with (
        Coordinator(LOCAL, 1, secret) as coordinator,
        task(secret_file, "worker", coordinator.address, 1, 2, "fail") as worker,
    ):
        with pytest.raises(StreamingError, match="KeyError: 'no such label'") as caught:
            list(coordinator.source("train").epoch(0))
        file, line = caught.value.where.rsplit(":", 1)
        assert file == str(TASK)
        assert "the worker's own error" in TASK.read_text().splitlines()[int(line) - 1]
        coordinator.close()
        assert worker.wait(60) == 2
        assert "no such label" in worker.stderr.read() if worker.stderr else False


@pytest.mark.parametrize("how", [pytest.param("slow", marks=pytest.mark.slow), "hang"])
def test_workers_end_when_the_coordinator_is_killed(secret_file: Path, how: str) -> None:
    with task(secret_file, "coordinator", 1) as coordinator:
        assert coordinator.stdout is not None
        address = coordinator.stdout.readline().strip()
        with task(secret_file, "worker", address, 1, 2, how) as worker:
            assert coordinator.stdout.readline() == "streaming\n"
            coordinator.kill()
            killed = time.monotonic()
            _, errors = worker.communicate(timeout=60)
            assert time.monotonic() - killed < 30
            assert worker.returncode == 2
            assert "the coordinator was lost" in errors


def test_a_worker_stuck_in_user_code_ends_when_told_to_stop(secret_file: Path) -> None:
    secret = auth.read_secret(secret_file)
    with (
        Coordinator(LOCAL, 1, secret) as coordinator,
        task(secret_file, "worker", coordinator.address, 1, 2, "hang") as worker,
    ):
        list(islice(coordinator.source("train").epoch(0), 4))
        coordinator.close()
        _, errors = worker.communicate(timeout=60)
        assert (worker.returncode, errors) == (0, "")


def test_a_slow_worker_is_told_by_its_busy_time(secret_file: Path) -> None:
    """It sleeps before each batch: however fast the machine, it was busy for that long, and no
    longer than the epoch took."""
    nap_seconds = 0.03

    def numbers() -> Iterator[torch.Tensor]:
        for number in range(8):
            time.sleep(nap_seconds)
            yield torch.tensor(number)

    with cluster(secret_file, 1, lambda mode, rank: numbers) as (coordinator, _):
        coordinator.wait_for_workers()
        assert coordinator.busy_seconds("train") == {1: 0.0}
        began = time.monotonic()
        assert len(list(coordinator.source("train").epoch(0))) == 8
        elapsed_seconds = time.monotonic() - began
        busy = coordinator.busy_seconds("train")
        assert coordinator.busy_seconds("eval") == {1: 0.0}
    assert 8 * nap_seconds <= busy[1] <= elapsed_seconds


def test_an_address_that_a_killed_run_left_is_looked_up_again(tmp_path: Path) -> None:
    """As under SLURM, where the coordinator writes its address beside the secret: the old one is
    of nobody, and the worker goes on looking until the new one is there."""
    secret_file = tmp_path / "secret"
    secret = auth.create_secret(secret_file)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        stale = f"127.0.0.1:{nobody.getsockname()[1]}"
    meeting = secret_file.with_suffix(".address")
    meeting.write_text(stale)
    place = TaskEnvironment(rank=1, num_tasks=2, secret_file=secret_file)
    worker = WorkerThread(1, "10.0.0.1:9000", 1, secret_file, digits)
    worker.environment = place
    with Coordinator(LOCAL, 1, secret, settings=FAST) as coordinator:
        worker.start()
        time.sleep(0.5)  # most likely it has tried the old one by now; it is right if not, too
        meeting.write_text(coordinator.address)
        assert len(list(coordinator.source("eval").epoch(0))) == 3
    worker.join(60)
    assert not worker.is_alive()
    assert worker.error is None


def test_files_of_a_killed_run_whose_address_is_another_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Secret and address are of a run that was killed under the same SLURM step name, and another
    run's coordinator listens there by now: the worker waits for its own to write both anew."""
    secret_file, other = tmp_path / "secret", tmp_path / "other"
    auth.create_secret(secret_file)
    meeting = secret_file.with_suffix(".address")
    worker = WorkerThread(1, "10.0.0.1:9000", 1, secret_file, digits)
    worker.environment = TaskEnvironment(rank=1, num_tasks=2, secret_file=secret_file)
    with Coordinator(LOCAL, 1, auth.create_secret(other), settings=FAST) as stranger:
        meeting.write_text(stranger.address)
        worker.start()
        until(lambda: any("tries again" in message for message in caplog.messages))
        # Its own coordinator comes: the new secret first, then the new address.
        secret = auth.create_secret(secret_file)
        with Coordinator(LOCAL, 1, secret, settings=FAST) as coordinator:
            meeting.write_text(coordinator.address)
            assert values(coordinator.source("eval").epoch(0)) == alone("eval", 0)
        worker.join(60)
    assert not worker.is_alive()
    assert worker.error is None


def test_a_worker_whose_files_stay_another_runs_says_so_in_the_end(tmp_path: Path) -> None:
    secret_file, other = tmp_path / "secret", tmp_path / "other"
    auth.create_secret(secret_file)
    place = TaskEnvironment(rank=1, num_tasks=2, secret_file=secret_file)
    settings = StreamSettings(connect_timeout_seconds=0.6)
    with Coordinator(LOCAL, 1, auth.create_secret(other), settings=FAST) as stranger:
        secret_file.with_suffix(".address").write_text(stranger.address)
        with pytest.raises(auth.RefusedError, match="does not know this run's secret"):
            run_worker(lambda mode: BatchSequence([1], seed=0), LOCAL, place, settings=settings)


def test_a_given_secret_that_does_not_fit_is_refused_at_once(
    secret_file: Path, tmp_path: Path
) -> None:
    """A launcher's secret is never an old one: there is nothing to wait for."""
    other = auth.create_secret(tmp_path / "other")
    with Coordinator(LOCAL, 1, other, settings=FAST) as coordinator:
        worker = WorkerThread(1, coordinator.address, 1, secret_file, digits)
        worker.run()
    assert isinstance(worker.error, auth.RefusedError)

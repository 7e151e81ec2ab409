"""Batches in memory that worker and coordinator share: the same values, never overwritten while in
use, and never memory that was not offered."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_streaming_cluster import FAST, cluster
from test_streaming_wire import LIMIT, assert_equal, batches

from openwafer.errors import StreamingError
from openwafer.streaming import auth, wire
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.shared_slots import SlotReader, SlotWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="such memory is Linux's")

SLOT_BYTES = 1 << 16


@contextmanager
def shared(num_slots: int = 2) -> Iterator[tuple[SlotWriter, SlotReader]]:
    writer = SlotWriter(num_slots, SLOT_BYTES)
    try:
        yield writer, SlotReader(writer.offer)
    finally:
        writer.close()


def pass_on(writer: SlotWriter, reader: SlotReader, batch: Any) -> tuple[Any, int]:
    """What comes of `batch` at the other side, and how many bytes travelled over the connection."""
    left, right = socket.socketpair()
    with left, right:
        wire.send_batch(left, {}, batch, max_payload_bytes=LIMIT, slots=writer)
        left.shutdown(socket.SHUT_WR)
        num_bytes = len(right.recv(1 << 20, socket.MSG_PEEK))
        frame = wire.receive_frame(right, max_payload_bytes=LIMIT, slots=reader)
    assert frame is not None
    return frame.batch, num_bytes


@given(batches)
@settings(max_examples=100, deadline=None)
def test_round_trip(batch: Any) -> None:
    with shared() as (writer, reader):
        assert_equal(pass_on(writer, reader, batch)[0], batch)


def test_a_batch_in_a_slot_does_not_travel() -> None:
    with shared() as (writer, reader):
        sent = {"x": torch.arange(4000.0), "y": np.arange(500)}
        found, num_bytes = pass_on(writer, reader, sent)
        assert_equal(found, sent)
        assert num_bytes < 500
        found["x"] += 1  # it is the receiver's
        assert not torch.equal(found["x"], sent["x"])


def test_a_slot_is_used_again_when_the_last_part_of_its_batch_is_gone() -> None:
    with shared(num_slots=1) as (writer, reader):
        found, _ = pass_on(writer, reader, [torch.arange(8), np.arange(4), torch.ones(2)])
        part, array = found[0][2:4], found[1][1:]
        del found
        gc.collect()
        assert reader.take_returned() == []
        # Meanwhile batches travel.
        other, num_bytes = pass_on(writer, reader, torch.zeros(2000))
        assert num_bytes > other.nbytes
        assert part.tolist() == [2, 3]
        del part
        gc.collect()
        assert reader.take_returned() == []
        assert array.tolist() == [1, 2, 3]
        del array
        gc.collect()
        assert reader.take_returned() == [0]
        writer.give_back([0])
        again, num_bytes = pass_on(writer, reader, torch.zeros(2000))
        assert num_bytes < again.nbytes


def test_a_batch_too_large_for_a_slot_travels() -> None:
    with shared() as (writer, reader):
        large = torch.rand(SLOT_BYTES // 4 + 1)
        found, num_bytes = pass_on(writer, reader, large)
        assert torch.equal(found, large)
        assert num_bytes > SLOT_BYTES


def test_memory_outlives_the_one_that_wrote_it() -> None:
    with shared() as (writer, reader):
        found, _ = pass_on(writer, reader, torch.arange(5))
    assert found.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("slot", [-1, 2, 1 << 40])
def test_slots_that_are_none(slot: int) -> None:
    with shared() as (_, reader), pytest.raises(StreamingError, match="slot"):
        reader.lease(slot, 8)


def test_a_slot_in_use_is_refused() -> None:
    with shared() as (_, reader):
        held = reader.lease(1, 8)
        with pytest.raises(StreamingError, match="in use"):
            reader.lease(1, 8)
        with pytest.raises(StreamingError, match="bytes in a slot"):
            reader.lease(0, SLOT_BYTES + 1)
        assert len(held) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another"},
        {"pid": 1 << 22},
        {"inode": 1},
        {"num_slots": 3},
        {"num_slots": 1 << 50},
        {"slot_bytes": 100},
        {"descriptor": "x"},
    ],
)
def test_what_is_not_what_was_offered_is_not_opened(change: dict[str, Any]) -> None:
    writer = SlotWriter(2, SLOT_BYTES)
    with pytest.raises((OSError, ValueError)):
        SlotReader({**writer.offer, **change})
    writer.close()


def test_memory_that_could_be_shortened_is_not_opened() -> None:
    """A reader of a shortened file would be ended by SIGBUS."""
    writer = SlotWriter(2, SLOT_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(writer.offer["descriptor"], mmap.PAGESIZE)
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 2 * SLOT_BYTES)
    assert not fcntl.fcntl(loose, fcntl.F_GET_SEALS)
    status = os.fstat(loose)
    found = {"descriptor": loose, "inode": status.st_ino, "device": status.st_dev}
    offer = {**writer.offer, **found}
    with pytest.raises(ValueError, match="shortened"):
        SlotReader(offer)
    os.close(loose)
    writer.close()


def in_slot(description: str, slot: str, payload_bytes: int = 0) -> bytes:
    header = f'{{"message": {{}}, "batch": {description}, "slot": {slot}}}'.encode()
    return b"OWST\x01\x03\0\0" + struct.pack("!IQ", len(header), payload_bytes) + header


@pytest.mark.parametrize(
    "data",
    [
        in_slot('{"T": ["float32", [2]]}', "7"),
        in_slot('{"T": ["float32", [2]]}', '"0"'),
        in_slot('{"T": ["float32", [2]]}', "true"),
        in_slot('{"T": ["float32", [1000000]]}', "0"),
        in_slot('{"T": ["nothing", [2]]}', "0"),
        in_slot("1", "0"),
        in_slot('{"T": ["float32", [2]]}', "0", payload_bytes=8),
    ],
)
def test_garbage_is_a_streaming_error(data: bytes) -> None:
    left, right = socket.socketpair()
    with left, right, shared() as (_, reader):
        left.sendall(data)
        with pytest.raises(StreamingError):
            wire.receive_frame(right, max_payload_bytes=LIMIT, slots=reader)


def test_without_shared_memory_a_slot_is_nowhere() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(in_slot('{"T": ["float32", [2]]}', "0"))
        with pytest.raises(StreamingError, match="nowhere"):
            wire.receive_frame(right, max_payload_bytes=LIMIT)


# Coordinator and workers.


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    auth.create_secret(path)
    return path


def numbered(mode: str, rank: int) -> Any:
    return lambda: (torch.full((5000,), number) for number in range(40))


@pytest.mark.parametrize("shared_slots", [0, 8])
def test_a_loop_that_keeps_every_batch(secret_file: Path, shared_slots: int) -> None:
    """More than there are slots: those beyond travel, and none is overwritten."""
    settings = replace(FAST, shared_slots=shared_slots)
    with cluster(secret_file, 2, numbered, worker_settings=settings) as (coordinator, _):
        kept = list(coordinator.source("train").epoch(0))
        assert all(batch.eq(number).all() for number, batch in enumerate(kept))
        held = [worker.slots for worker in coordinator._ledger.workers.values()]
        leased = [0 if slots is None else len(slots._leased) for slots in held]
        assert leased == [shared_slots] * 2


def test_slots_are_used_over_and_over(secret_file: Path) -> None:
    with cluster(secret_file, 2, numbered) as (coordinator, _):
        source = coordinator.source("train")
        for epoch in range(3):
            for number, batch in enumerate(source.epoch(epoch)):
                assert int(batch[0]) == int(batch[-1]) == number
            next(source.epoch(epoch))  # one that is left early
        held = [worker.slots for worker in coordinator._ledger.workers.values()]
        assert all(slots is not None and len(slots._leased) < 8 for slots in held)


def test_the_batches_of_a_killed_worker_stay_whole(secret_file: Path) -> None:
    task = Path(__file__).with_name("streaming_task.py")
    with Coordinator("127.0.0.1:0", 1, auth.read_secret(secret_file)) as coordinator:
        victim = subprocess.Popen(
            [sys.executable, str(task), "worker", coordinator.address, "1", "2", "fast"],
            env=os.environ | {"OPENWAFER_SECRET_FILE": str(secret_file)},
        )
        taken = list(islice(coordinator.source("train").epoch(0), 3))
        held = coordinator._ledger.workers[1].slots
        assert held is not None
        assert len(held._leased) >= 3
        victim.kill()
        victim.wait()
        assert [batch.tolist() for batch in taken] == [[float(n)] * 8 for n in range(3)]

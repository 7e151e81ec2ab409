"""A store on disk reads chunks before they are asked for and writes them after its update has
ended: whatever comes in between, it gives what a store in RAM gives, and no failure is lost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_reference import optimizer_config

from openwafer.errors import PlanError
from openwafer.runtime.compiled import StreamedWeight
from openwafer.runtime.stores.direct_file import lasting_buffer, lasting_bytes
from openwafer.runtime.stores.disk_store import DiskStore
from openwafer.runtime.stores.store import RamStore, Shard, WeightStore

CHUNK_ELEMENTS = 4096
ROWS = {"embed": 100, "h.0": 40, "h.1": 40, "h.2": 40}
NAMES = tuple(f"{layer}.{kind}" for layer in ROWS for kind in ("weight", "bias"))
SHARDS = tuple(
    Shard(
        index=index,
        names=(f"{layer}.weight", f"{layer}.bias"),
        trained=(f"{layer}.weight", f"{layer}.bias"),
    )
    for index, layer in enumerate(ROWS)
)
COPIES = {f"{layer}.weight": [torch.bfloat16] for layer in ROWS}


def values(seed: int) -> dict[str, torch.Tensor]:
    """Weights that take three chunks for the first shard and two for each of the others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (128,), "bias": ()}
    return {
        f"{layer}.{kind}": torch.randn((rows, *rest), generator=generator)
        for layer, rows in ROWS.items()
        for kind, rest in shapes.items()
    }


def make_disk(folder: Path, *, promised: bool = False) -> DiskStore:
    return DiskStore(
        values(0),
        SHARDS,
        optimizer_config(),
        folder,
        copies=COPIES,
        chunk_elements=CHUNK_ELEMENTS,
        memory_promised=promised,
    )


def make_ram() -> RamStore:
    return RamStore(values(0), SHARDS, optimizer_config(), copies=COPIES)


def gradients(shard: Shard, seed: int) -> dict[str, torch.Tensor]:
    given = values(seed)
    return {name: given[name] for name in shard.trained}


def fetched(store: WeightStore, shard: Shard) -> list[torch.Tensor]:
    """A shard's weights as they are and, where there is one, their copy in 16 bits."""
    wanted = [StreamedWeight(name, torch.float32) for name in shard.names]
    wanted += [
        StreamedWeight(name, dtype) for name in shard.names for dtype in COPIES.get(name, ())
    ]
    given = store.fetch(wanted)
    kept = [tensor.clone() for tensor in given.tensors]
    store.release(given)
    return kept


def assert_same(disk: DiskStore, ram: RamStore) -> None:
    found = disk.weights()
    for name, value in ram.weights().items():
        assert torch.equal(found[name], value)
    entries = disk.optimizer_state()
    for name, state in ram.optimizer_state().items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(entries[name][key]), torch.as_tensor(value))


# ---------------------------------------------------------------- the same numbers


def _update(store: WeightStore, shard: Shard, seed: int) -> None:
    store.update(shard, gradients(shard, seed), 0.1)


def _some_gradients(store: WeightStore, shard: Shard, seed: int) -> None:
    store.update(shard, {shard.trained[1]: gradients(shard, seed)[shard.trained[1]]}, 0.1)


def _park_and_update(store: WeightStore, shard: Shard, seed: int) -> None:
    store.park(shard, gradients(shard, seed))
    store.update(shard, None, 0.1, lambda given: torch._foreach_mul_(given, 0.5))


def _step(store: WeightStore, shard: Shard, seed: int) -> None:
    for each in reversed(SHARDS):
        _update(store, each, seed)


def _load(store: WeightStore, shard: Shard, seed: int) -> None:
    store.load({shard.names[0]: values(seed)[shard.names[0]]}, {})


ACTIONS: tuple[Callable[[WeightStore, Shard, int], None], ...] = (
    _update,
    _some_gradients,
    _park_and_update,
    _step,
    _load,
)


@given(
    promised=st.booleans(),
    steps=st.lists(
        st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(0, 4)),
        min_size=1,
        max_size=8,
    ),
)
@settings(max_examples=15, deadline=None)
def test_whatever_comes_between_the_numbers_are_those_of_ram(promised, steps) -> None:
    """After each action one shard is fetched, and in the end everything is looked at."""
    ram = make_ram()
    with TemporaryDirectory() as folder:
        disk = make_disk(Path(folder), promised=promised)
        for number, (action, index, looked_at) in enumerate(steps):
            for store in (disk, ram):
                action(store, SHARDS[index], number)
            if looked_at < len(SHARDS):
                for found, value in zip(
                    fetched(disk, SHARDS[looked_at]), fetched(ram, SHARDS[looked_at]), strict=True
                ):
                    assert torch.equal(found, value)
            else:
                assert_same(disk, ram)
        assert_same(disk, ram)
        disk.close()


def test_a_fetch_does_not_wait_for_what_an_update_writes(tmp_path: Path, monkeypatch) -> None:
    disk, ram = make_disk(tmp_path), make_ram()
    write, may_write = os.pwritev, threading.Event()

    def held_up(file, views, offset):
        assert may_write.wait(60)
        return write(file, views, offset)

    monkeypatch.setattr(os, "pwritev", held_up)
    for store in (disk, ram):
        _update(store, SHARDS[0], 1)
    for found, value in zip(fetched(disk, SHARDS[0]), fetched(ram, SHARDS[0]), strict=True):
        assert torch.equal(found, value)
    may_write.set()
    assert_same(disk, ram)
    disk.close()


def test_shards_to_come_are_read_before_their_gradients_are_there(
    tmp_path: Path, monkeypatch
) -> None:
    disk = make_disk(tmp_path)
    read, reads = os.preadv, list[int]()

    def noted(file, views, offset):
        reads.append(offset)
        return read(file, views, offset)

    monkeypatch.setattr(os, "preadv", noted)
    _update(disk, SHARDS[3], 1)
    disk._ahead.drop()  # waits for what is under way
    places = [
        (record.regions[key][0].offset, record.shard.index)
        for record in disk._records.values()
        for key in record.regions
    ]
    owners = [max((place for place in places if place[0] <= at), default=(0, 0))[1] for at in reads]
    assert set(owners) == {0, 1, 2, 3}
    disk.close()


# ---------------------------------------------------------------- faults


def test_a_write_that_fails_after_its_update_is_never_forgotten(
    tmp_path: Path, monkeypatch
) -> None:
    disk = make_disk(tmp_path)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwritev", fail)
        _update(disk, SHARDS[1], 1)  # its writes are under way when it ends
        for _ in range(2):
            with pytest.raises(PlanError, match="No space left") as caught:
                disk.weights()
    assert caught.value.where == str(tmp_path)
    for look in (disk.weights, disk.optimizer_state):  # also when the disk works again
        with pytest.raises(PlanError, match="No space left"):
            look()
    with pytest.raises(PlanError, match="No space left"):
        _update(disk, SHARDS[0], 2)
    disk.close()


def test_a_read_ahead_that_fails_is_told_by_the_update_that_wants_it(
    tmp_path: Path, monkeypatch
) -> None:
    disk = make_disk(tmp_path)
    first = min(entry.offset for entry in disk._records[2].regions[""].values())
    read, end = os.preadv, disk._records[3].regions[""][0].offset

    def torn(file, views, offset):
        if first <= offset < end:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, views, offset)

    monkeypatch.setattr(os, "preadv", torn)
    _update(disk, SHARDS[3], 1)
    with pytest.raises(PlanError, match="Input/output error"):
        _update(disk, SHARDS[2], 1)
    disk.close()


# ---------------------------------------------------------------- buffers


def test_fetches_of_a_step_use_the_buffers_of_the_last_one(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)

    def addresses() -> set[int]:
        found: set[int] = set()
        for shard in (*SHARDS, *reversed(SHARDS)):
            given = disk.fetch([StreamedWeight(name, torch.float32) for name in shard.names])
            assert given.buffer is not None
            found.add(given.buffer.data_ptr())
            disk.release(given)
        return found

    assert addresses() == addresses()
    disk.close()


def test_two_threads_are_never_given_the_same_buffer(tmp_path: Path) -> None:
    disk, ram = make_disk(tmp_path), make_ram()

    def fetch_often(shard: Shard) -> None:
        expected = fetched(ram, shard)[0]
        for _ in range(100):
            given = disk.fetch([StreamedWeight(shard.names[0], torch.float32)])
            assert torch.equal(given.tensors[0], expected)
            disk.release(given)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(fetch_often, SHARDS[1:]))
    disk.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 5000, (2 << 20) - 1, (2 << 20) + 1])
def test_a_lasting_buffer_is_aligned_and_costs_what_was_said(num_bytes: int) -> None:
    buffer = lasting_buffer(num_bytes)
    assert buffer.numel() >= num_bytes
    assert buffer.numel() % 4096 == 0
    assert buffer.data_ptr() % (2 << 20 if num_bytes > 2 << 20 else 4096) == 0
    assert buffer.untyped_storage().nbytes() <= lasting_bytes(num_bytes)

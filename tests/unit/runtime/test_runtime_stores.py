"""Weight stores: on disk the same bits as in RAM, and a clear error where the disk fails."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runtime_reference import optimizer_config

from openwafer.config.hyperparameters import HYPERPARAMETERS
from openwafer.errors import CheckpointError, PlanError
from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import optimizer_state
from openwafer.plan.layers import Layer
from openwafer.runtime.compiled import StreamedWeight
from openwafer.runtime.stores.disk_store import DiskStore
from openwafer.runtime.stores.store import RamStore, Shard, WeightStore, make_shards

SHAPES = {
    "embed.weight": (7, 6),
    "h.0.weight": (6, 6),
    "h.0.bias": (6,),
    "h.1.weight": (6, 6),
    "h.1.bias": (6,),
    "frozen": (3,),
    "scale": (),
    "nothing": (0, 4),
    "conv": (4, 2, 3, 3),
}
SHARDS = (
    Shard(index=0, names=("embed.weight", "scale"), trained=("embed.weight", "scale")),
    Shard(index=1, names=("h.0.weight", "h.0.bias"), trained=("h.0.weight", "h.0.bias")),
    Shard(index=2, names=("h.1.weight", "h.1.bias"), trained=("h.1.weight", "h.1.bias")),
    Shard(index=3, names=("frozen", "nothing", "conv"), trained=("nothing", "conv")),
    Shard(index=4, names=(), trained=()),
)
TRAINED = [name for shard in SHARDS for name in shard.trained]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def updates(store: WeightStore, count: int = 4) -> None:
    for step in range(count):
        gradients = weights(100 + step)
        for shard in reversed(SHARDS):
            if shard.trained:
                # From the second step on one weight has no gradient, as in an unused branch.
                left_out = {"h.1.bias"} if step else set()
                own = {n: gradients[n] for n in shard.trained if n not in left_out}
                store.update(shard, own, 0.1 / (step + 1))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(weights(), SHARDS, optimizer_config(), tmp_path)
    yield store
    store.close()


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_every_optimizer_on_disk_equals_ram_and_one_optimizer(name, tmp_path: Path) -> None:
    config = optimizer_config(name)
    ram = RamStore(weights(), SHARDS, config)
    disk = DiskStore(weights(), SHARDS, config, tmp_path)
    whole = weights()
    optimizer = build_optimizer(config, {n: whole[n] for n in TRAINED})
    for store in (ram, disk):
        updates(store)
    for step in range(4):
        for key, gradient in weights(100 + step).items():
            used = key in TRAINED and not (step and key == "h.1.bias")
            whole[key].grad = gradient if used else None
        set_learning_rate(optimizer, 0.1 / (step + 1))
        optimizer.step()
    for found in (ram.weights(), disk.weights()):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
    expected = optimizer_state(optimizer)
    for found in (ram.optimizer_state(), disk.optimizer_state()):
        assert found.keys() == expected.keys()
        for key, entries in expected.items():
            assert found[key].keys() == entries.keys()
            for entry, value in entries.items():
                given = found[key][entry]
                # The mean of nothing, which Adafactor keeps of an empty weight, is NaN.
                torch.testing.assert_close(given, value, rtol=0, atol=0, equal_nan=True)
    disk.close()


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adafactor", "sgd"])
def test_state_moves_between_stores(name, tmp_path: Path) -> None:
    config = optimizer_config(name)
    ram = RamStore(weights(), SHARDS, config)
    updates(ram, 2)
    disk = DiskStore(weights(5), SHARDS, config, tmp_path)
    updates(disk, 1)
    disk.load(ram.weights(), ram.optimizer_state())
    back = RamStore(weights(6), SHARDS, config)
    back.load(disk.weights(), disk.optimizer_state())
    for store in (ram, disk, back):
        updates(store)
    for found in (disk.weights(), back.weights()):
        assert all(torch.equal(found[key], value) for key, value in ram.weights().items())
    disk.close()


def test_what_is_given_costs_no_memory(disk: DiskStore) -> None:
    """No second copy of a model: RAM gives its own tensors, the disk views of its file."""
    held = weights()
    ram = RamStore(held, SHARDS, optimizer_config())
    assert ram.weights()["conv"].data_ptr() == held["conv"].data_ptr()
    updates(ram)
    updates(disk)
    for name, value in disk.weights().items():
        assert torch.equal(value, ram.weights()[name])
    updates(disk, 1)  # what was looked at is read anew
    updates(ram, 1)
    for name, entries in disk.optimizer_state().items():
        for key, value in entries.items():
            assert torch.equal(value, ram.optimizer_state()[name][key])


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_state_of_another_model_is_refused(kind: str, disk: DiskStore) -> None:
    store = RamStore(weights(), SHARDS, optimizer_config()) if kind == "ram" else disk
    state = store.optimizer_state()
    del state["h.1.weight"]
    with pytest.raises(CheckpointError):
        store.load({}, state)


def test_weights_of_any_dtype_come_back_bit_for_bit(tmp_path: Path) -> None:
    held = {
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(4).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "turned": torch.randn(4, 3).t(),
    }
    shard = Shard(index=0, names=tuple(held), trained=())
    store = DiskStore(held, [shard], None, tmp_path)
    wanted = [StreamedWeight(name, tensor.dtype) for name, tensor in held.items()]
    for name, tensor in zip(held, store.fetch(wanted).tensors, strict=True):
        assert torch.equal(tensor, held[name])
        assert tensor.dtype == held[name].dtype
    store.close()


# ---------------------------------------------------------------- files and faults


def test_the_folder_stays_empty_and_files_end_with_the_store(tmp_path: Path) -> None:
    def open_files() -> set[str]:
        links = Path("/proc/self/fd").iterdir()
        return {str(link.readlink()) for link in links if link.is_symlink()}

    store = DiskStore(weights(), SHARDS, optimizer_config(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert any(str(tmp_path) in name for name in open_files())
    store.close()
    store.close()
    assert not any(str(tmp_path) in name for name in open_files())


def test_memory_holds_a_few_chunks_whatever_the_model_is(tmp_path: Path) -> None:
    held = {f"h.{i}.weight": torch.randn(64, 1024) for i in range(6)}
    shards = [Shard(index=i, names=(name,), trained=(name,)) for i, name in enumerate(held)]
    config = optimizer_config(correct_bias=True)
    store = DiskStore(held, shards, config, tmp_path, chunk_elements=8192)
    ram = RamStore({n: w.clone() for n, w in held.items()}, shards, config)
    # Weight, gradient and two moments of a chunk three times, aligned; a layer that was fetched.
    assert store.staging_bytes <= 3 * 4 * 4 * 8192 + 4096 + 1.5 * 4 * 64 * 1024
    for kept in (store, ram):
        for step in range(3):
            for shard in shards:
                gradient = {n: torch.full_like(held[n], 0.1 * step) + held[n] for n in shard.names}
                if step == 1:
                    kept.park(shard, gradient)
                    kept.update(shard, None, 0.1, lambda grads: torch._foreach_mul_(grads, 0.5))
                else:
                    kept.update(shard, gradient, 0.1)
    assert all(torch.equal(store.weights()[n], w) for n, w in ram.weights().items())
    assert float(store.optimizer_state()["h.0.weight"]["step"]) == 3.0
    store.close()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_copies_are_as_new_as_the_weights(kind: str, tmp_path: Path) -> None:
    copies = {"conv": [torch.bfloat16], "h.0.weight": [torch.bfloat16], "frozen": [torch.float16]}
    parts = (weights(), SHARDS, optimizer_config())
    store = (
        RamStore(*parts, copies=copies)
        if kind == "ram"
        else DiskStore(*parts, tmp_path, copies=copies)
    )

    def assert_fresh() -> None:
        now = store.weights()
        wanted = [StreamedWeight(n, d) for n, dtypes in copies.items() for d in dtypes]
        wanted += [StreamedWeight("embed.weight", torch.float32)]
        fetched = store.fetch(wanted)
        for asked, found in zip(wanted, fetched.tensors, strict=True):
            assert torch.equal(found, now[asked.name].to(asked.dtype))
        store.release(fetched)

    assert_fresh()
    updates(store)
    assert_fresh()
    store.load(weights(9), {})
    assert_fresh()
    store.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_before_training(code, tmp_path, monkeypatch) -> None:
    given: list[int] = []

    def full(file: int, offset: int, size: int) -> None:
        given.append(file)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match="no room") as caught:
        DiskStore(weights(), SHARDS, optimizer_config(), tmp_path)
    assert caught.value.where == str(tmp_path)
    for file in given:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_the_file_size_limit_of_the_shell_is_an_error_too(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(PlanError, match="no room"):
            DiskStore(weights(), SHARDS, optimizer_config(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("folder", ["absent", "read-only", "a file"])
def test_a_folder_that_cannot_be_used(folder: str, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "place"
    if folder == "a file":
        place.touch()
    elif folder == "read-only":
        place.mkdir()

        def refuse(*arguments, **options):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("tempfile.mkstemp", refuse)  # root may write anywhere
    with pytest.raises(PlanError) as caught:
        DiskStore(weights(), SHARDS, optimizer_config(), place)
    assert str(place) in str(caught.value)
    assert caught.value.hint


def test_short_reads_and_writes_are_continued(disk: DiskStore, monkeypatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda f, views, o: read(f, [views[0][:512]], o))
    monkeypatch.setattr(os, "pwritev", lambda f, views, o: write(f, [views[0][:512]], o))
    updates(disk)
    ram = RamStore(weights(), SHARDS, optimizer_config())
    updates(ram)
    found = disk.weights()
    assert all(torch.equal(found[key], value) for key, value in ram.weights().items())


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_disk_that_fails_is_an_error_with_its_place(call, disk, monkeypatch, tmp_path) -> None:
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(PlanError, match="Input/output error") as caught:
        updates(disk, 1)
    assert caught.value.where == str(tmp_path)


def test_a_file_cut_short_is_an_error(disk: DiskStore) -> None:
    os.ftruncate(disk._file._file, 8)
    with pytest.raises(PlanError, match="shorter"):
        disk.fetch([StreamedWeight("h.0.weight", torch.float32)])


def test_a_killed_process_leaves_nothing_behind(tmp_path: Path) -> None:
    script = f"""
import os, signal, torch
from pathlib import Path
from openwafer.runtime.stores.disk_store import DiskStore
from openwafer.runtime.stores.store import Shard
store = DiskStore({{"w": torch.zeros(1000)}}, [Shard(index=0, names=("w",), trained=())], None,
                  Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- shards


def _layer(name: str, *parameters: str) -> Layer:
    return Layer(
        name=name, nodes=(), parameters=parameters, buffers=(), inputs=(), outputs=(),
        structure="", input_bytes=0, output_bytes=0,
    )  # fmt: skip


def test_a_weight_belongs_to_its_first_reader() -> None:
    layers = [_layer("embed", "tied"), _layer("h", "w", "b"), _layer("head", "tied", "w")]
    shards = make_shards(layers, ["tied", "w", "b", "unread"], ["unread", "w"])
    assert [shard.names for shard in shards] == [("tied", "unread"), ("w", "b"), ()]
    assert [shard.trained for shard in shards] == [("unread",), ("w",), ()]


def test_a_model_without_layers_has_one_shard() -> None:
    (shard,) = make_shards([], ["w"], [])
    assert shard.names == ("w",)

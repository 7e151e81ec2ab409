"""A checkpoint file is whole or is found out; a full disk loses nothing."""

from __future__ import annotations

import errno
import resource
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.errors import CheckpointError
from openwafer.train import checkpoint_file
from openwafer.train.checkpoint_archive import num_bytes_of
from openwafer.train.checkpoint_file import (
    DamagedCheckpointError,
    read_file,
    verify_file,
    write_file,
)


def sample() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {f"w{i}": torch.randn(5, 7, generator=generator) for i in range(4)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "global_step": 3,
        "tuple": (1, 2.5, None, True, "x"),
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(equal(x, y) for x, y in zip(a, b, strict=True))
        )
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "c.mdl"
    write_file(path, sample())
    return path.read_bytes()


def test_round_trip_and_plain_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.mdl"
    size = write_file(path, sample())
    assert size == path.stat().st_size
    assert equal(read_file(path), sample())
    assert equal(torch.load(path, weights_only=True), sample())
    assert [p.name for p in path.parent.iterdir()] == ["c.mdl"]


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_noticed(
    share: float, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "c.mdl"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        verify_file(path)
    with pytest.raises(DamagedCheckpointError):
        read_file(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_harmless(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "c.mdl"
    path.write_bytes(bytes(flipped))
    try:
        loaded = read_file(path)
    except DamagedCheckpointError:
        return
    assert equal(loaded, sample()), f"byte {position} changed what is read"


def test_a_flipped_weight_passes_torch_load_but_not_ours(tmp_path: Path) -> None:
    """The reason for `verify_file`: torch does not look at the checksums."""
    path = tmp_path / "c.mdl"
    write_file(path, {"model": {"w": torch.zeros(4096)}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert torch.load(path, weights_only=True)["model"]["w"].any()
    with pytest.raises(DamagedCheckpointError, match="CRC"):
        verify_file(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\0" * 5000])
def test_other_files_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.mdl"
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        read_file(path)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "c.mdl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(DamagedCheckpointError, match=r"data\.pkl"):
        verify_file(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such") as caught:
        read_file(tmp_path / "nothing.mdl")
    assert not isinstance(caught.value, DamagedCheckpointError)
    with pytest.raises(CheckpointError, match="folder"):
        read_file(tmp_path)


def test_objects_that_need_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.mdl"
    torch.save({"model": {}, "extra": Path("/")}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        read_file(path)


def test_the_older_torch_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.mdl"
    torch.save(sample(), path, _use_new_zipfile_serialization=False)
    assert equal(read_file(path), sample())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedCheckpointError):
        read_file(path)


def test_values_become_plain(tmp_path: Path) -> None:
    path = tmp_path / "c.mdl"
    parameter = torch.nn.Parameter(torch.ones(2))
    write_file(path, OrderedDict(a=np.float64(1.5), b=np.int32(2), c=parameter, d=(np.bool_(1),)))
    loaded = read_file(path)
    assert loaded["a"] == 1.5
    assert type(loaded["a"]) is float
    assert type(loaded["b"]) is int
    assert type(loaded["c"]) is torch.Tensor
    assert loaded["d"] == (True,)
    with pytest.raises(CheckpointError, match="set") as caught:
        write_file(path, {"x": {"y": [{1}]}})
    assert caught.value.where == "checkpoint.x.y[0]"


def test_small_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    big = torch.zeros(1_000_000)
    tied = torch.randn(100)
    path = tmp_path / "c.mdl"
    assert write_file(path, {"view": big[:10], "a": tied, "b": tied}) < 10_000
    loaded = read_file(path)
    assert torch.equal(loaded["view"], big[:10])
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_flat_buffers_that_are_all_used_stay_shared(tmp_path: Path) -> None:
    flat = torch.randn(100)
    contents = {"a": flat[:60].view(6, 10), "b": flat[60:]}
    assert num_bytes_of(contents) == 400
    write_file(tmp_path / "c.mdl", contents)
    assert equal(read_file(tmp_path / "c.mdl"), contents)


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.mdl"
    write_file(path, sample())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint_file.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, 1,000 bytes are free"):
        write_file(path, {"model": torch.zeros(10)})
    assert equal(read_file(path), sample())


@pytest.mark.parametrize("limit", [100, 3000, 100_000, 399_000])
def test_disk_full_part_way_loses_nothing(limit: int, tmp_path: Path) -> None:
    """The kernel refuses the write (EFBIG here); the preflight knew nothing of it."""
    path = tmp_path / "c.mdl"
    write_file(path, sample())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="no room") as caught:
            write_file(path, {"model": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "bytes are free" in caught.value.what
    assert "keep_checkpoint_max" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["c.mdl"]
    assert equal(read_file(path), sample())


def test_disk_full_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_file.os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="no room"):
        write_file(tmp_path / "c.mdl", sample())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "file" / "c.mdl", sample())

"""Checkpoints of several files: whole or not there, whatever happens to one of them."""

from __future__ import annotations

import errno
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from openwafer.errors import CheckpointError
from openwafer.train import checkpoint_shards
from openwafer.train.checkpoint_archive import num_bytes_of
from openwafer.train.checkpoint_dir import CheckpointFolder, find_latest, newest_whole
from openwafer.train.checkpoint_file import DamagedCheckpointError
from openwafer.train.checkpoint_shards import (
    read_checkpoint,
    remove_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)

ELEMENTS = 40_000
"""160 kB in fp32: large enough to be moved out of the first file."""


def entries(count: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """Weights, a tied one, moments, and small entries."""
    torch.manual_seed(seed)
    model = {f"layers.{n}.weight": torch.rand(ELEMENTS) for n in range(count)}
    model["tied"] = model["layers.0.weight"].view(200, 200)
    state = {n: {"step": torch.tensor(3.0), "exp_avg": torch.rand(ELEMENTS)} for n in range(count)}
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "global_step": 8,
        "rng": {"seed": 1},
    }


def flat(value: Any) -> list[Any]:
    return pytree.tree_leaves(value)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [*found] == [*expected]
    assert [*found["model"]] == [*expected["model"]]
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.search(r"\d+-of-\d+$", path.name))


@given(count=st.integers(1, 6), tensors_per_file=st.integers(1, 5))
def test_any_size_of_shard_gives_the_contents_back(
    tmp_path_factory: pytest.TempPathFactory, count: int, tensors_per_file: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    path, contents = folder / "checkpoint_8.mdl", entries(count)
    limit = 4 * ELEMENTS * tensors_per_file + 1024  # and the small ones
    write_checkpoint(path, contents, shard_bytes=limit)
    assert_same(read_checkpoint(path), contents)
    verify_checkpoint(path)
    shards = shards_in(folder)
    if 2 * count > tensors_per_file:
        assert len(shards) == math.ceil(2 * count / tensors_per_file)
    else:
        assert not shards
    assert all(path.stat().st_size < limit + 65_536 for path in shards)
    if shards:
        assert path.stat().st_size < 65_536 * (count + 1)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_8.mdl"
    write_checkpoint(path, entries(), shard_bytes=4 * ELEMENTS)
    model = read_checkpoint(path)["model"]
    assert model["tied"].data_ptr() == model["layers.0.weight"].data_ptr()
    assert num_bytes_of(model) == 4 * 4 * ELEMENTS


@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_a_harmed_shard_is_found_and_the_one_before_is_used(tmp_path: Path, harm: str) -> None:
    folder = CheckpointFolder(tmp_path, shard_bytes=4 * ELEMENTS)
    older = folder.save(4, entries(seed=4))
    path = folder.save(8, entries(seed=8))
    shard = next(one for one in shards_in(tmp_path) if one.name.startswith("checkpoint_8"))
    whole = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(whole[: len(whole) // 2])
    else:
        middle = len(whole) // 2
        shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        read_checkpoint(path)
    assert find_latest(tmp_path) == older
    found = newest_whole(tmp_path)
    assert found is not None
    assert found[0] == older
    assert_same(found[1], entries(seed=4))


def test_a_full_disk_leaves_the_checkpoint_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_8.mdl"
    write_checkpoint(path, entries(seed=1), shard_bytes=4 * ELEMENTS)
    before = sorted(tmp_path.iterdir())
    written: list[Path] = []
    write = checkpoint_shards.write_file

    def full_at_the_third(path: Path, contents: Any) -> int:
        if len(written) == 2:
            raise CheckpointError("no room", where=str(path)) from OSError(errno.ENOSPC, "full")
        written.append(path)
        return write(path, contents)

    monkeypatch.setattr(checkpoint_shards, "write_file", full_at_the_third)
    with pytest.raises(CheckpointError, match="no room"):
        write_checkpoint(path, entries(seed=2), shard_bytes=4 * ELEMENTS)
    assert sorted(tmp_path.iterdir()) == before
    assert_same(read_checkpoint(path), entries(seed=1))


def test_what_is_replaced_or_removed_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep_max=1, shard_bytes=4 * ELEMENTS)
    path = folder.save(8, entries(seed=1))
    first = shards_in(tmp_path)
    folder.save(8, entries(seed=2))
    assert len(shards_in(tmp_path)) == len(first)
    assert not set(first) & set(shards_in(tmp_path))
    assert_same(read_checkpoint(path), entries(seed=2))
    path = folder.save(9, entries(seed=3))
    assert {one.name.split(".")[0] for one in tmp_path.iterdir()} == {"checkpoint_9"}
    write_checkpoint(path, entries(seed=4))
    assert [*tmp_path.iterdir()] == [path]
    remove_checkpoint(path)
    assert not [*tmp_path.iterdir()]


def test_shards_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, shard_bytes=4 * ELEMENTS)
    kept = folder.save(4, entries())
    folder.save(8, entries()).unlink()  # killed before the first file took its name
    (tmp_path / ".checkpoint_9.mdl.0123abcd.1-of-3.tmp").write_bytes(b"half")
    folder.remove_leftovers()
    assert {one.name.split(".")[0] for one in tmp_path.iterdir()} == {"checkpoint_4"}
    assert_same(read_checkpoint(kept), entries())


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_8.mdl"
    torch.save({"model": {}, "shards": ["../checkpoint_8.mdl.0123abcd.1-of-1"]}, path)
    with pytest.raises(DamagedCheckpointError, match="no name of a shard"):
        read_checkpoint(path)

"""Checkpoints of replicas: the file of one process, and no process with the whole model."""

from __future__ import annotations

import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from group_processes import Processes
from replica_runs import drive, replicated
from runtime_reference import (
    Setup,
    assert_states_equal,
    batches_like,
    optimizer_config,
    run_steps,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from openwafer.errors import CheckpointError
from openwafer.optim.state import from_torch_state_dict, to_torch_state_dict
from openwafer.runtime import replica_state
from openwafer.runtime.elsewhere import brought, is_elsewhere, stand_in
from openwafer.runtime.executor import Executor, ModelState
from openwafer.runtime.mapped_file import FileStamp
from openwafer.runtime.process_group import ComputeGroup
from openwafer.streaming.tree import describe_batch
from openwafer.train.checkpoint import Checkpoint, OptimizerCodec, contents_of, from_contents
from openwafer.train.checkpoint_file import temporary_path
from openwafer.train.checkpoint_shards import read_checkpoint, verify_checkpoint, write_checkpoint
from openwafer.train.position import Progress

CONFIG = optimizer_config("adamw", max_gradient_norm=0.5)
LARGE_BYTES = 73_728
"""Of each of the model's three matrices: above what a checkpoint's reader copies."""


class Wide(nn.Module):
    """Three layers with a large weight each: two in the layout of channels last, one tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last)
        self.second = nn.Conv2d(64, 32, 3).to(memory_format=torch.channels_last)
        self.into = nn.Linear(32, 576)
        self.out_of = nn.Linear(32, 576, bias=False)
        self.out_of.weight = self.into.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        pooled = self.second(self.first(x).relu()).mean((2, 3)) * self.scale.sum()
        return (F.linear(self.into(pooled).relu(), self.out_of.weight.t()) - 1).square().mean()


def codec(setup: Setup) -> OptimizerCodec:
    names = setup.workload(CONFIG).trained
    return OptimizerCodec(
        to_torch=partial(to_torch_state_dict, CONFIG, names),
        from_torch=partial(from_torch_state_dict, CONFIG, names),
    )


def save(
    executor: Executor, setup: Setup, path: Path, *, shard_bytes: int | None = None
) -> list[bytes]:
    """As a job does; the bytes of all files, without the names that shards give each other."""
    state = executor.borrowed_state()
    checkpoint = Checkpoint(state=state, progress=Progress(global_step=2))
    path.parent.mkdir(exist_ok=True)
    write_checkpoint(path, contents_of(checkpoint, codec(setup)), shard_bytes=shard_bytes)
    files = sorted(path.parent.iterdir(), key=lambda one: one.name.split(".")[-1])
    whole = [one.read_bytes() for one in files if one != path or shard_bytes is None]
    assert whole
    return whole


def load(path: Path, setup: Setup) -> ModelState:
    return from_contents(read_checkpoint(path), codec(setup), where=str(path)).state


@pytest.fixture(scope="module")
def wide() -> Setup:
    torch.manual_seed(5)
    return Setup(Wide(), (torch.randn(2, 32, 6, 6),))


@pytest.fixture(scope="module")
def trained(wide: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process after two steps."""
    path = tmp_path_factory.mktemp("trained") / "checkpoint_2.mdl"
    executor = wide.streaming(CONFIG)
    run_steps(executor, batches_like(wide.batch, 4), microbatches=2)
    save(executor, wide, path)
    executor.close()
    return path


# ---------------------------------------------------------------- the same file


@pytest.mark.parametrize(
    ("count", "disk", "shard_bytes"), [(2, False, None), (3, True, None), (3, False, 100_000)]
)
def test_the_file_is_that_of_one_process(
    count: int, disk: bool, shard_bytes: int | None, wide: Setup, trained: Path, tmp_path: Path
) -> None:
    """Bit for bit; loaded by all from the first file, and saved from what they loaded."""
    alone = wide.streaming(CONFIG, tmp_path if disk else None)
    alone.load_state(load(trained, wide))
    expected = save(alone, wide, tmp_path / "alone" / "a.mdl", shard_bytes=shard_bytes)
    assert len(expected) > 1 or shard_bytes is None
    alone.close()

    def load_and_save(executor: Executor, setup: Setup) -> tuple[list[bytes], int]:
        executor.load_state(load(trained, setup))
        absent = sum(map(is_elsewhere, executor.borrowed_state().model.values()))
        return save(executor, setup, tmp_path / "many" / "a.mdl", shard_bytes=shard_bytes), absent

    found, absent = replicated(wide, CONFIG, load_and_save, tmp_path, count=count, disk=disk)[0]
    assert found == expected
    assert absent >= 1
    if shard_bytes is None:
        verify_checkpoint(tmp_path / "many" / "a.mdl")


# ---------------------------------------------------------------- never the whole


def test_one_tensor_at_a_time_is_brought(wide: Setup, trained: Path, tmp_path: Path) -> None:
    bring = replica_state._bring
    held: list[tuple[StorageWeakRef, int]] = []
    sums: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        found = bring(*arguments)
        held.append((StorageWeakRef(found.untyped_storage()), found.nbytes))
        sums.append(sum(num_bytes for ref, num_bytes in held if not ref.expired()))
        return found

    def load_and_save(executor: Executor, setup: Setup) -> list[int]:
        executor.load_state(load(trained, setup))
        replica_state._bring = counted
        save(executor, setup, tmp_path / "many" / "a.mdl")
        return sums

    found = replicated(wide, CONFIG, load_and_save, tmp_path, count=3)[0]
    # Two of three matrices, each with two moments.
    assert found == [LARGE_BYTES] * 6


@pytest.mark.parametrize("sees", [True, False])
def test_each_reads_its_own_part_of_the_file(
    sees: bool, wide: Setup, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing large is sent to a process that sees the file; to others, their part alone."""
    if not sees:
        monkeypatch.setattr(FileStamp, "is_seen", lambda self: False)
    sent: list[int] = []
    said: list[str] = []
    send_tree = ComputeGroup.send_tree

    def counted(group: ComputeGroup, value: Any, to: int) -> None:
        sent.append(sum(buffer.nbytes for buffer in describe_batch(value)[1]))
        send_tree(group, value, to)

    def load_it(executor: Executor, setup: Setup) -> tuple[int, list[str], ModelState]:
        log = logging.getLogger("openwafer")
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        log.addHandler(handler)
        ComputeGroup.send_tree = counted
        executor.load_state(load(trained, setup))
        ComputeGroup.send_tree = send_tree
        log.removeHandler(handler)
        return sum(sent), said, executor.state()

    num_bytes, told, state = replicated(wide, CONFIG, load_it, tmp_path, count=3)[0]
    assert_states_equal(state, load(trained, wide))
    if sees:
        assert num_bytes < LARGE_BYTES / 2
        assert told == []
    else:
        assert 6 * LARGE_BYTES < num_bytes < 6.5 * LARGE_BYTES
        (line,) = told
        assert f"processes 1, 2 do not see {trained}" in line


# ---------------------------------------------------------------- what goes wrong


def die_when_asked(group: ComputeGroup, *arguments: Any) -> Any:
    """Process 1 dies when it is asked for its second tensor."""
    if group.rank == 1:
        give = replica_state.LentState.tensor

        def tensor(self: replica_state.LentState, number: int) -> torch.Tensor:
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return give(self, number)

        replica_state.LentState.tensor = tensor
    return drive(group, *arguments)


def test_an_owner_that_dies_while_saving_costs_nothing(
    wide: Setup, trained: Path, tmp_path: Path
) -> None:
    """The checkpoint that was there is whole, nothing half-written stays, all others end."""
    folder = tmp_path / "run"
    path = folder / "a.mdl"

    def save_again(executor: Executor, setup: Setup) -> None:
        executor.load_state(load(trained, setup))
        path.parent.mkdir()
        path.write_bytes(trained.read_bytes())
        save(executor, setup, path)

    processes = Processes(tmp_path, 3, die_when_asked, wide, CONFIG, save_again, None)
    outcomes = [processes.outcome(rank) for rank in range(3)]
    processes.close()
    assert [kind for kind, _ in outcomes] == ["raised", "died", "raised"]
    assert "LaunchError: process 1 of the 3 that compute together was lost" in outcomes[0][1]
    assert "LaunchError: process 0 of the 3 that compute together was lost" in outcomes[2][1]
    assert [*folder.iterdir()] == [path]
    assert path.read_bytes() == trained.read_bytes()
    verify_checkpoint(path)


def test_a_full_disk_while_saving_leaves_all_at_work(
    wide: Setup, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when another process's tensor is to be written; the next save succeeds."""
    path = tmp_path / "run" / "a.mdl"

    def save_twice(executor: Executor, setup: Setup) -> tuple[str, bool]:
        executor.load_state(load(trained, setup))
        with monkeypatch.context() as patch:
            patch.setattr(replica_state, "_bring", _full_disk)
            with pytest.raises(CheckpointError) as raised:
                save(executor, setup, path)
        left = temporary_path(path).exists() or path.exists()
        executor.train_step(batches_like(setup.batch, 2), step=2)
        save(executor, setup, path)
        return str(raised.value), left

    said, left = replicated(wide, CONFIG, save_twice, tmp_path)[0]
    assert "no room for the checkpoint" in said
    assert not left
    verify_checkpoint(path)


def _full_disk(*arguments: Any) -> torch.Tensor:
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- stand-ins


def test_a_stand_in_is_no_tensor_of_zeros() -> None:
    values = torch.arange(6.0)
    absent = stand_in(torch.float32, (2, 3), (1, 2), lambda: values.view(torch.uint8))
    assert torch.equal(brought(absent.detach()), values.as_strided((2, 3), (1, 2)))
    with pytest.raises(AssertionError, match="FakeTensor"):
        torch.zeros(2, 3).copy_(absent)
    with pytest.raises(RuntimeError):
        absent.numpy()

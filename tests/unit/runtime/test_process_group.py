"""Processes that compute together find each other, exchange values, and notice a death."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import group_processes
import pytest
import torch
import torch.distributed as dist
from group_processes import Processes

from openwafer.errors import LaunchError, PlanError
from openwafer.runtime.process_group import ComputeGroup, join_group
from openwafer.streaming.tasks import TaskEnvironment, computing_mark

VALUE = {
    "step": 3,
    "nested": ([1.5, None, "text"], (True, torch.arange(6).reshape(2, 3))),
    "empty": torch.empty(0),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def exchange(group: ComputeGroup) -> tuple[float, str, bool]:
    """Rank 0 tells all; each sends its rank back; a collective runs over all, one over a part."""
    if group.rank == 0:
        group.tell_all(VALUE)
        got = [group.receive_tree(rank)["rank"] for rank in range(1, group.size)]
        assert got == list(range(1, group.size))
        value = VALUE
    else:
        value = group.receive_tree(0)
        group.send_tree({"rank": group.rank}, 0)
    total = torch.tensor([float(group.rank)])
    dist.all_reduce(total)
    pair = group.subgroup((0, 2))
    if group.rank in (0, 2):
        dist.all_reduce(total, group=pair)
    equal = all(
        torch.equal(value[name], VALUE[name]) for name in ("empty", "half")
    ) and torch.equal(value["nested"][1][1], VALUE["nested"][1][1])
    return float(total), str(value["nested"][0]), equal


def test_values_and_collectives(tmp_path: Path) -> None:
    results = Processes(tmp_path, 3, exchange).results()
    assert [total for total, _, _ in results] == [6.0, 3.0, 6.0]
    assert {text for _, text, _ in results} == {"[1.5, None, 'text']"}
    assert all(equal for _, _, equal in results)
    assert computing_mark(tmp_path / "secret", 2).exists()


def wait_for_a_peer(group: ComputeGroup) -> str:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LaunchError, match="of the 3 that compute together was lost") as caught:
        group.receive_tree(1 if group.rank == 0 else 0)
    return caught.value.where


def test_a_lost_process_is_noticed_by_all(tmp_path: Path) -> None:
    """The third waits for the first, which waits for the one that dies."""
    processes = Processes(tmp_path, 3, wait_for_a_peer)
    outcomes = [processes.outcome(rank) for rank in range(3)]
    processes.close()
    assert outcomes == [("gave", "process 0"), ("died", None), ("gave", "process 2")]


def test_too_few_tasks_are_refused() -> None:
    alone = TaskEnvironment(num_compute=4)
    with pytest.raises(LaunchError, match="4 processes are needed, and this run has 1 task"):
        join_group(alone, torch.device("cpu"))


def test_every_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = TaskEnvironment(
        rank=1, num_tasks=2, num_compute=2, local_rank=1, secret_file=tmp_path / "secret"
    )
    with pytest.raises(PlanError, match="process 1 of this node has no GPU of its own"):
        join_group(place, torch.device("cuda"))


def test_tasks_of_several_nodes_meet_at_a_port(tmp_path: Path, monkeypatch) -> None:
    """Both are here; what differs is how they meet."""
    usual = group_processes.place
    monkeypatch.setattr(
        group_processes,
        "place",
        lambda *given: replace(usual(*given), num_nodes=2, node="127.0.0.1"),
    )
    results = Processes(tmp_path, 3, exchange).results()
    assert [total for total, _, _ in results] == [6.0, 3.0, 6.0]
    assert (tmp_path / "secret.group").read_text().startswith("127.0.0.1:")


def make_subgroups(group: ComputeGroup) -> float:
    """One after the other, each once the other process has met in the one before."""
    total = torch.ones(1)
    for _ in range(3):
        torch.distributed.all_reduce(total, group=group.subgroup((0, 1)))
    return total.item()


def test_subgroups_can_be_made_as_long_as_the_group_lives(tmp_path: Path, monkeypatch) -> None:
    """Under SLURM nobody but task 0 removes the file where processes meet: not before the end."""
    usual = group_processes.place
    monkeypatch.setattr(
        group_processes, "place", lambda *given: replace(usual(*given), secret_is_given=False)
    )
    assert Processes(tmp_path, 2, make_subgroups).results() == [8.0, 8.0]
    assert not (tmp_path / "secret.group").exists()

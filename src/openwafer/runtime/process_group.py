"""The processes that compute one model together: how they find and talk to each other.

Decides the rendezvous, what carries tensors (torch.distributed: gloo on CPUs, NCCL between GPUs)
and how structured values travel without pickle. Which task computes is in `streaming/tasks.py`;
what is sent when is for whoever uses a group (pipeline stages, replicas of weight streaming).

Tasks of one node meet at a file that only their user can read, beside the run's secret, and
connect over loopback: there is no port to choose, and two runs cannot collide. Tasks of several
nodes meet at a port that the system chose for task 0, which writes it into that file; the links
between them are those of the cluster's network, and are not encrypted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openwafer.errors import LaunchError, PlanError
from openwafer.files import write_text
from openwafer.runtime.executor import ModelState
from openwafer.streaming.address import format_address, parse_address
from openwafer.streaming.tasks import TaskEnvironment, computing_mark
from openwafer.streaming.tree import describe_batch, read_description

__all__ = ["ComputeGroup", "join_group"]

_log = logging.getLogger("openwafer")

_POLL_SECONDS = 0.1
_LIFE = timedelta(days=30)
"""Processes wait for task 0, which may wait for data or compile: only a lost connection ends that.
A peer that dies closes its connections, which is noticed at once."""
_MAX_BYTES = 1 << 40


class ComputeGroup:
    """This process among `size` that compute together. Rank 0 drives.

    Collectives and messages between tensors go through torch.distributed's default group, or one
    of `subgroup`.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, meeting: Path | None = None
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._meeting = meeting

    @staticmethod
    def subgroup(ranks: tuple[int, ...]) -> Any:
        """A group of some ranks. Every process of the whole group must make it, in one order."""
        return dist.new_group(list(ranks), timeout=_LIFE)

    def send_tree(self, value: Any, to: int) -> None:
        """Send nested tuples, lists and dicts of tensors, numbers and text (host memory).

        Raises:
            LaunchError: the other process is gone.
        """
        description, buffers = describe_batch(value)
        header = torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)
        payload_bytes = sum(buffer.nbytes for buffer in buffers)
        with self.watching(to):
            dist.send(torch.tensor([len(header), payload_bytes]), to)
            dist.send(header, to)
            for buffer in buffers:
                dist.send(_as_tensor(buffer), to)

    def receive_tree(self, source: int) -> Any:
        """What `send_tree` sent.

        Raises:
            LaunchError: the other process is gone, or what came is no such value.
        """
        with self.watching(source):
            sizes = torch.empty(2, dtype=torch.int64)
            dist.recv(sizes, source)
            header_bytes, payload_bytes = (int(size) for size in sizes)
            if not (0 < header_bytes < _MAX_BYTES and 0 <= payload_bytes < _MAX_BYTES):
                raise LaunchError(f"process {source} sent a message of impossible size")
            header = torch.empty(header_bytes, dtype=torch.uint8)
            dist.recv(header, source)
            reading = read_description(json.loads(header.numpy().tobytes()), payload_bytes)
            for buffer in reading.buffers:
                dist.recv(_as_tensor(buffer), source)
        return reading.finish()

    def tell_all(self, message: Mapping[str, Any]) -> None:
        """From rank 0 to every other process, which takes it by `receive_tree(0)`."""
        assert self.rank == 0, "rank 0 drives"
        for rank in range(1, self.size):
            self.send_tree(dict(message), rank)

    def tell_to_load(self, part_of: Callable[[int], ModelState], *, weights_only: bool) -> None:
        """From rank 0: every process takes over its part of a state. They get no optimizer state
        that they would not use.

        Args:
            part_of: by rank, what concerns that process.
        """
        for rank in range(1, self.size):
            state = part_of(rank)
            part = {
                "model": state.model,
                "optimizer": {} if weights_only else state.optimizer,
                "loss_scale": state.loss_scale,
            }
            self.send_tree({"do": "load", "state": part, "weights_only": weights_only}, rank)

    def dismiss(self) -> None:
        """From rank 0: the others stop, those that are still there."""
        with contextlib.suppress(LaunchError):
            self.tell_all({"do": "stop"})

    @contextlib.contextmanager
    def watching(self, peer: int | None = None) -> Any:
        """Around communication: turns a failure of torch.distributed into an error that says which
        process was lost."""
        try:
            yield
        except RuntimeError as error:
            who = "a process" if peer is None else f"process {peer}"
            raise LaunchError(
                f"{who} of the {self.size} that compute together was lost: {_first_line(error)}",
                where=f"process {self.rank}",
                hint="its own messages, above, say why; the newest checkpoint is whole",
            ) from error

    def close(self) -> None:
        """Leave the group. Safe to call twice; never waits for the others."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._meeting is not None:
            self._meeting.unlink(missing_ok=True)


def join_group(
    environment: TaskEnvironment, device: torch.device, *, timeout_seconds: float = 600.0
) -> ComputeGroup:
    """Meet the other processes that compute; returns when all are there.

    Args:
        environment: with `num_compute` above 1 and a rank below it.
        device: where this process computes; a GPU is the one of its place on the node.

    Raises:
        LaunchError: the others did not come in time, or this run has too few tasks.
        PlanError: there are fewer GPUs on the node than processes.
    """
    rank, size = environment.rank, environment.num_compute
    if environment.secret_file is None or size > environment.num_tasks:
        raise LaunchError(
            f"{size} processes are needed, and this run has {environment.num_tasks} task(s)",
            allowed=f"{size} tasks or more; those above {size} stream data",
            hint=f"srun --ntasks={size} …, or openwafer launch --tasks {size} -- …",
        )
    assert rank < size, "a task that streams data computes nothing"
    device = _own_device(device, environment.local_rank)
    path = environment.secret_file.with_suffix(".group")
    limit = timedelta(seconds=timeout_seconds)
    one_node = environment.num_nodes == 1
    if one_node:
        # Read by gloo when its device is made: nothing of it listens beyond this machine.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        if environment.secret_is_given:
            computing_mark(environment.secret_file, rank).touch()
        store = _meet_at_file(path, size) if one_node else _meet_at_port(path, environment, limit)
        store.set_timeout(limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on how it was built
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=_LIFE,
            )
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"process {rank} did not meet the other {size - 1} that compute with it: "
            f"{_first_line(error)}",
            where=str(path),
            hint="start all tasks of a run together; if no run of yours is on, this file is an "
            "earlier one's and can be deleted",
        ) from error
    # Every subgroup meets in the same file, so it stays as long as the group. A launcher deletes it
    # with its own folder.
    is_ours = rank == 0 and not environment.secret_is_given
    return ComputeGroup(rank, size, device, path if is_ours else None)


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise PlanError(
            f"process {local_rank} of this node has no GPU of its own: there are {count}",
            where="--device",
            allowed="as many computing tasks on a node as it has GPUs",
            hint="fewer stages or replicas, more nodes, or --device cpu",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _meet_at_file(path: Path, size: int) -> dist.Store:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    return dist.FileStore(str(path), size)


def _meet_at_port(path: Path, environment: TaskEnvironment, limit: timedelta) -> dist.Store:
    size = environment.num_compute
    if environment.rank == 0:
        host = environment.node
        store = dist.TCPStore(host, 0, size, is_master=True, timeout=limit, wait_for_workers=False)
        write_text(path, format_address(host, store.port))
        return store
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        with contextlib.suppress(FileNotFoundError):
            host, port = parse_address(path.read_text(encoding="ascii"))
            return dist.TCPStore(host, port, size, is_master=False, timeout=limit)
        if time.monotonic() >= deadline:
            raise OSError("task 0 did not say where it is")
        time.sleep(_POLL_SECONDS)


def _as_tensor(buffer: memoryview) -> torch.Tensor:
    """The same memory, to be sent or filled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may be read-only: then it is only sent
        return torch.frombuffer(buffer, dtype=torch.uint8)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text.split(". This is typically")[0] or type(error).__name__

"""Processes that compute together, for tests: each runs a function with its ComputeGroup."""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from openwafer.runtime.process_group import join_group
from openwafer.streaming.tasks import TaskEnvironment

__all__ = ["LIMIT_SECONDS", "Processes"]

LIMIT_SECONDS = 60


def place(folder: Path, rank: int, size: int) -> TaskEnvironment:
    return TaskEnvironment(
        rank=rank,
        num_tasks=size,
        num_compute=size,
        secret_file=folder / "secret",
        secret_is_given=True,
        local_rank=rank,
    )


def _main(
    answer: Connection,
    function: Callable[..., Any],
    folder: Path,
    rank: int,
    size: int,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        group = join_group(
            place(folder, rank, size), torch.device("cpu"), timeout_seconds=LIMIT_SECONDS
        )
        try:
            kept = io.BytesIO()
            torch.save(function(group, *arguments), kept)  # tensors as bytes, not as shared memory
            answer.send(("gave", kept.getvalue()))
        finally:
            group.close()
    except BaseException as error:
        answer.send(("raised", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Processes:
    """`size` processes that call `function(group, *arguments)`.

    `fork` keeps them cheap: the caller must not have used torch.distributed itself.
    """

    def __init__(
        self, folder: Path, size: int, function: Callable[..., Any], *arguments: Any
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.answers: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(theirs, function, folder, rank, size, arguments)
            )
            process.start()
            theirs.close()
            self.answers.append(ours)
            self.processes.append(process)

    def outcome(self, rank: int) -> tuple[str, Any]:
        """("gave", result), ("raised", text), or ("died", None)."""
        assert self.answers[rank].poll(LIMIT_SECONDS), f"process {rank} said nothing"
        try:
            kind, value = self.answers[rank].recv()
        except EOFError:
            return "died", None
        return kind, torch.load(io.BytesIO(value), weights_only=False) if kind == "gave" else value

    def results(self) -> list[Any]:
        """What all gave."""
        found = [self.outcome(rank) for rank in range(len(self.processes))]
        self.close()
        for kind, value in found:
            assert kind == "gave", value
        return [value for _, value in found]

    def close(self) -> None:
        for process in self.processes:
            process.join(LIMIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for answer in self.answers:
            answer.close()

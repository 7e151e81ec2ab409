"""Values and gradients on their way between the stages of a pipeline.

Decides when a receive is posted and when a sent tensor may go: sends never wait; receives from a
process are posted in the order in which it sends, a little ahead of their use, so that they arrive
during computation and memory stays bounded. Does not decide what is sent (stages.py).

Values go from lower ranks to higher ones and back on two groups: NCCL keeps one queue for each pair
and group, and with one group for both directions two processes could wait for each other. (With
NCCL this is as its documentation has it; it has been run with gloo only.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stages.cuts import Crossing, StagedModel
from openwafer.runtime.stages.schedule import Action

__all__ = ["Mailbox", "Post"]

_AHEAD = 2
"""Messages of one sender that may arrive before they are asked for."""


@dataclass(frozen=True, slots=True)
class Post:
    """One message: `F` the values of a crossing, `B` the gradients that come back over it."""

    kind: Literal["F", "B"]
    source: int
    target: int
    microbatch: int


@dataclass(slots=True)
class _Arriving:
    works: list[Any]
    tensors: list[torch.Tensor]


class Mailbox:
    """The messages of one process during one pass over its microbatches.

    Args:
        first_rank: rank in the group of the pipeline's process 0.
        down, up: groups for messages to higher ranks and to lower ones.
        tables: what every process of the pipeline does; tells in which order messages come.
    """

    def __init__(
        self,
        group: ComputeGroup,
        staged: StagedModel,
        process: int,
        *,
        first_rank: int,
        down: Any,
        up: Any,
        tables: Sequence[Sequence[Action]],
    ) -> None:
        self._group, self._staged, self._process = group, staged, process
        self._first_rank, self._down, self._up = first_rank, down, up
        self._crossings = {(c.source, c.target): c for s in staged.stages for c in s.outgoing}
        self._due = {
            other: deque(_posts_between(staged, table, other, process))
            for other, table in enumerate(tables)
            if other != process
        }
        self._tags = dict.fromkeys(self._due, 0)
        self._sent_tags = dict.fromkeys(self._due, 0)
        self._arriving: dict[Post, _Arriving] = {}
        self._posted = dict.fromkeys(self._due, 0)
        self._here: dict[Post, list[torch.Tensor]] = {}
        self._leaving: list[tuple[int, Any, torch.Tensor]] = []

    def send(self, post: Post, tensors: Sequence[torch.Tensor]) -> None:
        """Hand a message over; its tensors must not be changed any more."""
        reader = post.target if post.kind == "F" else post.source
        to = self._staged.process_of(reader)
        if to == self._process:
            self._here[post] = list(tensors)
            return
        group = self._group_towards(to)
        self._leaving = [entry for entry in self._leaving if not entry[1].is_completed()]
        with self._group.watching(self._first_rank + to):
            for tensor in tensors:
                whole = tensor.contiguous()
                tag = self._sent_tags[to]
                work = dist.isend(whole, self._first_rank + to, group=group, tag=tag)
                self._leaving.append((to, work, whole))
                self._sent_tags[to] += 1

    def take(self, post: Post) -> list[torch.Tensor]:
        """Wait for a message.

        Raises:
            LaunchError: its sender is gone.
        """
        writer = post.source if post.kind == "F" else post.target
        sender = self._staged.process_of(writer)
        if sender == self._process:
            return self._here.pop(post)
        with self._group.watching(self._first_rank + sender):
            self._post_up_to(sender, post)
            arriving = self._arriving.pop(post)
            for work in arriving.works:
                work.wait()
        self._posted[sender] -= 1
        return arriving.tensors

    def finish(self) -> None:
        """Wait until everything sent has been taken."""
        for to, work, _ in self._leaving:
            with self._group.watching(self._first_rank + to):
                work.wait()
        self._leaving.clear()
        assert not self._arriving, "a message that nobody took"
        assert not self._here, "a message that nobody took"

    def _post_up_to(self, sender: int, post: Post) -> None:
        """Post receives in the sender's order until `post`'s is, and the next ones with it."""
        due = self._due[sender]
        while due and (post not in self._arriving or self._posted[sender] <= _AHEAD):
            self._post(sender, due.popleft())
            self._posted[sender] += 1

    def _post(self, sender: int, post: Post) -> None:
        crossing, device = self._crossings[post.source, post.target], self._group.device
        tensors: list[torch.Tensor] = []
        works: list[Any] = []
        group = self._group_towards(sender, coming=True)
        for fact in crossing.facts_of(_names(crossing, post)):
            tensors.append(torch.empty(fact.shape, dtype=fact.dtype, device=device))
            tag = self._tags[sender]
            works.append(dist.irecv(tensors[-1], self._first_rank + sender, group=group, tag=tag))
            self._tags[sender] += 1
        self._arriving[post] = _Arriving(works, tensors)

    def _group_towards(self, other: int, *, coming: bool = False) -> Any:
        return self._down if (other > self._process) != coming else self._up


def _names(crossing: Crossing, post: Post) -> tuple[str, ...]:
    return crossing.names if post.kind == "F" else crossing.returned


def _posts_between(
    staged: StagedModel, table: Sequence[Action], sender: int, receiver: int
) -> list[Post]:
    """What `sender` sends to `receiver`, in its order."""
    posts: list[Post] = []
    for action in table:
        stage = staged.stages[action.stage]
        if action.kind == "F":
            posts += [
                Post("F", c.source, c.target, action.microbatch)
                for c in stage.outgoing
                if staged.process_of(c.target) == receiver
            ]
        elif action.kind in ("B", "I"):
            posts += [
                Post("B", c.source, c.target, action.microbatch)
                for c in stage.incoming
                if staged.process_of(c.source) == receiver and c.returned
            ]
    return posts

"""What coordinator and workers say to each other, and what the coordinator remembers of it.

Decides the messages and the values that hold their content. Does not send or wait.

Messages to a worker:   {"do": "describe", "mode"}, {"do": "open", "stream", "mode", "epoch",
                        "start", "credit"}, {"do": "more", "stream"}, {"do": "close", "stream"},
                        {"do": "share"} (the memory it offered is open here), {"do": "stop"}; any of
                        them with "free": slots of that memory which are not in use any more
Messages from a worker: {"is": "hello", "host", "pid", "memory"}, {"is": "described", "mode",
                        "num_batches", "already_sharded"}, {"is": "end", "stream"}, {"is": "failed",
                        "error", "where"}, {"is": "batch", "stream", "number", "busy_seconds"} with
                        it
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from openwafer.streaming import wire
from openwafer.streaming.shared_slots import SlotReader
from openwafer.streaming.source import Mode

__all__ = ["END", "Description", "OpenStream", "WorkerLink"]

END = object()
"""Stands for the batch after a worker's last one in an epoch."""


@dataclass(slots=True, eq=False)
class WorkerLink:
    """One connected worker."""

    rank: int
    connection: socket.socket
    address: str
    name: str
    last_batch: str = "none"
    waited_seconds: float = 0.0
    busy_seconds: dict[Mode, float] = field(default_factory=dict[Mode, float])
    """By mode, what loading and sending its batches took the worker."""
    lost: str = ""
    """How the connection was lost; empty while it is there."""
    lost_at_seconds: float = 0.0
    slots: SlotReader | None = None
    """Memory shared with it, where it is on this machine."""
    send_lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: dict[str, Any]) -> None:
        with self.send_lock:
            free = self.slots.take_returned() if self.slots is not None else []
            wire.send_message(self.connection, message | {"free": free} if free else message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a worker says about its data for one mode."""

    num_batches: int | None
    already_sharded: bool


@dataclass(slots=True, eq=False)
class OpenStream:
    """One open epoch: what has come from each rank and is not consumed, and what comes next."""

    number: int
    mode: Mode
    epoch: int
    waiting: dict[int, deque[Any]]
    next_number: dict[int, int]
    """Per rank, the batch that is due to come from it next."""

"""Frames over a TCP socket.

Decides the bytes: a fixed head (magic, version, kind, lengths), a bounded JSON header, and for a
batch its raw numbers, received straight into the tensors that keep them, or the number of the slot
in which they are (`shared_slots.py`). Nothing is unpickled, and no length is believed before it is
checked against its bound. Does not decide who may connect (`auth.py`) nor what the messages mean
(`coordinator.py`, `worker.py`).
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

from openwafer.errors import DataError, StreamingError
from openwafer.streaming.shared_slots import SlotReader, SlotWriter
from openwafer.streaming.source import Batch
from openwafer.streaming.tree import describe_batch, read_description, read_from_slot

__all__ = [
    "MAX_HEADER_BYTES",
    "CutShortError",
    "Frame",
    "receive_frame",
    "receive_into",
    "send_batch",
    "send_message",
    "set_up_socket",
]

MAX_HEADER_BYTES = 1 << 20
"""Room for a few thousand tensors or the text of a batch; a larger header is refused."""


class CutShortError(StreamingError):
    """The other side is gone; what it sent before was right."""


_MAGIC = b"OWST"
_VERSION = 1
_MESSAGE, _BATCH, _BATCH_IN_SLOT = 1, 2, 3
# magic, version, kind, reserved, header bytes, payload bytes
_HEAD = struct.Struct("!4sBBHIQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What one side said: a message, and with it a batch (`has_batch`) or not."""

    message: dict[str, Any]
    batch: Batch = None
    has_batch: bool = False


def send_message(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a JSON message.

    Raises:
        OSError: the connection is gone.
    """
    header = json.dumps(message).encode()
    assert len(header) <= MAX_HEADER_BYTES, "a message of our own is too long"
    connection.sendall(_HEAD.pack(_MAGIC, _VERSION, _MESSAGE, 0, len(header), 0) + header)


def send_batch(
    connection: socket.socket,
    message: Mapping[str, Any],
    batch: Batch,
    *,
    max_payload_bytes: int,
    slots: SlotWriter | None = None,
) -> None:
    """Send `batch` with `message`, without copying host tensors that are contiguous.

    Args:
        slots: memory that the other side sees too, used where there is room.

    Raises:
        DataError: the batch cannot be streamed, or is larger than the bounds.
        OSError: the connection is gone.
    """
    description, buffers = describe_batch(batch)
    payload_bytes = sum(buffer.nbytes for buffer in buffers)
    if payload_bytes > max_payload_bytes:
        raise DataError(
            f"a batch has {payload_bytes} bytes",
            allowed=f"at most {max_payload_bytes} bytes per streamed batch",
            hint="a smaller batch_size",
        )
    content: dict[str, Any] = {"message": message, "batch": description}
    slot = slots.write(buffers) if slots is not None else None
    if slot is not None:
        content["slot"] = slot
        kind, payload_bytes, buffers = _BATCH_IN_SLOT, 0, []
    else:
        kind = _BATCH
    header = json.dumps(content).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise DataError(
            f"a batch has {len(header)} bytes of text and structure",
            allowed=f"at most {MAX_HEADER_BYTES} bytes besides tensors and arrays",
            hint="let collate_fn give tensors",
        )
    head = _HEAD.pack(_MAGIC, _VERSION, kind, 0, len(header), payload_bytes)
    connection.sendall(head + header)
    for buffer in buffers:
        connection.sendall(buffer)


def receive_frame(
    connection: socket.socket, *, max_payload_bytes: int, slots: SlotReader | None = None
) -> Frame | None:
    """The next frame; None if the other side closed the connection between two frames.

    Args:
        slots: where a batch may be instead of following its header.

    Raises:
        StreamingError: garbage, a truncated frame, or one over the bounds.
        OSError: the connection is gone.
    """
    head = bytearray(_HEAD.size)
    if not receive_into(connection, memoryview(head), may_end=True):
        return None
    magic, version, kind, _, header_bytes, payload_bytes = _HEAD.unpack(head)
    if magic != _MAGIC or version != _VERSION or not _MESSAGE <= kind <= _BATCH_IN_SLOT:
        raise StreamingError("received something that is not a frame of this protocol")
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise StreamingError(
            f"received a frame that declares {header_bytes} + {payload_bytes} bytes",
            allowed=f"{MAX_HEADER_BYTES} + {max_payload_bytes} bytes",
        )
    header = bytearray(header_bytes)
    receive_into(connection, memoryview(header))
    content = _parse(header)
    if kind != _BATCH and payload_bytes:
        raise StreamingError("received a message that declares a payload")
    if kind == _MESSAGE:
        return Frame(message=content)
    message = content.get("message")
    if not isinstance(message, dict) or "batch" not in content:
        raise StreamingError("received a batch without its description")
    if kind == _BATCH_IN_SLOT:
        batch = _batch_in_slot(content, slots)
    else:
        reading = read_description(content["batch"], payload_bytes)
        for buffer in reading.buffers:
            receive_into(connection, buffer)
        batch = reading.finish()
    return Frame(message=cast("dict[str, Any]", message), batch=batch, has_batch=True)


def _batch_in_slot(content: Mapping[str, Any], slots: SlotReader | None) -> Batch:
    slot = content.get("slot")
    if slots is None or type(slot) is not int:
        raise StreamingError("received a batch that is nowhere")
    return read_from_slot(content["batch"], lambda num_bytes: slots.lease(slot, num_bytes))


def receive_into(connection: socket.socket, buffer: memoryview, *, may_end: bool = False) -> bool:
    """Fill `buffer`; False if nothing more came and `may_end`.

    Raises:
        StreamingError: the connection ended inside the buffer.
        OSError: the connection is gone.
    """
    received = 0
    while received < len(buffer):
        count = connection.recv_into(buffer[received:])
        if count == 0:
            if may_end and received == 0:
                return False
            raise CutShortError("the connection ended in the middle of a frame")
        received += count
    return True


def _parse(header: bytearray) -> dict[str, Any]:
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise StreamingError("received a header that is not JSON") from error
    if not isinstance(content, dict):
        raise StreamingError("received a header that is not an object")
    return cast("dict[str, Any]", content)


# A forked DataLoader process must not hold the connection open after its parent has died.
_not_for_children: WeakSet[socket.socket] = WeakSet()


def _close_in_child() -> None:
    for connection in list(_not_for_children):
        connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def set_up_socket(connection: socket.socket) -> None:
    """No delay for small frames; a peer whose machine vanished is noticed within a minute, and
    one whose process died at once, whatever children it leaves."""
    _not_for_children.add(connection)
    connection.settimeout(None)
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        option = getattr(socket, name, None)  # Linux has all three
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

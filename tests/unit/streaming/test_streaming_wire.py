"""Frames: what goes in comes out, and garbage does no harm."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.errors import DataError, StreamingError
from openwafer.streaming import wire

LIMIT = 1 << 20
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.complex64, torch.uint16),
]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    for end in (left, right):
        end.settimeout(10)
    yield left, right
    left.close()
    right.close()


def through_the_wire(batch: Any) -> Any:
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(
            target=wire.send_batch,
            args=(left, {"batch": 1}, batch),
            kwargs={"max_payload_bytes": LIMIT},
        )
        sender.start()
        frame = wire.receive_frame(right, max_payload_bytes=LIMIT)
        sender.join()
    assert frame is not None
    assert frame.has_batch
    assert frame.message == {"batch": 1}
    return frame.batch


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*as_bytes)
    elif isinstance(left, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    elif isinstance(left, float) and math.isnan(left):
        assert math.isnan(right)
    else:
        assert left == right


def make_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if num_bytes else torch.empty(shape, dtype=dtype)


def arrays() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    return st.builds(
        lambda dtype, shape: np.arange(math.prod(shape)).astype(dtype).reshape(shape),
        st.sampled_from(["?", "<i4", ">f8", "<u2", "<c8", "<f2"]),
        st.lists(st.integers(0, 4), max_size=3),
    )


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(),
    st.builds(
        make_tensor,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 5), max_size=4),
        st.integers(0, 99),
    ),
    arrays(),
    st.builds(np.float32, st.integers(0, 9)),
)
batches = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(batches)
@settings(max_examples=150, deadline=None)
def test_round_trip(batch: Any) -> None:
    assert_equal(through_the_wire(batch), batch)


def test_tensors_that_are_not_plain_memory() -> None:
    grid = torch.arange(12.0).reshape(3, 4)
    for tensor in (grid.t(), grid[:, ::2], grid[0, 0], torch.ones(2, requires_grad=True)):
        received = through_the_wire(tensor)
        assert torch.equal(received, tensor.detach())
    assert torch.equal(through_the_wire(torch.tensor([1 + 2j]).conj()), torch.tensor([1 - 2j]))


def test_other_mappings_become_dicts() -> None:
    assert_equal(through_the_wire(OrderedDict(b=1, a=2)), {"b": 1, "a": 2})


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": [torch.ones(1), {1, 2}]}, r"`batch\['x'\]\[1\]` is a builtins.set"),
        (Point(1, 2), "Point"),
        ({1: 2}, "the key 1"),
        (np.array([object()]), "NumPy array of object"),
        (torch.eye(2).to_sparse(), "sparse"),
        (1 << 70, "64 bits"),
        (nested(40), "nested deeper"),
        (torch.zeros(LIMIT + 1, dtype=torch.uint8), "bytes"),
        (["x" * 100] * 20_000, "text and structure"),
    ],
)
def test_what_cannot_be_streamed_is_named(
    pair: tuple[socket.socket, socket.socket], batch: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        wire.send_batch(pair[0], {}, batch, max_payload_bytes=LIMIT)


def test_messages_and_a_clean_end(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    wire.send_message(left, {"do": "stop", "n": 3})
    left.close()
    frame = wire.receive_frame(right, max_payload_bytes=LIMIT)
    assert frame is not None
    assert frame.message == {"do": "stop", "n": 3}
    assert not frame.has_batch
    assert wire.receive_frame(right, max_payload_bytes=LIMIT) is None


def receive_bytes(data: bytes) -> wire.Frame | None:
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(data)
        right.settimeout(5)
        return wire.receive_frame(right, max_payload_bytes=1000)


def frame_bytes(header: bytes, payload: bytes = b"", kind: int = 2, **declared: int) -> bytes:
    header_bytes = declared.get("header_bytes", len(header))
    payload_bytes = declared.get("payload_bytes", len(payload))
    return struct.pack("!4sBBHIQ", b"OWST", 1, kind, 0, header_bytes, payload_bytes) + (
        header + payload
    )


def batch_bytes(description: str, payload: bytes = b"", **declared: int) -> bytes:
    header = '{"message": {}, "batch": ' + description + "}"
    return frame_bytes(header.encode(), payload, **declared)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OWST",
        frame_bytes(b"{}", kind=9),
        frame_bytes(b"{", header_bytes=1 << 31),
        frame_bytes(b"{}", payload_bytes=1 << 40),
        frame_bytes(b"{}", header_bytes=3),
        frame_bytes(b"[]"),
        frame_bytes(b"\xff\xfe"),
        frame_bytes(b"{}", b"abc", kind=1),
        frame_bytes(b"[" * 100_000),
        batch_bytes('{"T": ["float32", [2]]}', b"1234"),
        batch_bytes('{"T": ["float32", [2]]}', b"1234", payload_bytes=8),
        batch_bytes('{"T": ["float32", [1099511627776, 1099511627776]]}'),
        batch_bytes('{"T": ["float32", [-1, -4]]}', b"0" * 16),
        batch_bytes('{"T": ["float32", [true]]}', b"1234"),
        batch_bytes('{"T": ["nothing", [1]]}', b"1234"),
        batch_bytes('{"T": ["float32"]}'),
        batch_bytes('{"A": ["|O8", [1]]}', b"12345678"),
        batch_bytes('{"A": ["f4,i4", [1]]}', b"12345678"),
        batch_bytes('{"A": ["<f3", [1]]}', b"123"),
        batch_bytes('{"S": ["<f4", [1]]}', b"1234"),
        batch_bytes('{"f": "1e5"}'),
        batch_bytes('{"f": ["nan"]}'),
        batch_bytes('{"d": [[1, 2]]}'),
        batch_bytes('{"d": [["a"]]}'),
        batch_bytes('{"q": 1}'),
        batch_bytes('{"t": 1}'),
        batch_bytes("[1]"),
        batch_bytes("1" * 5000),
        batch_bytes('{"l": [' * 40 + "1" + "]}" * 40),
        frame_bytes(b'{"message": 1, "batch": 1}'),
    ],
)
def test_garbage_is_a_streaming_error(data: bytes) -> None:
    with pytest.raises(StreamingError):
        receive_bytes(data)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bytes_never_crash(data: bytes) -> None:
    if not data:
        assert receive_bytes(data) is None
        return
    with pytest.raises(StreamingError):
        receive_bytes(data)


VALID = batch_bytes(
    '{"d": [["x", {"T": ["int16", [2, 2]]}], ["y", {"t": [1, null]}]]}', b"12345678"
)


@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_one_wrong_byte_never_crashes(place: int, value: int) -> None:
    broken = bytearray(VALID)
    broken[place] = value
    with contextlib.suppress(StreamingError):
        receive_bytes(bytes(broken))


def test_the_valid_one_is_valid() -> None:
    frame = receive_bytes(VALID)
    assert frame is not None
    assert frame.batch["x"].shape == (2, 2)
    assert frame.batch["y"] == (1, None)

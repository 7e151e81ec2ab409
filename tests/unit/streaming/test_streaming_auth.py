"""The secret's file and the handshake, each side against a true and a false other."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openwafer.errors import StreamingError
from openwafer.streaming import auth
from openwafer.streaming.tasks import TaskEnvironment

SECRET = bytes(range(32))
OTHER = bytes(32)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def in_background(function: Callable[[], object]) -> Callable[[], object]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except (StreamingError, OSError) as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> object:
        thread.join(10)
        return results[0]

    return result


def test_the_secret_is_private_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    secret = auth.create_secret(path)
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert auth.read_secret(path) == secret
    assert auth.create_secret(path) != secret
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_a_secret_that_others_could_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    auth.create_secret(path)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(StreamingError, match="not private"):
            auth.read_secret(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(StreamingError, match="it is a link"):
        auth.read_secret(link)
    path.write_bytes(b"short")
    with pytest.raises(StreamingError, match="wrong length"):
        auth.read_secret(path)
    with pytest.raises(FileNotFoundError):
        auth.read_secret(tmp_path / "absent")
    with pytest.raises(StreamingError):
        auth.read_secret(tmp_path)


def test_a_secret_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamingError, match="cannot write"):
        auth.create_secret(tmp_path / "file" / "secret")


def test_both_sides_with_the_secret(pair: tuple[socket.socket, socket.socket]) -> None:
    result = in_background(lambda: auth.introduce(pair[0], SECRET, 3, 5))
    assert auth.admit(pair[1], SECRET, lambda rank: auth.Verdict.ADMITTED, 5) == 3
    assert result() is None


def test_the_worker_finds_out_a_false_coordinator(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    result = in_background(lambda: auth.admit(pair[1], OTHER, lambda _: auth.Verdict.ADMITTED, 5))
    with pytest.raises(auth.RefusedError, match="does not know this run's secret"):
        auth.introduce(pair[0], SECRET, 1, 5)
    pair[0].close()
    assert isinstance(result(), StreamingError)


def false_worker(connection: socket.socket, secret: bytes, role: bytes = b"worker") -> bytes:
    """The worker's side written down a second time, without checking the coordinator."""
    nonce = os.urandom(32)
    connection.sendall(b"OWHS\x01" + (1).to_bytes(4, "big") + nonce)
    answer = connection.recv(4096)
    message = b"\0".join([b"OWHS\x01", role, (1).to_bytes(4, "big"), nonce, answer[5:37]])
    connection.sendall(hmac.new(secret, message, hashlib.sha256).digest())
    return connection.recv(1)


def test_the_coordinator_finds_out_a_false_worker(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    claimed: list[int] = []

    def claim(rank: int) -> auth.Verdict:
        claimed.append(rank)
        return auth.Verdict.ADMITTED

    result = in_background(lambda: auth.admit(pair[1], SECRET, claim, 5))
    assert false_worker(pair[0], OTHER) == bytes([auth.Verdict.WRONG_SECRET])
    assert isinstance(result(), auth.RefusedError)
    # The coordinator's own proof sent back to it does not pass either.
    result = in_background(lambda: auth.admit(pair[1], SECRET, claim, 5))
    assert false_worker(pair[0], SECRET, b"coordinator") == bytes([auth.Verdict.WRONG_SECRET])
    assert isinstance(result(), auth.RefusedError)
    assert claimed == []
    result = in_background(lambda: auth.admit(pair[1], SECRET, claim, 5))
    assert false_worker(pair[0], SECRET) == bytes([auth.Verdict.ADMITTED])
    assert result() == 1


def test_a_place_that_is_not_given(pair: tuple[socket.socket, socket.socket]) -> None:
    result = in_background(
        lambda: auth.admit(pair[1], SECRET, lambda _: auth.Verdict.RANK_TAKEN, 5)
    )
    with pytest.raises(auth.RefusedError, match="already connected"):
        auth.introduce(pair[0], SECRET, 2, 5)
    assert isinstance(result(), auth.RefusedError)


def test_slow_bytes_do_not_prolong_the_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            pair[0].send(b"O")

    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        auth.admit(pair[1], SECRET, lambda _: auth.Verdict.ADMITTED, 0.4)
    assert time.monotonic() - started < 30
    stop.set()
    thread.join()


def test_other_protocols_are_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n")
    with pytest.raises(auth.RefusedError, match="does not speak"):
        auth.admit(pair[1], SECRET, lambda _: auth.Verdict.ADMITTED, 5)
    pair[1].sendall(b"HTTP/1.1 400 Bad Request\r\n" + b"x" * 100)
    with pytest.raises(auth.RefusedError, match="not a coordinator"):
        auth.introduce(pair[0], SECRET, 1, 5)


def test_the_runs_secret_without_a_launcher(tmp_path: Path) -> None:
    def task(rank: int, *, given: bool = False) -> TaskEnvironment:
        path = tmp_path / "secret"
        return TaskEnvironment(rank=rank, num_tasks=2, secret_file=path, secret_is_given=given)

    for waiting in (task(1), task(0, given=True)):
        with pytest.raises(StreamingError, match="is not there"):
            auth.run_secret(waiting, 0)
    result = in_background(lambda: auth.run_secret(task(1), 5))
    secret = auth.run_secret(task(0), 0)
    assert result() == secret
    assert auth.run_secret(task(0, given=True), 0) == secret
    for other in (task(1), task(0, given=True)):
        auth.discard_secret(other)
        assert (tmp_path / "secret").exists()
    auth.discard_secret(task(0))
    assert not (tmp_path / "secret").exists()

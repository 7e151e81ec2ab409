"""Who may take part in a run.

Decides how the run's secret is kept (32 random bytes in a file that only its owner can read) and
how each side of a new connection proves that it knows it: a fresh random number from either side,
answered with HMAC-SHA256 over both, the role and the rank. The secret itself never travels and is
never on a command line. What follows on the connection is not encrypted. Does not open
connections.

The exchange, all of fixed length:

    worker       magic, rank, nonce                        who am I, prove yourself
    coordinator  magic, nonce, proof as coordinator
    worker       proof as worker
    coordinator  verdict                                   one byte
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hmac
import os
import secrets
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from openwafer.errors import StreamingError
from openwafer.streaming.tasks import SECRET_FILE_VARIABLE, TaskEnvironment

__all__ = [
    "SECRET_BYTES",
    "RefusedError",
    "StrangerError",
    "Verdict",
    "admit",
    "create_secret",
    "discard_secret",
    "introduce",
    "read_secret",
    "run_secret",
]

SECRET_BYTES = 32
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_MAGIC = b"OWHS\x01"
_INTRODUCTION = struct.Struct(f"!{len(_MAGIC)}sI{_NONCE_BYTES}s")
_ANSWER = struct.Struct(f"!{len(_MAGIC)}s{_NONCE_BYTES}s{_PROOF_BYTES}s")


class Verdict(enum.IntEnum):
    """The coordinator's last word in the handshake."""

    ADMITTED = 1
    WRONG_SECRET = 2
    UNKNOWN_RANK = 3
    RANK_TAKEN = 4


_VERDICT_TEXT = {
    Verdict.WRONG_SECRET: "it does not know the run's secret",
    Verdict.UNKNOWN_RANK: "its rank is not one of this run's workers",
    Verdict.RANK_TAKEN: "a task of this rank is already connected",
}


class RefusedError(StreamingError):
    """A handshake that failed for good: trying again will not help."""


class StrangerError(RefusedError):
    """The two sides are not of one run; where the address may be an old one, of this run yet."""


def create_secret(path: Path) -> bytes:
    """Make a new secret and write it to `path`, readable by its owner alone.

    A file that is already there is replaced at once, never seen half-written.

    Raises:
        StreamingError: it cannot be written.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(temporary, flags, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StreamingError(f"cannot write the run's secret: {error}", where=str(path)) from error
    return secret


def read_secret(path: Path) -> bytes:
    """The secret in `path`.

    Raises:
        FileNotFoundError: it is not there (yet).
        StreamingError: others could read or change it, it is not a plain file of this user, or it
            has another length.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else str(error)
        raise StreamingError(f"cannot read the run's secret: {why}", where=str(path)) from error
    try:
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)
        content = os.read(descriptor, SECRET_BYTES + 1) if is_file else b""
    finally:
        os.close(descriptor)
    if status.st_mode & 0o077 or status.st_uid != os.getuid():
        raise StreamingError(
            "the run's secret is not private",
            where=f"{path} (mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid})",
            allowed="a file of your own with mode 0600",
            hint="delete it and start the run again",
        )
    if len(content) != SECRET_BYTES:
        raise StreamingError(
            "the run's secret has a wrong length", where=str(path), allowed=f"{SECRET_BYTES} bytes"
        )
    return content


def run_secret(environment: TaskEnvironment, timeout_seconds: float) -> bytes:
    """The secret of this run: read where the launcher made it; otherwise the coordinator makes it
    and the workers wait for its file.

    Raises:
        StreamingError: it is missing, not private, or did not come in time.
    """
    path = environment.secret_file
    assert path is not None, "a single process has no secret"
    if environment.role == "coordinator" and not environment.secret_is_given:
        return create_secret(path)
    deadline = time.monotonic() + (0 if environment.secret_is_given else timeout_seconds)
    while True:
        try:
            return read_secret(path)
        except FileNotFoundError as error:
            if time.monotonic() >= deadline:
                raise StreamingError(
                    "the run's secret is not there",
                    where=str(path),
                    hint="start all tasks of a run together; their home folder must be shared,"
                    f" or {SECRET_FILE_VARIABLE} must name a file that all of them can read",
                ) from error
        time.sleep(0.2)


def discard_secret(environment: TaskEnvironment) -> None:
    """Delete the secret's file if the coordinator made it; once all workers are in, nobody needs
    it any more. A launcher deletes its own."""
    if environment.role == "coordinator" and not environment.secret_is_given:
        assert environment.secret_file is not None
        environment.secret_file.unlink(missing_ok=True)


def introduce(connection: socket.socket, secret: bytes, rank: int, timeout_seconds: float) -> None:
    """The worker's side of the handshake.

    Raises:
        RefusedError: the other side does not know the secret, or does not want this task.
        StreamingError, OSError: the connection ended or took too long; it may be tried again.
    """
    deadline = time.monotonic() + timeout_seconds
    nonce = secrets.token_bytes(_NONCE_BYTES)
    _send(connection, _INTRODUCTION.pack(_MAGIC, rank, nonce), deadline)
    magic, their_nonce, proof = _ANSWER.unpack(_receive(connection, _ANSWER.size, deadline))
    if magic != _MAGIC:
        raise StrangerError(
            "what answers at the address is not a coordinator of this version",
            hint="another port in --cs_ip",
        )
    if not hmac.compare_digest(proof, _proof(secret, b"coordinator", nonce, their_nonce, rank)):
        raise StrangerError(
            "the coordinator at the address does not know this run's secret",
            hint="another run may be listening there: choose another port in --cs_ip",
        )
    _send(connection, _proof(secret, b"worker", nonce, their_nonce, rank), deadline)
    verdict = _receive(connection, 1, deadline)[0]
    if verdict != Verdict.ADMITTED:
        known = verdict in set(Verdict)
        why = _VERDICT_TEXT[Verdict(verdict)] if known else "it gave no reason"
        kind = StrangerError if verdict == Verdict.WRONG_SECRET else RefusedError
        raise kind(f"the coordinator refused task {rank}: {why}")


def admit(
    connection: socket.socket,
    secret: bytes,
    claim: Callable[[int], Verdict],
    timeout_seconds: float,
) -> int:
    """The coordinator's side of the handshake; the rank of the worker that passed it.

    Args:
        claim: called with the rank once the proof is right; takes the place or says why not.

    Raises:
        RefusedError: no proof, or the place was not given.
        StreamingError, OSError: the connection ended or took too long.
    """
    deadline = time.monotonic() + timeout_seconds
    introduction = _receive(connection, _INTRODUCTION.size, deadline)
    magic, rank, their_nonce = _INTRODUCTION.unpack(introduction)
    if magic != _MAGIC:
        raise RefusedError("it does not speak this protocol")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    own_proof = _proof(secret, b"coordinator", their_nonce, nonce, rank)
    _send(connection, _ANSWER.pack(_MAGIC, nonce, own_proof), deadline)
    proof = _receive(connection, _PROOF_BYTES, deadline)
    expected = _proof(secret, b"worker", their_nonce, nonce, rank)
    known = hmac.compare_digest(proof, expected)
    verdict = claim(rank) if known else Verdict.WRONG_SECRET
    _send(connection, bytes([verdict]), deadline)
    if verdict != Verdict.ADMITTED:
        raise RefusedError(_VERDICT_TEXT[verdict])
    return rank


def _proof(
    secret: bytes, role: bytes, worker_nonce: bytes, coordinator_nonce: bytes, rank: int
) -> bytes:
    message = b"\0".join((_MAGIC, role, rank.to_bytes(4, "big"), worker_nonce, coordinator_nonce))
    return hmac.digest(secret, message, "sha256")


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    connection.settimeout(_remaining(deadline))
    connection.sendall(data)


def _receive(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Exactly `num_bytes`; the deadline holds for all of them, however slowly they come."""
    data = b""
    while len(data) < num_bytes:
        connection.settimeout(_remaining(deadline))
        more = connection.recv(num_bytes - len(data))
        if not more:
            raise StreamingError("the connection ended during the handshake")
        data += more
    return data


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the handshake took too long")
    return remaining

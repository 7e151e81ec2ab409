"""How a worker gets in: it looks for its coordinator until it has proved itself to it.

Decides what is tried again, and for how long. What lies in the run's meeting files may be of a run
of the same name that was killed, and its address may be another run's by now: unless a launcher
gave the secret, secret and address are read anew until they fit. The proof is in `auth.py`.
"""

from __future__ import annotations

import logging
import socket
import time

from openwafer.errors import StreamingError
from openwafer.streaming import auth, wire
from openwafer.streaming.address import parse_address
from openwafer.streaming.meeting import find_coordinator
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.tasks import TaskEnvironment

__all__ = ["join_run"]

_logger = logging.getLogger("openwafer.streaming")

_RETRY_SECONDS = 0.25


def join_run(cs_ip: str, environment: TaskEnvironment, settings: StreamSettings) -> socket.socket:
    """A connection to the coordinator that has passed the handshake.

    Args:
        cs_ip: `host:port`, where the secret is given; otherwise the coordinator's file says where.

    Raises:
        ConfigError: `cs_ip` is not an address.
        StreamingError: the coordinator cannot be reached in time, or refuses this task.
    """
    deadline = time.monotonic() + settings.connect_timeout_seconds
    rank = environment.worker_rank
    refused: tuple[bytes, str] | None = None
    told = False
    while True:
        remaining = max(deadline - time.monotonic(), 0.0)
        secret = auth.run_secret(environment, remaining)
        address = find_coordinator(cs_ip, environment, remaining)
        last_try = time.monotonic() >= deadline
        try:
            # Whoever refused these once would again: wait for others.
            if (secret, address) != refused or last_try:
                return _connect(address, secret, rank, settings)
        except auth.RefusedError as error:
            error.where = error.where or address
            if environment.secret_is_given or last_try or not isinstance(error, auth.StrangerError):
                raise
            refused = secret, address
            _logger.warning("worker %d tries again: %s (%s)", rank, error.what, address)
        except socket.gaierror as error:
            raise StreamingError(
                f"worker {rank} cannot find the coordinator's host: {error.strerror}", where=address
            ) from error
        except (OSError, StreamingError) as error:
            if last_try:
                raise StreamingError(
                    f"worker {rank} could not reach the coordinator: {error}",
                    where=address,
                    hint="--cs_ip must be an address of the machine that runs task 0",
                ) from error
            if not told:
                told = True
                _logger.info("worker %d waits for the coordinator at %s", rank, address)
        time.sleep(_RETRY_SECONDS)


def _connect(address: str, secret: bytes, rank: int, settings: StreamSettings) -> socket.socket:
    connection = socket.create_connection(parse_address(address), timeout=10)
    try:
        auth.introduce(connection, secret, rank, settings.handshake_timeout_seconds)
        wire.set_up_socket(connection)
    except BaseException:
        connection.close()
        raise
    return connection

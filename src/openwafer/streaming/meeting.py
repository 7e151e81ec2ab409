"""Where coordinator and workers of one run meet.

Decides that with a given secret (the local launcher) the address is the one of `--cs_ip`, and that
under SLURM the coordinator writes the address it really listens at beside the run's secret, where
its workers look. So two jobs on one node do not fight for a port, and `--cs_ip` may be what a site
sets for its wafer, an address of no machine of the job. Does not connect.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import time
from pathlib import Path

from openwafer.errors import StreamingError
from openwafer.files import write_text
from openwafer.streaming import auth
from openwafer.streaming.address import format_address, parse_address
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.settings import StreamSettings
from openwafer.streaming.tasks import TaskEnvironment

__all__ = ["find_coordinator", "forget_meeting", "open_coordinator"]

_POLL_SECONDS = 0.2

_logger = logging.getLogger("openwafer.streaming")


def open_coordinator(
    cs_ip: str,
    environment: TaskEnvironment,
    *,
    settings: StreamSettings = StreamSettings(),  # noqa: B008 (frozen)
) -> Coordinator:
    """Start listening, and say where.

    Args:
        cs_ip: the address asked for, `host:port`.

    Raises:
        StreamingError: it cannot listen, or the secret cannot be written.
    """
    secret = auth.run_secret(environment, settings.connect_timeout_seconds)
    if environment.secret_is_given:
        return Coordinator(
            cs_ip,
            environment.num_workers,
            secret,
            settings=settings,
            workers_come_back=environment.workers_come_back,
        )
    try:
        _refuse_unreachable(cs_ip, environment)
        coordinator = Coordinator(cs_ip, environment.num_workers, secret, settings=settings)
        address = coordinator.address
    except StreamingError as error:
        coordinator = Coordinator("0.0.0.0:0", environment.num_workers, secret, settings=settings)
        address = format_address(environment.node, parse_address(coordinator.address)[1])
        _logger.warning("%s; it listens at %s, and its workers know", error.what, address)
    _write(_meeting_file(environment), address)
    return coordinator


def find_coordinator(cs_ip: str, environment: TaskEnvironment, timeout_seconds: float) -> str:
    """The address to connect to: `cs_ip`, or what the coordinator wrote.

    Raises:
        StreamingError: nothing was written in time.
    """
    if environment.secret_is_given:
        return cs_ip
    path = _meeting_file(environment)
    deadline = time.monotonic() + timeout_seconds
    while True:
        with contextlib.suppress(FileNotFoundError):
            return path.read_text(encoding="ascii").strip()
        if time.monotonic() >= deadline:
            raise StreamingError(
                f"task {environment.rank} does not know where the coordinator listens",
                where=str(path),
                hint="start all tasks of a run together; their home folder must be shared",
            )
        time.sleep(_POLL_SECONDS)


def forget_meeting(environment: TaskEnvironment) -> None:
    """Delete what the coordinator wrote, secret and address, once all workers are in."""
    auth.discard_secret(environment)
    if environment.role == "coordinator" and not environment.secret_is_given:
        _meeting_file(environment).unlink(missing_ok=True)


def _meeting_file(environment: TaskEnvironment) -> Path:
    assert environment.secret_file is not None, "a single process meets nobody"
    return environment.secret_file.with_suffix(".address")


def _refuse_unreachable(cs_ip: str, environment: TaskEnvironment) -> None:
    """A loopback address is of no use to workers on other nodes."""
    host, _ = parse_address(cs_ip)
    if environment.num_nodes > 1 and _is_loopback(host):
        raise StreamingError(
            f"{cs_ip} cannot be reached from the job's {environment.num_nodes} nodes"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _write(path: Path, address: str) -> None:
    try:
        write_text(path, f"{address}\n")
    except OSError as error:
        raise StreamingError(
            f"cannot write where the coordinator listens: {error}", where=str(path)
        ) from error

"""Time limits and memory bounds of streaming, as one value.

Decides the defaults. Does not decide what happens at a limit: the module that meets it does.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StreamSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """How long to wait, and how much to hold."""

    window_batches: int = 4
    """Batches that one worker may have sent, per open epoch, before they are consumed."""
    max_payload_bytes: int = 2 << 30
    """Largest batch on the wire."""
    shared_slots: int = 8
    """Batches that one worker may have in memory that the coordinator sees too, where both are on
    one machine: those of the window, and a few that the training loop still holds. With none, and
    for those beyond, batches travel over the connection."""
    shared_slot_bytes: int = 256 << 20
    """Largest batch in such memory, of which only what is written becomes real."""
    handshake_timeout_seconds: float = 10.0
    """From a connection to the end of its proof."""
    join_timeout_seconds: float = 600.0
    """How long the coordinator waits for all workers to connect."""
    connect_timeout_seconds: float = 7200.0
    """How long a worker tries to reach the coordinator, which may have to compile first."""
    warn_after_seconds: float = 30.0
    """A worker whose batch is awaited this long is named in the log, once per wait."""
    fail_after_seconds: float = 1800.0
    """A worker whose batch is awaited this long ends the run."""
    replace_timeout_seconds: float = 25.0
    """How long a worker that was lost may take to come back, where its launcher starts it again."""
    close_timeout_seconds: float = 5.0
    """How long an orderly end may take before sockets are simply closed."""

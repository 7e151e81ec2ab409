"""The address at which the coordinator listens, as `--cs_ip` gives it.

Decides how `host:port` is read. Does not connect.
"""

from __future__ import annotations

from openwafer.errors import ConfigError

__all__ = ["DEFAULT_PORT", "format_address", "parse_address"]

DEFAULT_PORT = 9000
"""The documented port of a CS system (spec, section 8.5)."""


def parse_address(text: str) -> tuple[str, int]:
    """`host`, `host:port`, `[ipv6]` or `[ipv6]:port` as (host, port).

    Raises:
        ConfigError: not of these forms, or a port outside 0..65535.
    """
    text = text.strip()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        valid, port_text = bool(bracket) and (not rest or rest.startswith(":")), rest[1:]
        has_port = bool(rest)
    else:
        host, colon, port_text = text.partition(":")
        valid, has_port = ":" not in port_text, bool(colon)
    port = _port(port_text) if has_port else DEFAULT_PORT
    if not valid or not host or port is None:
        raise ConfigError(
            f"`{text}` is not an address",
            where="--cs_ip",
            allowed=f"HOST:PORT, e.g. 127.0.0.1:{DEFAULT_PORT}; IPv6 as [::1]:{DEFAULT_PORT}",
        )
    return host, port


def format_address(host: str, port: int) -> str:
    """The text that `parse_address` reads back."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        return None
    return int(text) if int(text) <= 65535 else None

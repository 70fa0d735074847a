"""Who may ask: keys, and the web pages that a browser asks for."""

from __future__ import annotations

import ipaddress
from email.message import Message
from urllib.parse import urlsplit

from .errors import ApiError, bad
from .options import ServeOptions


def key_of(headers: Message) -> str | None:
    """Return the key that a request shows.

    Args:
        headers (Message): The request's.
    """
    kind, _, key = headers.get("Authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("X-Api-Key")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def check_origin(headers: Message, options: ServeOptions, address: str) -> None:
    """Refuse a request that a web page of another host makes through somebody's browser.

    A server without a key at the loopback address answers to that address alone: a page can
    give a name of its own the address of this machine.

    Args:
        headers (Message): The request's.
        options (ServeOptions): How the server is set up.
        address (str): Where it listens.

    Raises:
        ApiError: 403.
    """
    allowed = options.allowed_origins
    host = headers.get("Host", "")
    origin = headers.get("Origin")
    if "*" in allowed:
        return
    if origin is not None and origin not in allowed and _host(origin) != host.lower():
        raise ApiError(403, "Pages of this origin may not ask. Allow it with --allowed-origins.", "origin")
    if options.api_key or not host or not is_loopback(address):
        return
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        raise bad("The Host header is not valid.") from None
    if is_loopback(name) or name.endswith(".localhost") or any(_host(one) == host.lower() for one in allowed):
        return
    raise ApiError(
        403, "This server answers to localhost alone. Set --api-key, or name the page in --allowed-origins.", "host"
    )


def _host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""

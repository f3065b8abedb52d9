"""Where a request comes from: its address, the proxies on the way, the web page that it serves."""

from __future__ import annotations

import ipaddress
import re

from starlette.requests import HTTPConnection, Request

from yaptext.errors import AuthenticationFailed, HostNotAllowed
from yaptext.settings import DEFAULT_API_KEY, Settings

_OF_PROXIES = ("forwarded", "x-forwarded-for", "via")
_LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
_MAX_HOST = 300
"""Characters of a `Host` that are looked at: a name has 253."""


def address(connection: HTTPConnection) -> str:
    """Empty for a socket without addresses."""
    return connection.client.host if connection.client else ""


def parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IPv4 address also if it is written as IPv6. None for a socket without addresses, and for what a trusted proxy
    wrote that is no address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def is_proxied(connection: HTTPConnection) -> bool:
    """Whether a proxy says that it passes the request on."""
    return any(name in connection.headers for name in _OF_PROXIES)


def check_origin(websocket: HTTPConnection, settings: Settings) -> None:
    """Raises `AuthenticationFailed` for a page of an origin that is not allowed. Only browsers send one.

    Every page knows the default key, so with it those of this machine alone connect, unless the operator names some."""
    origin, allowed = websocket.headers.get("origin"), settings.origins
    if origin is None:
        return
    if allowed is not None:
        fits, rule = origin.lower() in allowed, "it is not one of ALLOWED_ORIGINS."
    else:
        fits = settings.own_key != DEFAULT_API_KEY or _LOCAL_ORIGIN.fullmatch(origin.lower()) is not None
        rule = "with the default API key only pages of this machine connect. Set YAP_TEXT_API_KEY or ALLOWED_ORIGINS."
    if not fits:
        raise AuthenticationFailed(f"Origin {origin[:100]!r} is not allowed: {rule}")


def check_host(request: Request) -> None:
    """Raises `HostNotAllowed` if this machine alone reaches the service, and the request has the name of another.

    So a browser asks for a page whose site has changed its address to this machine's (DNS rebinding): it takes the
    answer for the site's own. An address can be no such name."""
    service = request.state.service
    host = request.headers.get("host", "")[:_MAX_HOST]
    if service.lifecycle.on_loopback and not _is_local(host):
        name = _name_of(host)
        if name not in service.settings.hosts and name != service.settings.host.lower():
            raise HostNotAllowed(f"Host {host[:100]!r} is not allowed: it is not one of ALLOWED_HOSTS.")


def _is_local(host: str) -> bool:
    name = _name_of(host)
    if not name or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """Without the port."""
    return (host if host.endswith("]") else host.rpartition(":")[0] or host).lower().rstrip(".")

"""Lists of web origins, host names and networks: how they are written and compared."""

from __future__ import annotations

import ipaddress
import re


def items(listed: str | None) -> list[str]:
    return [item.strip() for item in (listed or "").split(",") if item.strip()]


_ORIGIN = re.compile(r"(?!wss?:)([a-z][a-z0-9+.-]*)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")


def origin(item: str) -> str:
    """As a browser writes it: lower case, no slash at the end, no default port of the scheme."""
    written = item.rstrip("/").lower()
    if written in ("*", "null"):
        return written
    parts = _ORIGIN.fullmatch(written)
    if parts is None or int(parts[3] or 0) > 65_535:
        raise ValueError(
            f"ALLOWED_ORIGINS={item!r} is not allowed: no browser sends such an origin. Write it as "
            "https://app.example.com or http://localhost:3000"
        )
    scheme, name, port = parts.groups()
    usual = port is None or int(port) == {"http": 80, "https": 443}.get(scheme)
    return f"{scheme}://{name}" if usual else f"{scheme}://{name}:{int(port)}"


def host(item: str) -> str:
    if re.fullmatch(r"[a-zA-Z0-9_.-]+", item) is None:
        raise ValueError(f"ALLOWED_HOSTS={item!r} is not allowed: it is not a host name. Write it as yap.example.com")
    return item.lower().rstrip(".")


def networks(item: str) -> list[str]:
    """The network, and for IPv4 also the form in which a dual-stack socket shows it."""
    try:
        network = ipaddress.ip_network(item)
    except ValueError:
        raise ValueError(
            f"TRUSTED_PROXIES={item!r} is not allowed: it is neither an address nor a network. Write it as 10.0.0.1 "
            "or 10.0.0.0/8"
        ) from None
    if network.version == 6:
        return [str(network)]
    return [str(network), f"::ffff:{network.network_address}/{96 + network.prefixlen}"]

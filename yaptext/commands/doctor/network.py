"""Checks of the network: the port, the address, proxies, and the clock against the hub's."""

from __future__ import annotations

import email.utils
import os
import re
import socket
from contextlib import suppress
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from yaptext.commands.doctor import web
from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.machine import Machine
from yaptext.commands.doctor.model_source import ask_hub, hub_models
from yaptext.errors import YapError

_LISTEN = "0A"
_ANY = ("0.0.0.0", "::")
_MOST_SKEW_S = 300
_VALID = ("settings.valid",)


class Listener(NamedTuple):
    """A listening TCP socket, and its process as far as this user may see it."""

    host: str
    port: int
    pid: int | None
    command: str


def listeners(machine: Machine, port: int) -> list[Listener]:
    """Those of a port, by /proc."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (machine.word(table) or "").splitlines()[1:]:
            words = line.split()
            host, _, number = words[1].partition(":") if len(words) > 9 else ("", "", "")
            if number and words[3] == _LISTEN and int(number, 16) == port:
                pid = _holder(machine, words[9])
                found.append(Listener(_address(host), port, pid, _command(machine, pid)))
    return found


def _address(digits: str) -> str:
    """The kernel writes 32-bit words in the processor's order."""
    raw = bytes.fromhex(digits)
    return str(ip_address(b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))))


def _holder(machine: Machine, inode: str) -> int | None:
    """Of several processes with the socket, one that is not systemd."""
    holders = []
    for folder in machine.path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has ended
            if any(str(link.readlink()) == f"socket:[{inode}]" for link in (folder / "fd").iterdir()):
                holders.append(int(folder.name))
    return max(holders, default=None)


def _command(machine: Machine, pid: int | None) -> str:
    if pid is None:
        return ""
    return (machine.word(f"/proc/{pid}/cmdline") or machine.word(f"/proc/{pid}/comm") or "").replace("\0", " ").strip()


def base(seen: Deployment) -> str:
    """Where to ask the service from this machine. Raises `Unknown`."""
    host, port = seen.address
    if port == 0:
        raise Unknown("PORT=0: the port is in the log of the service")
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def ready(seen: Deployment) -> web.Answer:
    """Of /readyz, asked once and without a proxy. Raises `Unknown`."""
    url = f"{base(seen)}/readyz"
    return seen.once("ready", lambda: web.get(url))


def is_ours(answer: web.Answer) -> bool:
    """Whether a service of this kind answered."""
    return isinstance(answer.json, dict) and "status" in answer.json


@check("network.port", needs=_VALID)
def port(seen: Deployment) -> Finding:
    host, number = seen.address
    if number == 0:
        return ok("PORT=0: the service takes a free one")
    found = [one for one in listeners(seen.machine, number) if _meet(one.host, host)]
    if not found:
        return ok(f"{host}:{number} is free")
    one = found[0]
    who = f"{one.command.split()[0].split('/')[-1]} (process {one.pid})" if one.command else "a process of another user"
    if re.search(r"yap-?text\S* serve\b", one.command):
        return ok(f"{host}:{number} is held by this service (process {one.pid})")
    if seen.socket is not None and (one.pid in (1, None) or "systemd" in one.command):
        return ok(f"{host}:{number} is held by yap-text.socket")
    if is_ours(ready(seen)):
        return ok(f"{host}:{number} answers as this service, {who}")
    other = "systemctl edit yap-text.socket" if seen.installed else f"PORT={number + 1}"
    return fail(f"{host}:{number} is taken by {who}", f"stop it, or choose another port: {other}")


def _meet(one: str, other: str) -> bool:
    """Whether sockets on both addresses cannot be open at once."""
    other = {"localhost": "127.0.0.1", "": "0.0.0.0"}.get(other, other)
    return one == other or one in _ANY or other in _ANY


@check("network.address", needs=_VALID)
def address(seen: Deployment) -> Finding:
    host, number = seen.address
    first = int(seen.machine.word("/proc/sys/net/ipv4/ip_unprivileged_port_start") or 1024)
    if seen.installed is None and seen.machine.user_id != 0 and 0 < number < first:
        remedy = "set PORT=8000, or run the units (yap-text install)"
        return fail(f"PORT={number}: only root may listen there", remedy)
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        return fail(
            f"HOST={host!r} is no address of this machine: {error.strerror}", "set HOST=127.0.0.1 or HOST=0.0.0.0"
        )
    try:
        with socket.socket(family, kind) as probe:
            probe.bind(place)
    except OSError as error:
        return fail(
            f"HOST={host} cannot be listened on: {error.strerror}", "set HOST to an address of: ip address, or 0.0.0.0"
        )
    return ok(f"{host} is an address of this machine")


@check("network.proxies")
def proxies(seen: Deployment) -> Finding:
    named = web.proxies(seen.environ)
    bypass = named.pop("no", "")
    odd = []
    for scheme, url in named.items():
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https", "socks5", "socks5h") or not parts.hostname:
            odd.append(f"{scheme}_proxy is no address of a proxy")
        elif parts.scheme.startswith("socks") and "socksio" not in seen.machine.packages():
            odd.append(f"{scheme}_proxy is a SOCKS proxy, for which the hub's client lacks a package (socksio)")
    if odd:
        return warn("; ".join(odd), "export HTTPS_PROXY=http://HOST:PORT, or unset it")
    if not named:
        return ok("no proxy is set")
    told = ", ".join(f"{scheme}_proxy={url}" for scheme, url in named.items())
    return ok(f"{told}; without it: {bypass or 'nothing'}")


@check("network.certificates")
def certificates(seen: Deployment) -> Finding:
    """Which authorities the hub's client trusts: SSL_CERT_FILE and SSL_CERT_DIR, and not what other clients read."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if (path := seen.environ.get(name)) and not os.path.exists(seen.machine.path(path)):
            return fail(f"{name}={path} is not there: no HTTPS address answers", f"unset {name}, or correct it")
    named = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if seen.environ.get(name)]
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if (path := seen.environ.get(name)) and not named:
            return warn(f"the hub's client does not read {name}", f"export SSL_CERT_FILE={path}")
    return ok(f"those of {' and '.join(named)}" if named else "the default authorities")


@check("network.clock", needs=("models.hub",))
def clock(seen: Deployment) -> Finding:
    """Against the hub's `Date`."""
    named = next(iter(hub_models(seen)), None)
    try:
        answer = ask_hub(seen, f"api/models/{named.source}") if named else None
        then = email.utils.parsedate_to_datetime(answer.date) if answer and answer.date else None
    except (YapError, ValueError):
        then = None
    if then is None:
        return skip("the hub sent no time")
    skew = seen.machine.now - then.timestamp()
    if abs(skew) > _MOST_SKEW_S:
        return warn(
            f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the hub's",
            "timedatectl set-ntp true",
        )
    return ok(f"within {_MOST_SKEW_S} s of the hub's")

"""Messages to systemd's notify socket: ready, status, watchdog, stopping. Without a socket every call does nothing."""

from __future__ import annotations

import socket

_address: str | None = None


def connect(address: str | None) -> None:
    """Sets the address for `notify`: the value of NOTIFY_SOCKET, `@` for an abstract name."""
    global _address  # noqa: PLW0603  # one process has one supervisor
    _address = "\0" + address[1:] if address and address.startswith("@") else address


def notify(*assignments: str) -> None:
    """Sends `READY=1`, `STATUS=...` and the like (sd_notify(3)). A supervisor that is gone is not an error."""
    if _address is None:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A reason may quote a path, which may contain any bytes.
            sender.sendto("\n".join(assignments).encode(errors="backslashreplace"), _address)
    except OSError:
        pass
